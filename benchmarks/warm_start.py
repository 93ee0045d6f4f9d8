"""Cold and warm starts in turns on one card, or the CPU build: how long until ready, and whether anything else differs.

    python benchmarks/warm_start.py [OVERRIDE...] [--model tiny] [--lengths 512 1024] [--rounds 3] [--levels 1 16 64]
        [--repeats 1]

Each round starts a server of each length once each way; the order of the two alternates. Of each it takes the seconds
to ready and where they went, memory, and the configuration that the server says it has (`/server_info`); with
`--levels` also tok/s and p95 on the longest server, each level `--repeats` times, of which the mean counts as one.
OVERRIDEs are Hydra's, as of `python -m orchestrator`. Ctrl-C ends it with what is there.

Prints medians and their ratio; the keys of the configuration that differ among all rounds of both ways, less paths and
names made for one server, which must differ; memory at each length and its growth between lengths; and for each level
the 90 % interval of warm over cold. Where it is inside what one repeat scatters by (a standard deviation either way),
two one-sided t-tests (TOST, Schuirmann 1987) at 5 % each say that the two are equivalent: less apart than two repeats
of one server are. `--within` asks for a fixed share instead. Noise is pooled over levels and both ways. The machine
should have nothing else to do: the load average is printed. Exit code 1 where the two ways are not shown to be
equivalent: in the configuration, in memory (of cards at each length, of the CPU backend its growth: its shared pages
count differently), or at a level.
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
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import psutil

from analysis.numbers.intervals import mean_log, pooled_noise
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
    configurations: list[dict[str, str]] = field(default_factory=list)
    levels: dict[tuple[int, str], list[list[float]]] = field(default_factory=lambda: defaultdict(list))
    """By level and metric: of each server its repeats."""


def main() -> int:
    """Run and print. Returns the exit code."""
    options = _options()
    specs = _specs(options)
    parent = parent_for(make_engine("vllm"), specs[0], os.environ.get("OMP_NUM_THREADS"))
    seen: dict[tuple[int, Start], Seen] = defaultdict(Seen)
    number = 0
    try:
        offer(parent.socket, lambda: False).close()
        for number in range(options.rounds):
            for spec in specs:
                for start in order(number):
                    levels = options.levels * options.repeats if spec is specs[-1] else []
                    _start(replace(spec, start=start), parent, number, levels, seen[spec.server.max_model_len, start])
    except KeyboardInterrupt:
        print(f"interrupted in round {number + 1} of {options.rounds}")
    finally:
        parent.close()
    loaded = specs[-1].server.max_model_len if options.levels else None
    return verdict(seen, specs[0].device, options.within, options.memory_within_mib * MIB, loaded)


def order(number: int) -> tuple[Start, Start]:
    """Return which way goes first in a round: in turns (ABBA), so that a drift of the machine favours neither."""
    return (Start.COLD, Start.WARM) if number % 2 == 0 else (Start.WARM, Start.COLD)


def verdict(
    seen: dict[tuple[int, Start], Seen],
    device: str,
    within: float | None,
    memory_within_bytes: float,
    loaded: int | None,
) -> int:
    """Print what was seen, by length and way. Returns the exit code: 0 where the two ways are equivalent.

    `loaded` is the length whose servers had a load; None: none had. A length that has had servers of one way only, of a
    run that was interrupted, is not compared.
    """
    equivalent = []
    complete = {at for at, one in seen.items() if one.memory_bytes}
    lengths = sorted({length for length, _ in complete if all((length, start) in complete for start in order(0))})
    if not lengths:
        print("no length has had servers of both ways: nothing to compare")
        return 1
    for length in lengths:
        cold, warm = seen[length, Start.COLD], seen[length, Start.WARM]
        _compare_starts(length, cold, warm)
        equivalent.append(_compare_configurations([*cold.configurations, *warm.configurations]))
        same = _compare_memory(f"at {length}", cold.memory_bytes, warm.memory_bytes, memory_within_bytes)
        equivalent.append(same or device == "cpu")
    for pair in pairwise(lengths):
        grown = [_growth(*(seen[length, start] for length in pair)) for start in order(0)]
        equivalent.append(_compare_memory(f"{pair[0]} to {pair[1]}", *grown, memory_within_bytes))
    if loaded is not None and loaded not in lengths:
        print(f"no load was compared: none ended both ways at {loaded}")
        equivalent.append(False)
    elif loaded is not None:
        equivalent.append(_compare_levels(seen[loaded, Start.COLD], seen[loaded, Start.WARM], within))
    forked = [told for (_, start), each in seen.items() if start is Start.WARM for told in each.configurations]
    equivalent.append(_compare_names(forked))
    print("equivalent in all that was compared" if all(equivalent) else "NOT shown to be equivalent")
    return 0 if all(equivalent) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    parser.add_argument("--model", default="tiny", help="a shape of conf/model")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024], help="max_model_len, ascending")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--levels", type=int, nargs="*", default=[], help="concurrency; none: no load")
    parser.add_argument("--repeats", type=int, default=1, help="of each level on one server")
    parser.add_argument("--within", type=float, help="what counts as no difference of tok/s and p95, as a share")
    parser.add_argument("--memory-within-mib", type=float, default=2.0, help="the same of memory")
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
        seen.configurations.append(_configuration(session))
        memory = session.measure(next(point for point in spec.points if point.kind is PointKind.MEMORY))
        seen.memory_bytes.append(memory.mem_ready_bytes or 0)
        repeats: dict[tuple[int, str], list[float]] = defaultdict(list)
        for count, level in enumerate(levels):
            found = session.measure(_level(level, 1000 * number + count))
            print(f"  {level:3}: {found.tok_s:.1f} tok/s, p95 {found.p95_e2e_s:.3f} s, {found.status}", flush=True)
            repeats[level, "tok/s"].append(found.tok_s or math.nan)
            repeats[level, "p95"].append(found.p95_e2e_s or math.nan)
        for key, values in repeats.items():
            seen.levels[key].append(values)
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
        max(48, 8 * concurrency), 128, 32, warmup_requests=concurrency, repeat=number,
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


def _compare_starts(length: int, cold: Seen, warm: Seen) -> None:
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


def unexpected_keys(configurations: Sequence[dict[str, str]]) -> list[str]:
    """Return the keys in which any two servers of one length differ, less those that are meant to."""
    keys = sorted({key for configuration in configurations for key in configuration})
    different = [key for key in keys if len({configuration.get(key) for configuration in configurations}) > 1]
    return [key for key in different if not key.endswith((*OF_ONE_SERVER, *OF_FORKING))]


def shared_names(configurations: Sequence[dict[str, str]]) -> list[str]:
    """Return the names made for one server that two servers have in common."""
    keys = sorted({key for configuration in configurations for key in configuration if key.endswith(OF_ONE_SERVER)})
    named = {key: [configuration[key] for configuration in configurations if key in configuration] for key in keys}
    return [key for key, values in named.items() if len(set(values)) < len(values)]


def _compare_configurations(configurations: Sequence[dict[str, str]]) -> bool:
    """Of all servers of a length, both ways. One that told nothing shows nothing."""
    unexpected = unexpected_keys(configurations)
    told = min(len(configuration) for configuration in configurations)
    print(f"  configuration: {told} keys, {len(unexpected)} differ unexpectedly {unexpected or ''}")
    return told > 0 and not unexpected


def _compare_names(warm: Sequence[dict[str, str]]) -> bool:
    shared = shared_names(warm)
    print(f"names made for one server: {len(shared)} are the same in two of {len(warm)} warm ones {shared or ''}")
    return not shared


def _growth(shorter: Seen, longer: Seen) -> list[float]:
    """Of memory between two lengths, round by round; the last may have been interrupted between them."""
    return [b - a for a, b in zip(shorter.memory_bytes, longer.memory_bytes, strict=False)]


def _compare_memory(what: str, cold: Iterable[float], warm: Iterable[float], within: float) -> bool:
    medians = statistics.median(cold), statistics.median(warm)
    apart = medians[1] - medians[0]
    print(
        f"memory, {what}: {medians[0] / MIB:.1f} MiB cold, {medians[1] / MIB:.1f} MiB warm, "
        f"warm minus cold {apart / MIB:+.1f} MiB"
    )
    return abs(apart) <= within


def _compare_levels(cold: Seen, warm: Seen, within: float | None) -> bool:
    equivalent = []
    for metric in ("tok/s", "p95"):
        keys = [key for key in cold.levels if key[1] == metric]
        every = [seen.levels[key] for key in keys for seen in (cold, warm)]
        repeats = pooled_noise([value for server in servers for value in server] for servers in every)
        servers = pooled_noise(_means(servers) for servers in every)
        if repeats is None or servers is None:
            sys.exit("one round tells nothing of noise")
        bound = math.log1p(within) if within is not None else repeats.sd
        print(
            f"{metric}: one repeat scatters by {repeats.sd:.1%}, the mean of one server by {servers.sd:.1%} "
            f"({servers.df} degrees of freedom); equivalent within {math.exp(-bound):.3f} to {math.exp(bound):.3f}"
        )
        for key in keys:
            ones, others = _means(warm.levels[key]), _means(cold.levels[key])
            apart = mean_log(ones) - mean_log(others)
            margin = servers.margin(1 / len(ones) + 1 / len(others), TAIL)
            equivalent.append(abs(apart) + margin <= bound)
            verdict = "equivalent" if equivalent[-1] else "not shown to be equivalent"
            low, high = math.exp(apart - margin), math.exp(apart + margin)
            print(f"  {key[0]:3}: warm / cold {math.exp(apart):.3f}, 90 % {low:.3f} to {high:.3f}: {verdict}")
    return all(equivalent)


def _means(servers: Sequence[Sequence[float]]) -> list[float]:
    """Geometric, of each server's repeats: what servers differ by is told by servers, however often each is asked."""
    return [math.exp(mean_log(server)) for server in servers]


if __name__ == "__main__":
    sys.exit(main())
