"""Cold and warm starts in turns on one card, or the CPU build: how long until ready, and whether anything else differs.

    python benchmarks/warm_start.py [OVERRIDE...] [--model tiny] [--lengths 512 1024] [--rounds 3] [--levels 1 16 64]
        [--repeats 3] [--side-by-side] [--save FILE]
    python benchmarks/warm_start.py --read FILE...

First a server of each length is started cold and thrown away, for it may have to compile. Each round then starts a
server of each length once each way; the order of the two alternates. A round has a warm parent of its own, as a run
has: what chance gives all forks of one import alike (where its memory lies, the seed of its hashes) is the round's. Of
each it takes the seconds to ready and where they went, memory, and the configuration that the server says it has
(`/server_info`); with `--levels` also tok/s and p95 on the longest server, each level `--repeats` times, of which the
mean counts as one. With `--side-by-side` the longest servers of all rounds stay up on that card, and are sent the
levels in turns afterwards, in an order that chance gives anew each time: what the machine does in one minute and not in
the next is in all of them alike, and they are minutes old, not seconds. Where not all fit, whole rounds of those that
do. A level of which some requests would wait for others is refused, with what to set. OVERRIDEs are Hydra's, as of
`python -m orchestrator`; servers are those of its committed mode, eager without `server.enforce_eager=false`. Ctrl-C
ends it with what is there, of turns with whole ones. `--save` writes what each server has shown as soon as it is
stopped, side by side after each turn; `--read` starts nothing and pools such files, of the same arguments on machines
of one kind, each round with its own two servers.

Prints how the servers ran (eager or with CUDA graphs, `max_num_seqs`: their own words); medians and their ratio; the
keys of the configuration that differ among all rounds of both ways, less paths and names made for one server, which
must differ; the least and the most memory at each length, when ready and after a load, and its growth between lengths;
and for each level the 90 % interval of warm over cold. Where it is inside what one repeat on one cold server scatters
by (a standard deviation either way; of its own level where levels scatter differently; side by side about the mean of
each turn), and inside 10 % where that is less, two one-sided t-tests (TOST, Schuirmann 1987) at 5 % each say that the
two are equivalent. Noise is that of whole servers at that level. Simulated, of one metric at three levels: a difference
as large as the margin passes at a level in 5 to 8 of a hundred runs (the margin is an estimate, too); two ways that do
not differ pass at all levels in nine of ten with 12 rounds of 3 repeats, or 8 of 5, where servers are all alike, in
four or five of ten where they differ by half of what a repeat scatters by, and hardly ever with 4 rounds. The same
verdict at a fixed share (`--within`) stands beside it and decides nothing. The ratio of the two ways' variances is
printed, too; one beyond chance (5 % for all of them together) is a difference.

Memory of cards, the least and the most of either way in one go, may be `--memory-within-mib` apart when ready. After a
load it differs from one cold server to the next by what torch keeps: there the two ways may be as far apart as two cold
servers of one go and length were, at any length, if that is more. Simulated, of servers that do not differ, of which
one in ten keeps 80 MiB and three in twenty 16: at four lengths 22 of a hundred runs of 3 rounds fail, 9 of 5, 3 of 8.
Of the CPU backend the median growth when ready decides: its shared pages count differently.

The machine should have nothing else to do: the load average is printed. One with cards of several kinds is refused: no
run forks there. Exit code 1 where the two ways are not shown to be equivalent: in the configuration, in memory, at a
level, or where a level or a memory reading is no measurement, or a server did not start.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.warm_equivalence import MIB, Go, Level, Memory, Server, Setting, differing, read, save, verdict
from contract.rows import MEASURED, PointRow, SessionRow
from contract.specs import Point, PointKind, Purpose, SessionSpec, Start
from orchestrator import sizing
from orchestrator.compose import compose
from orchestrator.fleet import Fleet, local_fleet
from orchestrator.models import resolve
from orchestrator.plan import make_plan
from workers import probe, processes
from workers.devices.nvml import kinds_of_cards, visible_cards
from workers.engines import make_engine
from workers.launch.warm import NotWarm, offer, parent_for
from workers.load.client import generate
from workers.load.plan import LoadPlan, LoadResult
from workers.session import Session

PROMPT_TOKENS, OUTPUT_TOKENS = 128, 32


def main() -> int:
    """Run, or read what was run before, and print. Returns the exit code."""
    options = _options()
    try:
        goes = [read(path) for path in options.read] if options.read else [_go(options)]
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    if apart := differing(goes):
        sys.exit(f"not of one kind, so not to be pooled: {', '.join(apart)}")
    return verdict(goes, options.within, options.memory_within_mib * MIB)


class NotStarted(Exception):
    """Why a server is not up, or not in the way that was asked for."""


def _go(options: argparse.Namespace) -> Go:
    if len(kinds := kinds_of_cards()) > 1:
        raise ValueError(f"no run forks on a machine whose cards are of several kinds: {', '.join(kinds)}")
    specs = planned(options.model, options.lengths, options.levels, options.overrides)
    if options.side_by_side and specs[0].device == "cpu" and len(specs) > 1:
        raise ValueError("--side-by-side: one length on the CPU backend, where a server's memory counts its neighbours")
    go = Go(
        Setting(
            options.model, options.overrides, specs[0].device, options.lengths, options.levels, options.repeats,
            options.side_by_side,
        )
    )  # fmt: skip
    try:
        with contextlib.ExitStack() as up:
            if staying := _rounds(go, specs, options, up):
                for _ in _turns(go, staying):
                    _save(go, options.save)
    except KeyboardInterrupt:  # of turns the last whole one is there
        print("interrupted: what follows is of what was there")
    return go


def _rounds(go: Go, specs: list[SessionSpec], options: argparse.Namespace, up: contextlib.ExitStack) -> list[Running]:
    """Start the servers of all rounds. Returns those that stay up, of whole rounds; `up` stops them."""
    staying: list[Running] = []
    number = 0
    try:
        for spec in specs:  # else the first round's cold servers compile, and those after them do not
            first = _start(replace(spec, start=Start.COLD), None, -1, [])
            print(f"  the one that compiled, if it had to: thrown away, ready in {first.ready_s:.1f} s", flush=True)
        for number in range(options.rounds):
            with _warm_parent(specs[0]) as parent, contextlib.ExitStack() as of_round:
                staying += _round(go, specs, options, number, parent, of_round)
                up.enter_context(of_round.pop_all())
    except NotStarted as error:  # what is there is kept
        print(f"a server did not start in round {number + 1} of {options.rounds}: {error}")
        go.complete = False
        _save(go, options.save)
    except NotWarm as error:
        print(f"no warm parent in round {number + 1} of {options.rounds}: {error}")
    except KeyboardInterrupt:
        print(f"interrupted in round {number + 1} of {options.rounds}")
        return []
    return staying


def _round(
    go: Go,
    specs: list[SessionSpec],
    options: argparse.Namespace,
    number: int,
    parent: Path,
    up: contextlib.ExitStack,
) -> list[Running]:
    """Start a server of each length both ways. Returns those that stay up."""
    staying: list[Running] = []
    for spec in specs:
        longest = spec is specs[-1]
        for start in order(number):
            asked = replace(spec, start=start)
            if options.side_by_side and longest:
                staying.append(up.enter_context(_running(asked, parent, number)))
                up.callback(staying[-1].session.hurry)  # others hold the card: it is not free in the end
                go.servers.append(staying[-1].server)
            else:
                go.servers.append(_start(asked, parent, number, options.levels * options.repeats if longest else []))
            _save(go, options.save)
    return staying


def _save(go: Go, path: Path | None) -> None:
    if path is not None:
        save(go, path)


def _turns(go: Go, servers: list[Running]) -> Iterator[None]:
    """Send the levels to servers that are all up, and yield after each turn; only whole ones are kept."""
    chance = random.Random()
    for turn in range(go.setting.repeats):
        found: list[list[Level]] = [[] for _ in servers]
        for level in go.setting.levels:
            for at in chance.sample(range(len(servers)), len(servers)):
                found[at].append(servers[at].measured(level, len(found[at])))
        for each, its in zip(servers, found, strict=True):
            each.server.levels.extend(its)
        go.setting = replace(go.setting, repeats=turn + 1)
        yield


@contextlib.contextmanager
def _warm_parent(spec: SessionSpec) -> Iterator[Path]:
    """The socket of one that has imported, and so takes no core from what is measured. Raises `NotWarm`."""
    try:
        parent = parent_for(make_engine("vllm"), spec, os.environ.get("OMP_NUM_THREADS"))
    except (RuntimeError, OSError, psutil.NoSuchProcess) as error:
        raise NotWarm(str(error)) from None
    try:
        offer(parent.socket, lambda: False).close()
        yield parent.socket
    finally:
        parent.close()


def order(number: int) -> tuple[Start, Start]:
    """Return which way goes first in a round: in turns (ABBA), so that a drift of the machine favours neither."""
    return (Start.COLD, Start.WARM) if number % 2 == 0 else (Start.WARM, Start.COLD)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    parser.add_argument("--model", default="tiny", help="a shape of conf/model")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024], help="max_model_len, ascending")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--levels", type=int, nargs="*", default=[], help="concurrency; none: no load")
    parser.add_argument("--repeats", type=int, default=3, help="of each level on one server, at least 2")
    parser.add_argument("--side-by-side", action="store_true", help="levels in turns on servers that are all up")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write what was seen, as JSON")
    parser.add_argument("--read", type=Path, nargs="+", metavar="FILE", help="start nothing: pool what was saved")
    parser.add_argument("--within", type=float, default=0.05, help="share of tok/s and p95 to print a verdict at, too")
    parser.add_argument("--memory-within-mib", type=float, default=2.0, help="that counts as no difference when ready")
    options = parser.parse_args()
    if options.lengths != sorted(set(options.lengths)):
        parser.error("--lengths must ascend: the longest has the load")
    if len(set(options.levels)) < len(options.levels):
        parser.error("--levels: each once; --repeats says how often it is sent")
    if options.levels and options.repeats < 2:
        parser.error("--repeats must be at least 2: only repeats on one server tell what one scatters by")
    if options.side_by_side and not options.levels:
        parser.error("--side-by-side is for load: name --levels")
    if options.save is not None and options.save.exists():
        parser.error(f"--save {options.save} is there already")
    return options


def planned(model: str, lengths: list[int], levels: list[int], overrides: list[str]) -> list[SessionSpec]:
    """Return the servers of a committed sweep, as a run plans them. Raises ValueError where levels would wait."""
    sizes = ",".join(map(str, lengths))
    asked = [f"model={model}", "+sweep=kv", f"sweep.max_model_len=[{sizes}]", "sweep.modes=[committed]"]
    (experiment,) = compose([*asked, *overrides], [])
    fleet = local_fleet(experiment.cluster, experiment.engine)
    specs = list(make_plan([(experiment, resolve(experiment.model))], fleet).sessions)
    if problem := crowded(max(levels, default=0), specs[-1], fleet):
        raise ValueError(problem)
    return specs


def crowded(level: int, spec: SessionSpec, fleet: Fleet) -> str | None:
    """Return why some of a level's requests would wait for others, and what to set; None where all run at once.

    Of a server whose number of sequences or pool is left to vLLM neither is known before it runs.
    """
    seats, pool = spec.server.max_num_seqs, spec.server.kv_cache_memory_bytes
    if seats is not None and level > seats:
        return f"level {level}: the servers run {seats} requests at once: add server.max_num_seqs={level}"
    if pool is None:
        return None
    layout = sizing.layout(spec.model, spec.server, fleet)
    held = sizing.most_at_once(layout, layout.num_blocks(pool) - 1, PROMPT_TOKENS + OUTPUT_TOKENS, PROMPT_TOKENS)
    if level > held:
        return f"level {level}: the servers' KV pool holds {held} of its requests at once: add sweep.sequences={level}"
    return None


@dataclass(frozen=True, slots=True)
class Running:
    """A server that is up: its session, and what it has shown so far."""

    session: Session
    server: Server

    def measured(self, concurrency: int, number: int) -> Level:
        """Send a level; `number` tells it from others of this server that are not among `server.levels` yet."""
        return _measured(self.session, _level(concurrency, 1000 * self.server.round + len(self.server.levels) + number))


def _start(spec: SessionSpec, warm_parent: Path | None, number: int, levels: list[int]) -> Server:
    """Start one server, read it, send the levels, stop it."""
    with _running(spec, warm_parent, number) as running:
        for level in levels:
            running.server.levels.append(running.measured(level, 0))
    return running.server


@contextlib.contextmanager
def _running(spec: SessionSpec, warm_parent: Path | None, number: int) -> Iterator[Running]:
    """Start one server and read it; stop it in the end."""
    cards = [card.id for card in visible_cards()][: spec.gpus]
    # load processes of its own: one binds itself to cores, which servers must not inherit
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:

        def generate_all(plans: list[LoadPlan]) -> list[LoadResult]:
            return list(pool.map(generate, plans))

        session = Session(spec, "bench", 1, cards, generate_all, os.environ.get("OMP_NUM_THREADS"), warm_parent)
        try:
            row = session.start()
            if row.status != MEASURED or row.start != spec.start:
                raise NotStarted(f"no {spec.start} start: {row.failure_message or row.start_reason}")
            assert row.ready_s is not None
            cpu_s, configuration = _cpu_s(row.server_pid or 0), _configuration(session)
            memory = session.measure(next(point for point in spec.points if point.kind is PointKind.MEMORY))
            load = os.getloadavg()[0]
            length = spec.server.max_model_len
            print(f"{spec.start} {length:6}: ready in {row.ready_s:5.1f} s, load {load:.1f}", flush=True)
            if memory.status != MEASURED:
                print(f"  memory: {memory.status}: {memory.failure_message}", flush=True)
            phases = {phase.name: phase.seconds for phase in row.phases}
            yield Running(
                session,
                Server(
                    number, spec.start, length, _machine(row), row.ready_s, cpu_s, phases, configuration,
                    _memory(memory),
                ),
            )  # fmt: skip
        finally:
            session.stop()


def _memory(row: PointRow) -> Memory:
    """Of this server alone: others may be on its cards."""
    before = row.mem_baseline_bytes
    ready, loaded = (
        None if each is None or before is None else each - before
        for each in (row.mem_ready_bytes, row.mem_loaded_bytes)
    )
    return Memory(row.status, ready, loaded)


def _machine(row: SessionRow) -> str:
    versions = f"driver {row.driver_version}, vLLM {row.vllm_version}, torch {row.torch_version}"
    return f"{row.device_name}, {os.cpu_count()} cores, {versions}"


def _measured(session: Session, point: Point) -> Level:
    pid = session.row.server_pid or 0
    begun, cpu_s, faults = time.monotonic(), _cpu_s(pid), _faults(pid)
    row = session.measure(point)
    level = Level(point.concurrency, row.status, row.tok_s, row.p95_e2e_s)
    if level.measured:
        taken_s = time.monotonic() - begun
        clocks = [each.sm_clock_mhz for each in row.telemetry if each.sm_clock_mhz is not None]
        level = replace(
            level, ttft_ms=_ms(row.p50_ttft_s), tpot_ms=_ms(row.p50_tpot_s), cores=(_cpu_s(pid) - cpu_s) / taken_s,
            faults_per_s=(_faults(pid) - faults) / taken_s, huge_mib=_huge_mib(pid),
            sm_clock_mhz=fmean(clocks) if clocks else None,
        )  # fmt: skip
    said = f"{row.tok_s:.1f} tok/s, p95 {row.p95_e2e_s:.3f} s, " if level.has_figures else ""
    print(f"  {level.concurrency:3}: {said}{row.status} {row.failure_message or ''}".rstrip(), flush=True)
    return level


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def _cpu_s(pid: int) -> float:
    """Of a process's tree, children that have ended among it (the four times of psutil's cpu_times)."""
    spent = 0.0
    for member in processes.tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            spent += sum(psutil.Process(member).cpu_times()[:4])
    return spent


def _faults(pid: int) -> int:
    """Minor page faults of a process's tree (proc_pid_stat(5), field 10)."""
    found = 0
    for member in processes.tree(pid):
        with contextlib.suppress(OSError):  # it has ended
            found += int(Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()[7])
    return found


def _huge_mib(pid: int) -> float:
    """Of a process's tree: what the kernel has put on huge pages (AnonHugePages, proc_pid_smaps(5))."""
    found = 0
    for member in processes.tree(pid):
        with contextlib.suppress(OSError):  # it has ended
            lines = Path(f"/proc/{member}/smaps_rollup").read_text().splitlines()
            found += sum(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages:"))
    return found / 2**10


def _level(concurrency: int, number: int) -> Point:
    return Point(
        f"c{concurrency}-{number}", PointKind.LOAD, Purpose.CONCURRENCY, "bench", concurrency,
        max(48, 8 * concurrency), PROMPT_TOKENS, OUTPUT_TOKENS, warmup_requests=concurrency, repeat=number,
    )  # fmt: skip


def _configuration(session: Session) -> dict[str, str]:
    """What the server says it resolved, by path; its private directory and cards by a word. Empty without developer
    mode."""
    _, body = probe.get(session.endpoint, "/server_info?config_format=json", timeout_s=60)
    named = body.replace(str(session._workspace.root), "<session>")
    for card in session.row.device_ids:
        named = named.replace(card, "<card>")  # which of a machine's cards it was is no difference
    told = json.loads(named)
    return dict(_flat({"config": told.get("vllm_config"), "env": told.get("vllm_env")}))


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if pairs is None:
        yield path, str(value)
        return
    for name, item in pairs:
        yield from _flat(item, f"{path}.{name}")


if __name__ == "__main__":
    sys.exit(main())
