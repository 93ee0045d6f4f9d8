"""Whoever is killed, its private directory goes, and with it what works there: real processes."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.command_line import ROOT
from workers import processes
from workers.caretaker import Caretaker
from workers.temporary import Owned

OWNER = """
import os, subprocess, sys, time
from workers.caretaker import Caretaker
from workers.temporary import Owned
owned = Owned("x-", 1)
caretaker = Caretaker(owned.path, float(sys.argv[1]))
os.environ["TMPDIR"] = str(owned.path)
works = subprocess.Popen([sys.executable, "-c", sys.argv[2]], cwd=owned.path, start_new_session=True)
print(owned.path, works.pid, flush=True)
time.sleep(600)
"""
STUBBORN = """
import time
from multiprocessing import resource_tracker, shared_memory
resource_tracker.register = lambda *_: None
made = shared_memory.SharedMemory(create=True, size=4096)
open("shared", "w").write(made.name + "\\n")
time.sleep(600)
"""
CLEARS_UP = "import time; from pathlib import Path; time.sleep(1.5); Path('../cleared').touch()"


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "did not happen within 20 s"
        time.sleep(0.02)


@pytest.mark.parametrize(("works", "wait_s", "cleared"), [(STUBBORN, 0.2, False), (CLEARS_UP, 600.0, True)])
def test_what_works_in_the_directory_of_a_killed_owner_has_its_time_and_then_nothing_is_left(
    tmp_path: Path, works: str, wait_s: float, cleared: bool
) -> None:
    command = [sys.executable, "-c", OWNER, str(wait_s), works]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    owner = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert owner.stdout
    made, pid = owner.stdout.readline().split()
    directory, worker = Path(made), int(pid)
    (caretaker,) = [each for each in psutil.Process(owner.pid).children() if each.pid != worker]
    name = directory / "shared"
    if works == STUBBORN:
        until(lambda: name.exists() and name.read_text().endswith("\n"))
    shared = Path("/dev/shm", name.read_text().strip() if name.exists() else "none")
    owner.kill()
    owner.wait()
    until(lambda: not directory.exists())
    assert not shared.exists()
    assert not processes.is_running(worker)
    assert (tmp_path / "cleared").exists() == cleared
    until(lambda: not processes.is_running(caretaker.pid))
    assert list(tmp_path.glob("x-*")) == []


def test_an_owner_that_has_removed_its_directory_leaves_no_caretaker() -> None:
    owned = Owned("x-", 1)
    caretaker = Caretaker(owned.path)
    pid = caretaker._process.pid
    assert processes.is_running(pid)
    owned.remove()
    caretaker.close()
    assert not processes.is_running(pid)
