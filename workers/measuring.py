"""Measures the points of one session on its server, which is up: its memory, and levels of load. Blocking.

Used by `workers.session`, which says what comes of a server that ends or answers nothing meanwhile.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from contract.failures import FailureClass
from contract.rows import CLIENT_LIMITED, FAILED, MEASURED, Failure, PointRow
from contract.specs import Api, Point
from workers import point_rows, prefix_cache, probe, server_view
from workers.account import ServerAccount
from workers.devices.base import Device
from workers.evidence import Evidence
from workers.histogram import gained
from workers.launch import readiness
from workers.launch.process import ServerProcess
from workers.load import tasks
from workers.load.endpoint import Endpoint
from workers.load.limits import client_limits
from workers.load.plan import LoadPlan, LoadResult
from workers.load.prompts import ASSUMED_COST
from workers.load.steady import stable
from workers.load.summary import LoadSummary, summarize
from workers.load_plans import LoadPlans
from workers.metrics import ServerMetrics
from workers.point_rows import Origin
from workers.sampler import Observed, Sampler
from workers.settling import settled_memory
from workers.standstill import at_rest
from workers.strangers import Strangers

WARMUP_OUTPUT_TOKENS = 8
WARMUP_ROUNDS = 4
"""Of a level, at most."""
DEFAULT_BATCHED_TOKENS = 2048
FAILED_SHARE_LIMIT = 0.05
"""More failed requests than this and a load point is not a measurement."""


@dataclass(frozen=True, slots=True)
class Measuring:
    """What is known of a server that has answered its first completion, and how it is measured.

    `send` runs a plan from so many processes and returns what they saw. `memory` and `level` raise what that raises,
    `NoAnswer` and `CardLost`, and `level` of a chat `EndpointError`.
    """

    origin: Origin
    device: Device
    process: ServerProcess
    plans: LoadPlans
    send: Callable[[LoadPlan, int], LoadResult]
    account: ServerAccount
    ready_bytes: int
    """What its cards held when it was ready, together."""
    strangers: Strangers
    evidence: Evidence

    @property
    def endpoint(self) -> Endpoint:
        """Where it answers: load and scrapes go the same way."""
        return self.plans.endpoint

    def serves(self) -> bool:
        """Whether the server lives, and its engine does."""
        return readiness.still_serves(self.endpoint, self.process)

    def scrape(self) -> ServerMetrics:
        """Return the server's metrics."""
        return probe.server_metrics(self.endpoint)

    @contextlib.contextmanager
    def watched(self) -> Iterator[Sampler]:
        """Watch a window. Who else was on the cards is known of one that comes to nothing, too."""
        sampler = Sampler(self.device, self.process.pid, self.endpoint)
        try:
            with sampler:
                yield sampler
        finally:
            self.strangers.saw(sampler.observed.processes)

    def memory(self, point: Point) -> PointRow:
        """Readings around a load that fills a step: the first such load takes activation memory back."""
        length = self.origin.spec.server.max_model_len
        batched = self.origin.spec.server.max_num_batched_tokens or self.origin.max_num_batched_tokens
        aim = batched or DEFAULT_BATCHED_TOKENS
        output_tokens = min(WARMUP_OUTPUT_TOKENS, length - 1)
        prompt_tokens = length - output_tokens
        requests = 2 * math.ceil(aim / prompt_tokens) + 2
        before = self.scrape()
        started_wall_s, started_s = time.time(), time.monotonic()
        with self.watched() as sampler:
            result = self.send(self.plans.plan(requests, requests, prompt_tokens, output_tokens), 1)
        largest = gained(before.step_tokens, self.scrape().step_tokens).highest_above()
        lasted_s = time.monotonic() - started_s
        used = settled_memory(self.device, self.process.pid)
        loaded = sum(used)
        sampler.look_at_processes()
        self.strangers.saw(sampler.observed.processes)
        if self.account.of_cards:
            self.account.at("loaded", used)
        row = point_rows.blank(self.origin, point, started_wall_s)
        self._fill_window(row, sampler.observed, started_s, lasted_s)
        row.foreign_processes = self.strangers.in_memory(sampler.observed.processes)
        row.mem_ready_bytes, row.mem_loaded_bytes = self.ready_bytes, loaded
        row.mem_peak_bytes = max(sum(sampler.observed.peak().values()), loaded, self.ready_bytes)
        row.warmup_reached_batch = None if largest is None else largest >= min(aim, requests * prompt_tokens) / 2
        row.prompt_tokens, row.output_tokens, row.num_requests = prompt_tokens, output_tokens, requests
        return self._judged(row, result)

    def level(self, point: Point) -> PointRow:
        """Measure a level; where the client was its limit, once more with more processes, if there are cores for them.

        A second try that comes to nothing leaves the first with its numbers, `client_limited`.
        """
        emptied = prefix_cache.reset(self.endpoint)
        warmup = self._warm_up(point)

        def tried(lines: int, processes: int) -> PointRow:
            row, result = self._level_once(point, self.plans.level(point, lines, warmup), processes)
            row.warmup_tok_s = [round_.tok_s or 0.0 for round_ in warmup]
            row.warmup_stable = stable(row.warmup_tok_s) if warmup and not point.arrivals else None
            row.prefix_reset = emptied
            limits = client_limits(result)
            judged = row.status == MEASURED or _failed_for_want_of_sockets(row)
            if limits and judged and not row.simulated:  # a stand-in's speed says nothing anyway
                row.status, row.log_tail = CLIENT_LIMITED, None
                row.failure_class, more_or_not = self.plans.limited(
                    tasks.streams_of(result.clients), len(result.clients)
                )
                if any(r.failure_class == FailureClass.CLIENT_SOCKETS for r in result.requests):
                    row.failure_class = FailureClass.CLIENT_SOCKETS  # cores or processes would not help
                many = f"{len(result.clients)} processes ({more_or_not})"
                row.failure_message = f"the load client was the limit with {many}: {'; '.join(limits)}"
            return row

        lines = self.plans.lines(point, warmup)
        processes = self.plans.processes_for(lines)
        first = tried(lines, processes)
        more = self.plans.processes_again(tasks.streams_of(first.clients), processes)
        if first.status != CLIENT_LIMITED or more <= processes:
            return first
        try:
            again = tried(point.concurrency or max(lines, more), more)
            lost = f"{again.failure_class}: {again.failure_message}" if again.status == FAILED else None
        except Exception as error:  # whatever it was, it must not take the first try's numbers along
            lost = self.evidence.shown(f"{type(error).__name__}: {error}")
        if lost is not None:
            first.failure_message = f"{first.failure_message}; measured again with {more} it failed: {lost}"
            return first
        again.limited_before = [first.failure_message or ""]
        return again

    def _warm_up(self, point: Point) -> list[LoadSummary]:
        """Send rounds of the level until two neighbours have the same throughput, or there have been enough.

        An open loop's throughput is that of its arrivals: it has one round.
        """
        rounds: list[LoadSummary] = []
        lines = self.plans.lines(point, rounds)
        most = 0 if not point.warmup_requests else 1 if point.arrivals else WARMUP_ROUNDS
        while len(rounds) < most and not stable([r.tok_s or 0.0 for r in rounds]):
            result = self.send(self.plans.warm_up(point, lines), self.plans.processes_for(lines))
            rounds.append(summarize(result.requests, result.duration_s))
        return rounds

    def _level_once(self, point: Point, plan: LoadPlan, processes: int) -> tuple[PointRow, LoadResult]:
        before = at_rest(self.scrape)
        with self.watched() as sampler:
            result = self.send(plan, processes)
        after = at_rest(self.scrape)
        row = point_rows.blank(self.origin, point, result.started_wall_s)
        self._fill_window(row, sampler.observed, result.started_monotonic_s, result.duration_s)
        row.foreign_processes = self.strangers.in_window(sampler.observed.processes)
        samples = sampler.observed.server_window(result.started_monotonic_s, result.duration_s)
        server_view.fill(row, before, after, samples, result.requests)
        point_rows.fill_load(row, point, plan, result)
        row.server_hz = sampler.observed.server_hz(result.started_monotonic_s, result.duration_s)
        row.asked_s = point.seconds
        row.text_cost_assumed = plan.text_cost is ASSUMED_COST if point.api is Api.CHAT else None
        row.prefix_shared_ratio = server_view.shared_ratio(plan, row.mean_prompt_tokens)
        row = self._judged(row, result)
        hits = server_view.prefix_hit_failure(row, self.origin.spec.prefix_hit_limit)
        if hits is not None and row.status == MEASURED:
            row.status, row.failure_class, row.failure_message = FAILED, hits.failure_class, hits.message
        return row, result

    def _fill_window(self, row: PointRow, observed: Observed, started_s: float, duration_s: float) -> None:
        point_rows.fill_window(row, observed, started_s, duration_s)
        self.account.saw(observed.peak())

    def _judged(self, row: PointRow, result: LoadResult) -> PointRow:
        # an answer that was no success is a server's own words, and may hold anything
        said = {words: self.evidence.shown(words) for r in result.requests if (words := r.failure_message) is not None}
        row.requests = [
            r if r.failure_message is None else replace(r, failure_message=said[r.failure_message])
            for r in result.requests
        ]
        row.completed = sum(request.ok for request in result.requests)
        row.failed = len(result.requests) - row.completed
        row.duration_s = result.duration_s
        if row.failed > FAILED_SHARE_LIMIT * len(result.requests):
            first = next(request for request in row.requests if not request.ok)
            message = (
                f"{row.failed} of {len(result.requests)} requests failed, the first: "
                f"{first.failure_class}: {first.failure_message}"
            )
            many = Failure(FailureClass.LOAD_ERROR_RATE, message)
            failure = many if self.serves() else self.evidence.death(message)
            row.status, row.failure_class = FAILED, failure.failure_class
            row.failure_message = self.evidence.shown(failure.message)
            row.log_tail = self.evidence.tail()
        return row


def _failed_for_want_of_sockets(row: PointRow) -> bool:
    """Whether a level had too many failures only by requests for which the client's host had no socket."""
    theirs = sum(not each.ok and each.failure_class != FailureClass.CLIENT_SOCKETS for each in row.requests)
    return row.failure_class == FailureClass.LOAD_ERROR_RATE and theirs <= FAILED_SHARE_LIMIT * len(row.requests)
