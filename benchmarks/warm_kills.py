"""Warm starts in a row, each killed at a moment and in a way that chance picks.

    python benchmarks/warm_kills.py [ROUNDS]

The engine is a stand-in that imports nothing heavy (`tests/standin_engine.py`); processes, guard and warm parent are
the real ones. Prints how many starts hung, how many processes were left, and how the warm parent has grown.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from workers import processes
from workers.launch.process import ServerProcess
from workers.launch.warm import WarmParent, offer
from workers.launch.workspace import Workspace

MODULE = "tests.standin_engine"
END_LIMIT_S = 20.0
LONGEST_LIFE_S = 0.15


@dataclass
class Found:
    """What was seen of some rounds."""

    rounds: int = 0
    hung: int = 0
    left: int = 0
    descriptors_gained: int = 0
    resident_gained_bytes: int = 0


def kill_often(rounds: int, seed: int = 0) -> Found:
    """Start and kill `rounds` servers; the first tenth is not in the growth."""
    chance, found = random.Random(seed), Found()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    parent = WarmParent((MODULE,), environment)
    try:
        for number in range(rounds):
            if number == rounds // 10:
                descriptors, resident = _size(parent.pid)
            _round(parent, environment, chance, found)
        after = _size(parent.pid)
        found.descriptors_gained, found.resident_gained_bytes = after[0] - descriptors, after[1] - resident
    finally:
        parent.close()
    return found


def _round(parent: WarmParent, environment: dict[str, str], chance: random.Random, found: Found) -> None:
    workspace = Workspace.make()
    environment = environment | {"TMPDIR": str(workspace.temporary)}
    command = [
        sys.executable,
        "-m",
        MODULE,
        *(["--stubborn", str(workspace.root / "child")] if chance.random() < 0.3 else []),
    ]
    with offer(parent.socket, lambda: False) as offered:
        server = ServerProcess(command, environment, workspace, 0.2, offered)
    time.sleep(chance.uniform(0, LONGEST_LIFE_S))
    family = [*processes.tree(server.guard_pid), server.pid]
    victim = chance.choice(["server", "nobody", "descendants"])
    for pid in {"server": [server.pid], "nobody": [], "descendants": family[2:]}[victim]:
        _kill(pid, chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP]))
    server.stop()
    found.rounds += 1
    found.hung += server.exit_code is None
    deadline = time.monotonic() + END_LIMIT_S
    while (left := [pid for pid in family if processes.is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    found.left += len(left)
    workspace.remove()


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _size(pid: int) -> tuple[int, int]:
    """Open descriptors, resident bytes."""
    process = Path(f"/proc/{pid}")
    resident = next(line for line in (process / "status").read_text().splitlines() if line.startswith("VmRSS"))
    return len(list((process / "fd").iterdir())), int(resident.split()[1]) * 1024


def main() -> None:
    """Run and print."""
    begun = time.monotonic()
    found = kill_often(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
    seconds, kib = time.monotonic() - begun, found.resident_gained_bytes / 1024
    print(f"{found.rounds} warm starts in {seconds:.0f} s: {found.hung} hung, {found.left} processes left")
    print(f"the warm parent gained {found.descriptors_gained} descriptors and {kib:.0f} KiB")


if __name__ == "__main__":
    main()
