"""Kills over the whole start of real vLLM, and beyond: the rounds of `benchmarks/warm_kills.py --engine vllm`.

A round is a session in a process of its own, as an actor's is (`benchmarks/killed_session.py`). Everything makes its
temporary files in one directory of this benchmark's, so that whatever is left is seen there, whoever has made it.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import resource_tracker
from pathlib import Path

from benchmarks.killing import Size
from benchmarks.vllm_round import LEFT_LIMIT_S, LIMIT_S, PATIENCE_S, Plan, Round, VllmFound
from benchmarks.warm_start import planned
from contract.specs import SessionSpec, Start
from workers import processes
from workers.engines import make_engine
from workers.launch.warm import WarmParent, offer, parent_for

VICTIMS = {"nobody": 2, "server": 5, "descendant": 6, "guard": 4, "owner": 4}
"""And how often each is drawn. `parent` has rounds of its own, at the end: who is killed cannot grow for long."""
TO_BEGIN_WITH = 2
"""Rounds to nobody, which tell how long a start takes here."""
PARENTS_SHARE = 1 / 25
WAYS = {(signal.SIGKILL,): 3, (signal.SIGTERM,): 3, (signal.SIGSTOP, signal.SIGKILL): 1, (signal.SIGSTOP,): 1}
"""And how often each is drawn. A guard that is stopped and not killed takes a session 13 s."""
STOP_GRACE_S = 3.0
PROGRESS_ROUNDS = 10
MIB = 2**20


def plans(rounds: int, chance: random.Random) -> list[Plan]:
    """Draw the rounds: some to nobody first, those that kill the parent last, every other one of these in the fork."""
    parents = max(1, round(rounds * PARENTS_SHARE))
    victims = chance.choices(list(VICTIMS), list(VICTIMS.values()), k=rounds - parents)
    victims[:TO_BEGIN_WITH] = ["nobody"] * min(TO_BEGIN_WITH, len(victims))
    drawn = []
    for number, victim in enumerate([*victims, *["parent"] * parents]):
        (ways,) = chance.choices(list(WAYS), list(WAYS.values()))
        if victim in ("owner", "parent") and signal.SIGSTOP in ways:
            ways = (signal.SIGSTOP, signal.SIGKILL)  # nobody would ever end one that is only stopped
        in_fork = victim == "parent" and number % 2 == 0
        drawn.append(Plan(victim, chance.random(), ways, chance.random(), in_fork))
    return drawn


def kill_often(rounds: int, seed: int = 0) -> VllmFound:
    """Start `rounds` servers. Ctrl-C ends it with what was seen."""
    (spec,) = planned("tiny", [512], [], [])
    spec = replace(spec, start=Start.WARM, timeouts=replace(spec.timeouts, stop_grace_s=STOP_GRACE_S))
    found, begun = VllmFound(), time.monotonic()
    resource_tracker.ensure_running()  # of this process's own: what works in the directory is to be of the rounds
    with _place() as place:
        parent = _imported(spec)
        try:
            for number, plan in enumerate(plans(rounds, random.Random(seed)), start=1):
                if not processes.is_running(parent.pid):
                    parent = _another(parent, spec, found)
                Round(plan, spec, parent, place, found).play()
                if plan.victim != "parent":
                    found.sizes.append(Size.of(parent.pid))  # OSError where it died, whom nobody had struck
                if number % PROGRESS_ROUNDS == 0 or number == rounds:
                    print(f"{number:4} rounds in {time.monotonic() - begun:5.0f} s: {_so_far(found)}", flush=True)
        except KeyboardInterrupt:
            print(f"interrupted in round {found.rounds} of {rounds}", flush=True)
        finally:
            parent.close()
        found.directories += len(list(place.iterdir()))
    if found.sizes:
        first, last = found.sizes[len(found.sizes) // 10], found.sizes[-1]
        found.descriptors_gained = last.descriptors - first.descriptors
        found.resident_gained_bytes = last.resident_bytes - first.resident_bytes
    return found


def _so_far(found: VllmFound) -> str:
    size = f"{found.sizes[-1].resident_bytes / MIB:.1f} MiB, {found.sizes[-1].descriptors} fds" if found.sizes else ""
    return f"{found.answered} answered, {found.noticed} noticed, {found.bad} bad, parent {size}"


def report(found: VllmFound) -> None:
    """Print what only real vLLM shows; the rest is as of the stand-in."""
    print(f"a start that nobody disturbed took {found.usual_s:.1f} s to ready (median of {len(found.ready_s)})")
    print(f"{found.answered} servers answered; {found.failed} starts came to nothing without a cause")
    print(f"{found.noticed} sessions ended by themselves, {found.told} were told to ({PATIENCE_S} s after a signal)")
    print(f"first signals by phase of the start: {_counted(found.phases)}; descendants: {_counted(found.kinds)}")
    limits = f"limits {LIMIT_S:.0f} s for the session and {LEFT_LIMIT_S:.0f} s for the rest"
    print(f"all was gone {found.longest_end_s:.1f} s after the last signal at the latest ({limits})")
    print(f"{found.ports_left} ports left open")
    first = found.sizes[len(found.sizes) // 10]
    for name, sizes in {
        "descriptors": [each.descriptors for each in found.sizes],
        "resident MiB": [each.resident_bytes / MIB for each in found.sizes],
        "proportional MiB": [each.proportional_bytes / MIB for each in found.sizes],
    }.items():
        after = sizes[found.sizes.index(first) :]
        print(f"the parent of {len(sizes)} rounds, {name}: {after[0]:.1f} at first, {after[-1]:.1f} at last,", end=" ")
        print(f"{min(after):.1f} to {max(after):.1f} between")


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(counter.items())) or "none"


@contextmanager
def _place() -> Iterator[Path]:
    """Make the directory that is TMPDIR of all that is started here, and of this process."""
    place, before = Path(tempfile.mkdtemp(prefix="vk-", dir="/tmp")), os.environ.get("TMPDIR")
    os.environ["TMPDIR"], tempfile.tempdir = str(place), str(place)
    try:
        yield place
    finally:
        tempfile.tempdir = None
        del os.environ["TMPDIR"]
        if before is not None:
            os.environ["TMPDIR"] = before
        shutil.rmtree(place, ignore_errors=True)


def _imported(spec: SessionSpec) -> WarmParent:
    """Start a parent and wait until it can fork."""
    parent = parent_for(make_engine("vllm"), spec, os.environ.get("OMP_NUM_THREADS"))
    try:
        offer(parent.socket, lambda: False).close()
    except BaseException:
        parent.close()
        raise
    return parent


def _another(dead: WarmParent, spec: SessionSpec, found: VllmFound) -> WarmParent:
    """Start a parent in place of one that was killed, whose directory goes with its owner's hold on it."""
    dead.close()
    found.directories += dead.socket.parent.exists()
    return _imported(spec)
