"""One level over several load processes: its plan split, their start together, their results merged.

Used by `workers.session`, which hands the parts to whoever runs them at once (Ray tasks on the node, or processes).
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from workers.load.ending import REQUESTS
from workers.load.plan import LoadPlan, LoadResult
from workers.load.start_line import StartLine

STREAMS_PER_PROCESS = 256
"""One process carried 512 streams of 100 tokens a second at 99 % of the ideal load (benchmarks/client); half of it is
left for burstier servers and slower cores."""


class LoadLost(Exception):
    """A load process ended before its part of the level: raised by whoever runs the parts."""


def processes_for(concurrency: int, free_cores: int) -> int:
    """Return how many processes a level should have: one for `STREAMS_PER_PROCESS` streams, no more than free cores."""
    return max(1, min(math.ceil(concurrency / STREAMS_PER_PROCESS), free_cores, concurrency))


def split(plan: LoadPlan, processes: int, directory: Path | None = None) -> list[LoadPlan]:
    """Return `processes` plans that together send what `plan` would: streams and requests divided, ordinals kept apart.
    An open loop's arrivals are dealt out in turn.

    With several, each keeps to cores of its own where there are enough, and all start together, through `directory`
    (empty, on the node that they run on).

    Raises:
        ValueError: fewer streams than processes, or no directory for several.
    """
    if processes == 1:
        return [plan]
    streams = min(plan.concurrency, plan.num_requests)
    if streams < processes or directory is None:
        raise ValueError(f"{streams} streams cannot be divided among {processes} processes")
    shares = [len(range(index, streams, processes)) for index in range(processes)]
    stop = plan.stop and replace(plan.stop, least=math.ceil(plan.stop.least / processes))
    parts, ordinal, requests_left, streams_left = [], plan.first_ordinal, plan.num_requests, streams
    for index, share in enumerate(shares):
        due_s = plan.due_s[index::processes]
        requests = len(due_s) or round(requests_left * share / streams_left)
        cores = plan.cores[index::processes] if len(plan.cores) >= processes else plan.cores
        line = StartLine(str(directory), processes, index)
        ahead = plan.offset + ordinal - plan.first_ordinal
        parts.append(
            replace(
                plan, concurrency=share, num_requests=requests, first_ordinal=ordinal, offset=ahead, due_s=due_s,
                stop=stop, cores=cores, start=line,
            )
        )  # fmt: skip
        ordinal, requests_left, streams_left = ordinal + requests, requests_left - requests, streams_left - share
    return parts


def merge(results: list[LoadResult]) -> LoadResult:
    """Return the results of one level's processes as one: times from the first start, every row kept."""
    first = min(results, key=lambda result: result.started_monotonic_s)
    for result in results:
        late_s = result.started_monotonic_s - first.started_monotonic_s
        for row in result.requests:
            row.sent_s += late_s
            row.due_s = None if row.due_s is None else row.due_s + late_s
    end_s = max(result.started_monotonic_s + result.duration_s for result in results)
    return LoadResult(
        sorted((row for result in results for row in result.requests), key=lambda row: row.ordinal),
        end_s - first.started_monotonic_s,
        first.started_monotonic_s,
        first.started_wall_s,
        [client for result in results for client in result.clients],
        next((result.stopped_by for result in results if result.stopped_by != REQUESTS), REQUESTS),
        sum(result.judging_cpu_s for result in results),
    )
