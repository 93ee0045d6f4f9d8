"""One level over several load processes: its plan split, their start together, their results merged.

Used by `workers.session`, which hands the parts to whoever runs them at once (Ray tasks on the node, or processes), and
`workers.measuring`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from contract.rows import ClientRow
from workers.load.ending import REQUESTS
from workers.load.plan import LoadPlan, LoadResult
from workers.load.stalls import HeldBack
from workers.load.start_line import StartLine

STREAMS_AGAIN, FEW = 8, 16
"""Of each process of a second try, where it has more than so few: fewer streams each would hardly send better, and each
process costs a start."""
STREAMS_PER_PROCESS = 256
"""One process carried 512 streams of 100 tokens a second at 99 % of the ideal load (benchmarks/client); half of it is
left for burstier servers and slower cores."""
CLIENTS_SHARE = 2
"""Load processes are no more than one for so many free cores: the others are the servers', this one's and its
neighbours', whose front ends and engines are busy on cores that they have not bound themselves to. With
`STREAMS_AGAIN` that bounds what a second try costs, too: as Ray's task each process took 0.9 s of CPU time to start
and 76 MB (PSS), eight of them, 2026-11-28, when it imported more."""


def processes_for(concurrency: int, free_cores: int) -> int:
    """Return how many processes a level should have: one for `STREAMS_PER_PROCESS` streams, as far as cores allow."""
    return max(1, min(math.ceil(concurrency / STREAMS_PER_PROCESS), free_cores // CLIENTS_SHARE, concurrency))


def processes_again(first: int, streams: int, free_cores: int) -> int:
    """Return how many a level should have that `first` were too few for; `first` where more cannot help.

    As many as can help, at once: a long level must not be measured five times.
    """
    return max(first, min(most_processes(streams), free_cores // CLIENTS_SHARE))


def streams_of(clients: Sequence[ClientRow]) -> int:
    """Return what a level was sent over: its streams, or the connections that an open loop had."""
    return sum(client.streams for client in clients)


def most_processes(streams: int) -> int:
    """Return how many processes so many streams are divided among at the most."""
    return min(streams, max(FEW, math.ceil(streams / STREAMS_AGAIN)))


def split(plan: LoadPlan, processes: int, directory: Path | None = None) -> list[LoadPlan]:
    """Return `processes` plans that together send what `plan` would, every request as it was: its ordinal, its lengths
    and, of an open loop, its moment. Requests are dealt out in turn among the streams, streams among the processes.

    All start together, through `directory` (empty, on the node that they run on).

    Raises:
        ValueError: fewer streams than processes, or no directory for several.
    """
    if processes == 1:
        return [plan]
    streams = min(plan.concurrency, plan.num_requests)
    if streams < processes or directory is None:
        raise ValueError(f"{streams} streams cannot be divided among {processes} processes")
    stop = plan.stop and replace(plan.stop, least=math.ceil(plan.stop.least / processes))
    parts = []
    for index in range(processes):
        numbers = [number for number in range(plan.num_requests) if number % streams % processes == index]
        parts.append(
            replace(
                plan,
                concurrency=len(range(index, streams, processes)),
                num_requests=len(numbers),
                numbers=tuple(numbers),
                due_s=tuple(plan.due_s[number] for number in numbers) if plan.due_s else (),
                stop=stop,
                start=StartLine(str(directory), processes, index),
            )
        )
    return parts


def merge(results: list[LoadResult]) -> LoadResult:
    """Return the results of one level's processes as one: times from the first start, every row kept."""
    first = min(results, key=lambda result: result.started_monotonic_s)
    for result in results:
        late_s = result.started_monotonic_s - first.started_monotonic_s
        for row in result.requests:
            row.sent_s += late_s
            row.due_s = None if row.due_s is None else row.due_s + late_s
        for client in result.clients:
            client.in_flight = [replace(each, t_s=each.t_s + late_s) for each in client.in_flight]
    end_s = max(result.started_monotonic_s + result.duration_s for result in results)
    return LoadResult(
        sorted((row for result in results for row in result.requests), key=lambda row: row.ordinal),
        end_s - first.started_monotonic_s,
        first.started_monotonic_s,
        first.started_wall_s,
        [client for result in results for client in result.clients],
        next((result.stopped_by for result in results if result.stopped_by != REQUESTS), REQUESTS),
        sum(result.judging_cpu_s for result in results),
        achieved_share=_achieved_share(results),
        held_back=sum((result.held_back for result in results), HeldBack()),
    )


def _achieved_share(results: list[LoadResult]) -> float | None:
    """Return the mean of the processes' shares, each weighing as its streams do; None of an open loop."""
    told = [(r.achieved_share, streams_of(r.clients)) for r in results]
    known = [(share, streams) for share, streams in told if share is not None]
    return math.fsum(share * streams for share, streams in known) / sum(n for _, n in known) if known else None
