"""What a session sends its server: the plan of every part of a level, over how many lines, from how many processes.

Made by `workers.session` once its server is up, for the first completion; used by `workers.measuring`.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

from contract import lengths
from contract.failures import FailureClass
from contract.lengths import Lengths
from contract.rows import SessionRow
from contract.specs import Api, Point, SessionSpec
from workers.cores import FreeCores
from workers.load import memory, tasks
from workers.load.ending import Stop
from workers.load.endpoint import Endpoint
from workers.load.plan import LoadPlan
from workers.load.prompts import ASSUMED_COST, TextCost
from workers.load.summary import LoadSummary
from workers.load.tokenizer import text_cost

STREAM_TOKENS_PER_S = 100
"""What a stream of an open loop is taken to carry, before anything is known of its server; see `tasks`."""
MORE_THAN_EXPECTED = 1.5
"""Requests made ready for a level that is ended by time, over those that the warm-up's rate would send."""


class LoadPlans:
    """The plans of one server's load. Every request that is planned is counted in `row`, so that none is sent twice."""

    def __init__(self, spec: SessionSpec, row: SessionRow, endpoint: Endpoint, free: FreeCores) -> None:
        """`free` are the cores that load may use."""
        self.free = free
        self.endpoint = endpoint
        """Where load goes."""
        self._spec, self._row = spec, row
        self.text_cost: TextCost | None = None

    def plan(
        self, concurrency: int, requests: int, prompt_tokens: Lengths, output_tokens: Lengths, seed: int = 0
    ) -> LoadPlan:
        """A load whose prompts no request of this server has had before."""
        first_ordinal = self._row.requests_sent
        self._row.requests_sent += requests
        return LoadPlan(
            endpoint=self.endpoint,
            concurrency=concurrency,
            num_requests=requests,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            first_ordinal=first_ordinal,
            vocab_size=self._spec.model.vocab_size,
            seed=seed,
            timeout_s=self._spec.timeouts.request_s,
            cores=self.free.numbers,
        )

    def lines(self, point: Point, warmup: list[LoadSummary]) -> int:
        """Lines that a level is sent over; of an open loop as many as are expected to be in flight."""
        if not point.arrivals:
            return point.concurrency
        streams = point.arrivals.highest_rate * lengths.expected(point.output_tokens) / STREAM_TOKENS_PER_S
        seen = max((result.most_in_flight for result in warmup), default=1)
        return min(max(math.ceil(streams), seen, self._spec.load_processes or 1), point.num_requests)

    def processes_for(self, lines: int) -> int:
        """From how many processes so many lines are sent."""
        return self._spec.load_processes or tasks.processes_for(lines, self.free.at_once)

    def processes_again(self, streams: int, before: int) -> int:
        """Processes for a level of so many streams (of an open loop: connections) whose client was its limit with
        `before` of them: no more where more are not to be had, or the user has said how many."""
        if self._spec.load_processes is not None:
            return before
        return tasks.processes_again(before, streams, self.free.at_once)

    def limited(self, streams: int, processes: int) -> tuple[FailureClass, str]:
        """Why a level of so many streams is not measured whose client was its limit with so many processes, and in
        words what of them."""
        if tasks.most_processes(streams) <= processes:
            return FailureClass.CLIENT_STREAMS_FEW, "the level has too few streams for more"
        if self._spec.load_processes is not None:
            return FailureClass.CLIENT_PROCESSES_FIXED, "load.processes fixes their number"
        if self.processes_again(streams, processes) > processes:
            return FailureClass.CLIENT_PROCESSES_FEW, "the host has cores for more"
        whose = "the CPU quota" if self.free.has_quota else "the host"
        return FailureClass.CLIENT_CORES_FEW, f"{whose} has no cores for more"

    def warm_up(self, point: Point, lines: int) -> LoadPlan:
        """One round before the measured part."""
        return self._part(point, point.warmup_requests, lines, "warm-up")

    def level(self, point: Point, lines: int, warmup: list[LoadSummary]) -> LoadPlan:
        """The measured part. One that is ended by time has requests for more than it is expected to send, as far as
        their answers can be kept: rows say where it ran out of them."""
        if point.seconds is None:
            return self._part(point, point.num_requests, lines, "")
        expected = (warmup[-1].qps or 0.0) * point.seconds if warmup else 0.0
        requests = math.ceil(MORE_THAN_EXPECTED * expected) + point.concurrency
        requests = max(point.num_requests, min(requests, memory.most_requests(point.output_tokens)))
        stop = Stop(point.seconds, point.precision, point.num_requests)
        return replace(self._part(point, requests, lines, ""), stop=stop)

    def _part(self, point: Point, requests: int, lines: int, part: str) -> LoadPlan:
        """A part of a level; of an open loop each part and repeat has arrivals of its own."""
        due_s = point.arrivals.times(requests, f"{point.seed}:{point.repeat}:{part}") if point.arrivals else ()
        plan = self.plan(lines, requests, point.prompt_tokens, point.output_tokens, point.seed)
        cost = self._cost_of_text(point.api)
        return replace(plan, api=point.api, shared_prefix=point.shared_prefix, text_cost=cost, due_s=tuple(due_s))

    def _cost_of_text(self, api: Api) -> TextCost:
        """What a chat's words take on this server, asked once."""
        if api is not Api.CHAT:
            return ASSUMED_COST
        if self.text_cost is None:
            self.text_cost = asyncio.run(text_cost(self.endpoint))
        return self.text_cost
