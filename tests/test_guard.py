"""Whoever dies, nothing is left: real processes under the guard, with children that do not want to go."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import shared_memory
from pathlib import Path

import pytest

from workers import processes
from workers.launch.process import ServerProcess
from workers.launch.workspace import Workspace

STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        open(sys.argv[1], "w").write(str(os.getpid()))
        time.sleep(600)
    os._exit(0)
time.sleep(600)
"""
POLITE = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); time.sleep(600)"
SHARING = """
import signal, sys, time
from multiprocessing import resource_tracker, shared_memory
signal.signal(signal.SIGTERM, signal.SIG_IGN)
resource_tracker.register = lambda *_: None
made = shared_memory.SharedMemory(create=True, size=4096)
other = shared_memory.SharedMemory(sys.argv[2])
open(sys.argv[1], "w").write(made.name + "\\n")
time.sleep(600)
"""
MAPPING = """
import mmap, sys, time
with open(sys.argv[1], "wb+") as file:
    file.truncate(4096)
    mapped = mmap.mmap(file.fileno(), 4096)
time.sleep(60)
"""
SEMAPHORE = """
import multiprocessing, signal, sys, time
from multiprocessing import resource_tracker
signal.signal(signal.SIGTERM, signal.SIG_IGN)
resource_tracker.register = lambda *_: None
lock = multiprocessing.get_context("spawn").Lock()
open(sys.argv[1], "w").write(f"sem.{lock._semlock.name[1:]}\\n")
time.sleep(600)
"""
TRACKED = """
import signal, sys, time
from multiprocessing import shared_memory
signal.signal(signal.SIGTERM, signal.SIG_IGN)
made = shared_memory.SharedMemory(create=True, size=4096)
made.close()
open(sys.argv[1], "w").write(made.name + "\\n")
time.sleep(600)
"""
OWNER = """
import os, sys, time
from pathlib import Path
from workers.launch.process import ServerProcess
from workers.launch.workspace import Workspace
server = ServerProcess(sys.argv[3:], dict(os.environ), Workspace(Path(sys.argv[1])), 2.0)
Path(sys.argv[2]).write_text(f"{server.pid} {server.guard_pid}")
time.sleep(600)
"""


@pytest.fixture
def workspace() -> Iterator[Workspace]:
    made = Workspace.make()
    yield made
    made.remove()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "did not happen within 20 s"
        time.sleep(0.02)


def read_pid(path: Path) -> int:
    until(lambda: path.exists() and path.read_text().isdigit())
    return int(path.read_text())


def test_a_polite_server_ends_with_its_own_exit_code(workspace: Workspace) -> None:
    server = ServerProcess([sys.executable, "-c", POLITE], dict(os.environ), workspace, 5.0)
    time.sleep(0.3)  # until its handler is set: before, SIGTERM ends it with -15
    server.stop()
    assert server.exit_code == 7
    assert not server.running
    assert workspace.root.exists()


def test_stop_ends_detached_grandchildren_that_ignore_sigterm(workspace: Workspace) -> None:
    mark = workspace.root / "grandchild"
    server = ServerProcess([sys.executable, "-c", STUBBORN, str(mark)], dict(os.environ), workspace, 0.5)
    grandchild = read_pid(mark)
    server.stop()
    assert not processes.is_running(grandchild)
    assert not processes.is_running(server.pid)
    assert server.exit_code == -signal.SIGKILL


def test_a_server_that_ends_by_itself_is_told_and_its_children_are_ended(workspace: Workspace) -> None:
    mark = workspace.root / "grandchild"
    code = STUBBORN.replace("time.sleep(600)\n", "time.sleep(600)\n", 1).removesuffix("time.sleep(600)\n")
    code += "\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.01)\nsys.exit(3)\n"
    server = ServerProcess([sys.executable, "-c", code, str(mark)], dict(os.environ), workspace, 0.5)
    grandchild = read_pid(mark)
    until(lambda: server.exit_code == 3)
    until(lambda: not processes.is_running(grandchild))
    server.stop()


def test_what_a_server_that_ended_by_itself_leaves_has_no_grace(workspace: Workspace) -> None:
    mark = workspace.root / "grandchild"
    server = ServerProcess([sys.executable, "-c", STUBBORN, str(mark)], dict(os.environ), workspace, 600.0)
    grandchild = read_pid(mark)
    os.kill(server.pid, signal.SIGKILL)
    until(lambda: not processes.is_running(grandchild))
    until(lambda: server.exit_code == -signal.SIGKILL)
    server.stop()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_when_the_owner_dies(number: int) -> None:
    workspace = Workspace.make()
    mark, pids = workspace.root / "grandchild", workspace.root / "pids"
    command = [sys.executable, "-c", OWNER, str(workspace.root), str(pids), sys.executable, "-c", STUBBORN, str(mark)]
    owner = subprocess.Popen(command, cwd=Path(__file__).parent.parent)
    until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    family = [*(int(pid) for pid in pids.read_text().split()), read_pid(mark)]
    owner.send_signal(number)
    owner.wait()
    until(lambda: not any(processes.is_running(pid) for pid in family))
    until(lambda: not workspace.root.exists())


def test_nothing_is_left_when_the_owner_dies_after_its_server() -> None:
    workspace = Workspace.make()
    pids = workspace.root / "pids"
    command = [sys.executable, "-c", OWNER, str(workspace.root), str(pids), sys.executable, "-c", "raise SystemExit(3)"]
    owner = subprocess.Popen(command, cwd=Path(__file__).parent.parent)
    until(lambda: '"exit_code": 3' in (workspace.status.read_text() if workspace.status.exists() else ""))
    guard = json.loads(workspace.status.read_text())["guard"]
    assert processes.is_running(guard)
    owner.kill()
    owner.wait()
    until(lambda: not workspace.root.exists())
    until(lambda: not processes.is_running(guard))


def test_a_hurried_stop_does_not_wait_for_the_grace(workspace: Workspace) -> None:
    mark = workspace.root / "grandchild"
    server = ServerProcess([sys.executable, "-c", STUBBORN, str(mark)], dict(os.environ), workspace, 600.0)
    grandchild = read_pid(mark)
    server.hurry()
    server.stop()  # it would wait for ten minutes
    assert not processes.is_running(grandchild)
    assert server.exit_code == -signal.SIGKILL


def test_a_stop_that_goes_on_can_be_hurried(workspace: Workspace) -> None:
    mark = workspace.root / "grandchild"
    server = ServerProcess([sys.executable, "-c", STUBBORN, str(mark)], dict(os.environ), workspace, 600.0)
    read_pid(mark)
    stopping = threading.Thread(target=server.stop, daemon=True)
    stopping.start()
    time.sleep(0.3)
    assert server.running
    server.hurry()
    stopping.join(30)
    assert not stopping.is_alive()


def making(workspace: Workspace, script: str, *arguments: str, **environment: str) -> tuple[ServerProcess, Path]:
    """Start a server that makes something in /dev/shm and writes down its name; return both once it is there."""
    mark = workspace.root / "made"
    command = [sys.executable, "-c", script, str(mark), *arguments]
    server = ServerProcess(command, {**os.environ, **environment}, workspace, 0.5)
    until(lambda: mark.exists() and mark.read_text().endswith("\n"))
    made = Path("/dev/shm", mark.read_text().strip())
    assert made.exists()
    return server, made


def test_shared_memory_of_a_tree_that_was_killed_is_removed_and_that_of_others_is_not(workspace: Workspace) -> None:
    others = shared_memory.SharedMemory(create=True, size=4096)
    try:
        server, made = making(workspace, SHARING, others.name)
        server.stop()
        assert server.exit_code == -signal.SIGKILL
        assert not made.exists()
        assert Path("/dev/shm", others.name).exists()
    finally:
        others.close()
        others.unlink()


def test_a_cache_in_dev_shm_that_a_server_has_mapped_stays(workspace: Workspace) -> None:
    """POSIX shared memory lies on top of /dev/shm; what lies deeper somebody has put there to keep."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as cache:
        kept = Path(cache, "launcher.so")
        command = [sys.executable, "-c", MAPPING, str(kept)]
        server = ServerProcess(command, dict(os.environ), workspace, 0.5)
        until(lambda: kept.exists() and str(kept) in Path(f"/proc/{server.pid}/maps").read_text())
        server.stop()
        assert kept.exists()


def test_a_semaphore_whose_maker_was_killed_is_removed(workspace: Workspace) -> None:
    server, made = making(workspace, SEMAPHORE)
    server.stop()
    assert server.exit_code == -signal.SIGKILL
    assert not made.exists()


@pytest.mark.parametrize("guard_dies", [False, True])
def test_what_only_a_resource_tracker_knows_of_is_removed(workspace: Workspace, guard_dies: bool) -> None:
    server, made = making(workspace, TRACKED, TMPDIR=str(workspace.temporary))
    if guard_dies:
        os.kill(server.guard_pid, signal.SIGKILL)
    server.stop()
    assert not made.exists()
    assert processes.working_in(workspace.root) == []


def test_stop_twice_is_one_stop(workspace: Workspace) -> None:
    server = ServerProcess([sys.executable, "-c", "import time; time.sleep(600)"], dict(os.environ), workspace, 5.0)
    server.stop()
    server.stop()
    assert server.exit_code == -signal.SIGTERM


def test_a_server_whose_guard_is_killed_dies_and_its_owner_ends_what_it_leaves(
    workspace: Workspace, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", STUBBORN, str(tmp_path / "grandchild")]
    server = ServerProcess(command, {**os.environ, "TMPDIR": str(workspace.temporary)}, workspace, 5.0)
    grandchild = read_pid(tmp_path / "grandchild")
    os.kill(server.guard_pid, signal.SIGKILL)
    until(lambda: not server.running)
    assert processes.is_running(grandchild)
    server.stop()
    assert not processes.is_running(grandchild)


def test_a_server_whose_guard_has_ended_before_the_kernel_was_told_ends_too() -> None:
    script = "import os, sys; from workers.launch.guard import end_with_parent; end_with_parent(int(sys.argv[1]))"
    codes = [
        subprocess.run(
            [sys.executable, "-c", script, str(pid)], cwd=Path(__file__).parent.parent, check=False
        ).returncode
        for pid in (os.getpid(), os.getppid())
    ]
    assert codes == [0, -signal.SIGKILL]
