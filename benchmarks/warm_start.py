"""Cold and warm starts in turns on one card, or the CPU build: how long until ready, and whether anything else differs.

    python benchmarks/warm_start.py [OVERRIDE...] [--model tiny] [--lengths 512 1024] [--rounds 3] [--levels 1 16 64]

Each round starts a server of each length once each way; the order of the two alternates. Of each it takes the seconds
to ready and where they went, memory, and the configuration that the server says it has (`/server_info`); with
`--levels` also tok/s and p95 on the longest server. OVERRIDEs are Hydra's, as of `python -m orchestrator`.

Prints medians and their ratio; the keys of the configuration that differ, less paths and names made for one server;
differences of memory between lengths; and for each level the 90 % interval of warm over cold, which is inside
1 ± `--within` where two one-sided t-tests (TOST, Schuirmann 1987) at 5 % each say that the two are equivalent. Noise is
pooled over levels and both ways. The machine should have nothing else to do: the load average is printed.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import psutil

from analysis.intervals import mean_log, pooled_noise
from contract.rows import MEASURED
from contract.specs import Point, PointKind, Purpose, SessionSpec, Start
from orchestrator.compose import compose
from orchestrator.fleet import local_fleet
from orchestrator.models import resolve
from orchestrator.plan import make_plan
from workers import probe, processes
from workers.engines import make_engine
from workers.launch.warm import WarmParent, offer, parent_for
from workers.load.client import generate
from workers.load.plan import LoadPlan, LoadResult
from workers.session import Session

MIB = 2**20
TAIL = 0.05
"""Of each of the two tests."""
OF_ONE_SERVER = ("instance_id", "VLLM_OBJECT_STORAGE_SHM_BUFFER_NAME")
"""Names in the configuration that are made anew for every server."""
OF_FORKING = ("VLLM_WORKER_MULTIPROC_METHOD",)
"""What differs by intent: how a server makes its processes."""


@dataclass
class Seen:
    """What the servers of one length that were started one way have shown."""

    ready_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    """Spent by the server's processes until then: what a busy machine changes least."""
    phases_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    memory_bytes: list[int] = field(default_factory=list)
    configuration: dict[str, str] = field(default_factory=dict)
    levels: dict[tuple[int, str], list[float]] = field(default_factory=lambda: defaultdict(list))


def main() -> None:
    """Run and print."""
    options = _options()
    specs = _specs(options)
    parent = parent_for(make_engine("vllm"), specs[0], os.environ.get("OMP_NUM_THREADS"))
    seen: dict[tuple[int, Start], Seen] = defaultdict(Seen)
    try:
        offer(parent.socket, lambda: False).close()
        for number in range(options.rounds):
            for spec in specs:
                for start in (Start.COLD, Start.WARM) if number % 2 == 0 else (Start.WARM, Start.COLD):
                    levels = options.levels if spec is specs[-1] else []
                    _start(replace(spec, start=start), parent, number, levels, seen[spec.server.max_model_len, start])
    finally:
        parent.close()
    for spec in specs:
        _compare(spec.server.max_model_len, *(seen[spec.server.max_model_len, start] for start in Start))
    for shorter, longer in pairwise(specs):
        _compare_growth(shorter.server.max_model_len, longer.server.max_model_len, seen)
    if options.levels:
        _compare_levels(*(seen[specs[-1].server.max_model_len, start] for start in Start), options.within)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    parser.add_argument("--model", default="tiny", help="a shape of conf/model")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024], help="max_model_len, ascending")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--levels", type=int, nargs="*", default=[], help="concurrency; none: no load")
    parser.add_argument("--within", type=float, default=0.05, help="what counts as no difference of tok/s and p95")
    return parser.parse_args()


def _specs(options: argparse.Namespace) -> list[SessionSpec]:
    lengths = ",".join(map(str, options.lengths))
    asked = [f"model={options.model}", "+sweep=kv", f"sweep.max_model_len=[{lengths}]", "sweep.modes=[committed]"]
    (experiment,) = compose([*asked, *options.overrides], [])
    fleet = local_fleet(experiment.cluster, experiment.engine)
    return list(make_plan([(experiment, resolve(experiment.model))], fleet).sessions)


def _start(spec: SessionSpec, parent: WarmParent, number: int, levels: list[int], seen: Seen) -> None:
    """Start one server, read it, send the levels, stop it."""
    cards = [str(card) for card in range(spec.gpus)]
    session = Session(spec, "bench", 1, cards, _generate, os.environ.get("OMP_NUM_THREADS"), parent.socket)
    try:
        row = session.start()
        if row.status != MEASURED or row.start != spec.start:
            sys.exit(f"no {spec.start} start: {row.failure_message or row.start_reason}")
        assert row.ready_s is not None
        seen.ready_s.append(row.ready_s)
        seen.cpu_s.append(_cpu_s(row.server_pid or 0))
        for phase in row.phases:
            seen.phases_s[phase.name].append(phase.seconds)
        seen.configuration = _configuration(session)
        memory = session.measure(next(point for point in spec.points if point.kind is PointKind.MEMORY))
        seen.memory_bytes.append(memory.mem_ready_bytes or 0)
        for level in levels:
            found = session.measure(_level(level, number))
            print(f"  {level:3}: {found.tok_s:.1f} tok/s, p95 {found.p95_e2e_s:.3f} s, {found.status}")
            seen.levels[level, "tok/s"].append(found.tok_s or math.nan)
            seen.levels[level, "p95"].append(found.p95_e2e_s or math.nan)
    finally:
        session.stop()
    load = os.getloadavg()[0]
    print(f"{spec.start} {spec.server.max_model_len:6}: ready in {row.ready_s:5.1f} s, load {load:.1f}", flush=True)


def _cpu_s(pid: int) -> float:
    """Of a process's tree, children that have ended among it (the four times of psutil's cpu_times)."""
    return sum(sum(psutil.Process(member).cpu_times()[:4]) for member in processes.tree(pid))


def _level(concurrency: int, number: int) -> Point:
    return Point(
        f"c{concurrency}-{number}", PointKind.LOAD, Purpose.CONCURRENCY, "bench", concurrency,
        max(24, 4 * concurrency), 128, 32, warmup_requests=concurrency, repeat=number,
    )  # fmt: skip


def _generate(plans: list[LoadPlan]) -> list[LoadResult]:
    """In processes of their own: a load process binds itself to cores, which servers must not inherit."""
    with ProcessPoolExecutor(len(plans), multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(generate, plans))


def _configuration(session: Session) -> dict[str, str]:
    """What the server says it resolved, by path; its private directory by a word. Empty without developer mode."""
    assert session._endpoint is not None
    _, body = probe.get(session._endpoint, "/server_info?config_format=json", timeout_s=60)
    named = body.replace(str(session._workspace.root), "<session>")
    told = json.loads(named)
    return dict(_flat({"config": told.get("vllm_config"), "env": told.get("vllm_env")}))


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if pairs is None:
        yield path, str(value)
        return
    for name, item in pairs:
        yield from _flat(item, f"{path}.{name}")


def _compare(length: int, cold: Seen, warm: Seen) -> None:
    medians = [statistics.median(seen.ready_s) for seen in (cold, warm)]
    print(
        f"max_model_len {length}: ready in {medians[0]:.1f} s cold and {medians[1]:.1f} s warm "
        f"(medians of {len(cold.ready_s)}), ratio {medians[1] / medians[0]:.3f}"
    )
    busy = [statistics.median(seen.cpu_s) for seen in (cold, warm)]
    print(f"  CPU seconds of its processes until then: {busy[0]:.1f} and {busy[1]:.1f}, ratio {busy[1] / busy[0]:.3f}")
    for way, seen in (("cold", cold), ("warm", warm)):
        parts = ", ".join(f"{name} {statistics.median(seconds):.1f}" for name, seconds in seen.phases_s.items())
        print(f"  {way}: {parts}")
    keys = sorted(cold.configuration.keys() | warm.configuration.keys())
    different = [key for key in keys if cold.configuration.get(key) != warm.configuration.get(key)]
    unexpected = [key for key in different if not key.endswith((*OF_ONE_SERVER, *OF_FORKING))]
    print(f"  configuration: {len(keys)} keys, {len(unexpected)} differ unexpectedly {unexpected or ''}")


def _compare_growth(shorter: int, longer: int, seen: dict[tuple[int, Start], Seen]) -> None:
    cold, warm = (
        statistics.median(seen[longer, start].memory_bytes) - statistics.median(seen[shorter, start].memory_bytes)
        for start in Start
    )
    print(
        f"memory, {shorter} to {longer}: {cold / MIB:+.1f} MiB cold, {warm / MIB:+.1f} MiB warm, "
        f"{abs(warm - cold) / MIB:.1f} MiB apart"
    )


def _compare_levels(cold: Seen, warm: Seen, within: float) -> None:
    for metric in ("tok/s", "p95"):
        keys = [key for key in cold.levels if key[1] == metric]
        noise = pooled_noise(seen.levels[key] for key in keys for seen in (cold, warm))
        if noise is None:
            sys.exit("one round tells nothing of noise")
        print(f"{metric}: one repeat scatters by {noise.sd:.1%} ({noise.df} degrees of freedom)")
        for key in keys:
            apart = mean_log(warm.levels[key]) - mean_log(cold.levels[key])
            margin = noise.margin(1 / len(warm.levels[key]) + 1 / len(cold.levels[key]), TAIL)
            low, high = math.exp(apart - margin), math.exp(apart + margin)
            verdict = "equivalent" if 1 - within <= low and high <= 1 + within else "not shown to be equivalent"
            print(f"  {key[0]:3}: warm / cold {math.exp(apart):.3f}, 90 % {low:.3f} to {high:.3f}: {verdict}")


if __name__ == "__main__":
    main()
