"""Warm starts in a row, in each of which somebody is killed at a moment and in a way that chance picks.

    python benchmarks/warm_kills.py [ROUNDS] [--engine standin|vllm]

A signal (KILL or TERM, for some also STOP) goes to the server, to what it has started, its guard, the session that owns
both, or the warm parent, that one also in the middle of a fork; in some rounds to nobody. Processes, guard and warm
parent are the real ones. Prints to how many of each it went, how many starts hung, what was left of them (processes,
directories, files in /dev/shm), and how a warm parent that lives through it all has grown.

The engine is a stand-in that imports nothing heavy (`tests/standin_engine.py`) and lives 0.15 s at most; 200 rounds
take two minutes. Or it is real vLLM with a tiny shape, in real sessions (`benchmarks/warm_kills_vllm.py`): the moment
is anywhere in 1.2 times a usual start, and what a server has started is one process of its engine, worker and resource
tracker. A server that nobody strikes has to be ready and to answer a request, also where its parent is killed after the
fork, in the last 4 % of the rounds. A session that goes on cold is stopped there. Also printed are the phases of the
start that signals came in, ports left open, the limits for all this, and after every ten rounds where it is. 200 rounds
should take about 20 minutes on the CPU build (20 took 116 s on two cores); Ctrl-C ends it with what there is.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import warm_kills_vllm
from benchmarks.killing import Found, Size, strike
from benchmarks.vllm_round import VllmFound
from workers import processes
from workers.launch.guard import SHARED_MEMORY
from workers.launch.process import ServerProcess
from workers.launch.warm import NotWarm, WarmParent, offer
from workers.launch.workspace import Workspace

ROOT = Path(__file__).resolve().parent.parent
MODULE = "tests.standin_engine"
VICTIMS = ("nobody", "server", "descendants", "guard", "owner", "parent")
GRACE_S = 0.2
END_LIMIT_S = 20.0
LONGEST_LIFE_S = 0.15
LONGEST_FORK_S = 0.03
"""About what a fork takes, from the request to the server's pid."""
OWNER = f"""
import os, sys, time
from pathlib import Path
from workers.launch.process import ServerProcess
from workers.launch.warm import offer
from workers.launch.workspace import Workspace
with offer(Path(sys.argv[1]), lambda: False) as offered:
    server = ServerProcess(sys.argv[3:], dict(os.environ), Workspace(Path(sys.argv[2])), {GRACE_S}, offered)
print(server.guard_pid, server.pid, flush=True)
time.sleep(600)
"""


@dataclass
class Round:
    """One server: what it runs, where, and who dies."""

    victim: str
    command: list[str]
    environment: dict[str, str]
    workspace: Workspace
    shared: Path
    child: Path
    """Written by the server's child, where it has one."""

    @classmethod
    def drawn(cls, environment: dict[str, str], chance: random.Random) -> Round:
        """Let chance pick a victim, and, unless it is that, whether the server has a child that does not want to go."""
        workspace, victim = Workspace.make(), chance.choice(VICTIMS)
        shared, child = SHARED_MEMORY / workspace.root.name, workspace.root / "child"
        has_child = victim == "descendants" or chance.random() < 0.3
        stubborn = ["--shares", str(shared), "--stubborn", str(child)] if has_child else []
        command = [sys.executable, "-m", MODULE, *stubborn]
        environment = environment | {"TMPDIR": str(workspace.temporary)}
        return cls(victim, command, environment, workspace, shared, child)


def kill_often(rounds: int, seed: int = 0) -> Found:
    """Start `rounds` servers; the first tenth is not in the growth."""
    chance, found = random.Random(seed), Found()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = WarmParent((MODULE,), environment)
    try:
        for number in range(rounds):
            if number == rounds // 10:
                before = Size.of(parent.pid)
            _play(Round.drawn(environment, chance), parent, chance, found)
        after = Size.of(parent.pid)
        found.descriptors_gained = after.descriptors - before.descriptors
        found.resident_gained_bytes = after.resident_bytes - before.resident_bytes
    finally:
        parent.close()
    found.directories += parent.socket.parent.exists()
    return found


def _play(one: Round, parent: WarmParent, chance: random.Random, found: Found) -> None:
    found.rounds += 1
    found.victims[one.victim] += 1
    if one.victim == "owner":
        family = _owner_dies(one, parent, chance, found)
    elif one.victim == "parent":
        family = _parent_dies(one, chance, found)
    else:
        with offer(parent.socket, lambda: False) as offered:
            server = ServerProcess(one.command, one.environment, one.workspace, GRACE_S, offered)
        family = _stopped(one, server, chance, found)
    root = one.workspace.root
    deadline = time.monotonic() + END_LIMIT_S
    half_removed = root.with_name(f"{root.name}~")
    while (left := _left(root, family)) or (one.victim == "owner" and (root.exists() or half_removed.exists())):
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    found.processes_left += len(left)
    found.directories += root.exists() is (one.victim == "owner") or half_removed.exists()
    found.shared_memory_left += one.shared.exists()
    one.workspace.remove()
    one.shared.unlink(missing_ok=True)


def _stopped(one: Round, server: ServerProcess, chance: random.Random, found: Found) -> list[int]:
    """Kill the victim of a server that runs, then stop the server. Returns the pids of its family."""
    if one.victim == "descendants":
        _wait_for(one.child)
    time.sleep(chance.uniform(0, LONGEST_LIFE_S))
    family = [*processes.tree(server.guard_pid), server.pid]
    started = processes.tree(server.pid)[1:] if one.victim == "descendants" else []
    pids = {"server": [server.pid], "descendants": started, "guard": [server.guard_pid]}.get(one.victim, [])
    ways = [signal.SIGKILL, signal.SIGTERM, *([signal.SIGSTOP] if one.victim != "guard" else [])]
    for pid in pids:
        strike(pid, chance.choice(ways), one.victim, found)
    server.stop()
    found.hung += server.exit_code is None and one.victim != "guard"  # who else could tell it
    return family


def _parent_dies(one: Round, chance: random.Random, found: Found) -> list[int]:
    """Kill a warm parent, which has this server only, while it forks or a little later."""
    parent = WarmParent((MODULE,), one.environment)
    with offer(parent.socket, lambda: False) as offered:
        number = chance.choice([signal.SIGKILL, signal.SIGTERM])
        killing = threading.Timer(chance.uniform(0, LONGEST_FORK_S), strike, (parent.pid, number, one.victim, found))
        killing.start()
        try:
            server = ServerProcess(one.command, one.environment, one.workspace, GRACE_S, offered)
        except NotWarm:
            found.cold += 1
            server = ServerProcess(one.command, one.environment, one.workspace, GRACE_S)
        killing.join()
    family = _stopped(one, server, chance, found)
    parent.close()
    found.directories += parent.socket.parent.exists()
    return [*family, parent.pid]


def _owner_dies(one: Round, parent: WarmParent, chance: random.Random, found: Found) -> list[int]:
    """Kill the session of a server that runs: its guard has to end the rest, and to remove the directory."""
    command = [sys.executable, "-c", OWNER, str(parent.socket), str(one.workspace.root), *one.command]
    with subprocess.Popen(command, cwd=ROOT, env=one.environment, text=True, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        guard, server = map(int, owner.stdout.readline().split())
        time.sleep(chance.uniform(0, LONGEST_LIFE_S))
        family = [*processes.tree(guard), server]
        strike(owner.pid, chance.choice([signal.SIGKILL, signal.SIGTERM]), one.victim, found)
    return family


def _left(root: Path, family: list[int]) -> set[int]:
    """Those of a family that live, and others that have come into its directory."""
    return {pid for pid in family if processes.is_running(pid)} | {each.pid for each in processes.working_in(root)}


def _wait_for(child: Path) -> None:
    deadline = time.monotonic() + END_LIMIT_S
    while not (child.exists() and child.read_text()):
        if time.monotonic() > deadline:
            raise TimeoutError("a server has not forked its child")
        time.sleep(0.005)


def main() -> None:
    """Run and print; exit code 1 where anything hung or is left, or the parent has grown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rounds", nargs="?", type=int, default=200)
    parser.add_argument("--engine", choices=("standin", "vllm"), default="standin")
    options = parser.parse_args()
    begun = time.monotonic()
    found = (warm_kills_vllm.kill_often if options.engine == "vllm" else kill_often)(options.rounds)
    seconds, kib = time.monotonic() - begun, found.resident_gained_bytes / 1024
    struck = ", ".join(f"{victim} {number}" for victim, number in sorted(found.struck.items()))
    print(
        f"{found.rounds} warm starts in {seconds:.0f} s; signals to: {struck}; to nobody in {found.victims['nobody']}"
    )
    print(f"{found.cold} went on cold, for their parent was gone")
    print(f"{found.hung} hung; left: {found.processes_left} processes, {found.shared_memory_left} files in /dev/shm;")
    print(f"{found.directories} directories left, or lost under their session")
    print(f"the warm parent gained {found.descriptors_gained} descriptors and {kib:.0f} KiB")
    if isinstance(found, VllmFound) and found.ready_s:
        warm_kills_vllm.report(found)
    sys.exit(1 if found.bad or found.grew else 0)


if __name__ == "__main__":
    main()
