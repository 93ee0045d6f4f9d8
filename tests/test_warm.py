"""Warm starts with real processes: what a forked server finds in itself, what refuses it, and that nothing is left."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import warm_kills
from workers import processes, temporary
from workers.launch.process import ServerProcess
from workers.launch.warm import NotWarm, WarmParent, offer
from workers.launch.workspace import Workspace

ROOT = str(Path(__file__).resolve().parent.parent)
ENGINE = "tests.standin_engine"
OWNER = """
import os, sys, time
from pathlib import Path
from workers.launch.process import ServerProcess
from workers.launch.warm import WarmParent, offer
from workers.launch.workspace import Workspace
parent = WarmParent(tuple(sys.argv[3:]), dict(os.environ))
print(parent.pid, flush=True)
if sys.argv[1] != "-":
    workspace = Workspace(Path(sys.argv[1]))
    with offer(parent.socket, lambda: False) as offered:
        command = [sys.executable, "-m", sys.argv[3], "--stubborn", sys.argv[2]]
        server = ServerProcess(command, dict(os.environ), workspace, 2.0, offered)
    print(server.pid, server.guard_pid, flush=True)
time.sleep(600)
"""
STARTS_A_THREAD = "import threading, time\nthreading.Thread(None, time.sleep, 't', (99,), daemon=True).start()"
FAKE_TORCH = "class cuda:\n    is_initialized = staticmethod(lambda: True)\n"


def environment(*more: Path, **variables: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return {**own, "PYTHONPATH": os.pathsep.join([ROOT, *map(str, more)]), **variables}


@pytest.fixture(scope="module")
def parent() -> Iterator[WarmParent]:
    made = WarmParent((ENGINE,), environment(INSIDE_IT="yes"))
    yield made
    made.close()
    assert not made.socket.parent.exists()


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


def forked(
    parent: WarmParent, workspace: Workspace, *arguments: str, module: str = ENGINE, **variables: str
) -> ServerProcess:
    asked = environment(INSIDE_IT="yes", TMPDIR=str(workspace.temporary)) | variables
    with offer(parent.socket, lambda: False) as offered:
        return ServerProcess([sys.executable, "-m", module, *arguments], asked, workspace, 2.0, offered)


def told(server: ServerProcess) -> dict[str, Any]:
    until(lambda: server.log_text().endswith("}\n"))
    return dict(json.loads(server.log_text().splitlines()[-1]))


def refusal(parent: WarmParent, workspace: Workspace, **variables: str) -> str:
    with pytest.raises(NotWarm) as error:
        forked(parent, workspace, **variables)
    return str(error.value)


# --- what a forked server is ---


def test_a_forked_server_is_what_a_cold_one_would_be(parent: WarmParent, workspace: Workspace) -> None:
    warm = forked(parent, workspace, "--port", "1")
    found = told(warm)
    assert found["imported_by"] == parent.pid
    assert (found["pid"], found["group"]) == (warm.pid, warm.guard_pid)
    warm.stop()
    workspace.log.unlink()
    asked = environment(INSIDE_IT="yes", TMPDIR=str(workspace.temporary))
    cold = ServerProcess([sys.executable, "-m", ENGINE, "--port", "1"], asked, workspace, 2.0)
    other = told(cold)
    cold.stop()
    own = ("pid", "group", "imported_by", "random")
    assert {name: value for name, value in found.items() if name not in own} == {
        name: value for name, value in other.items() if name not in own
    }
    assert found["temporary"] == str(workspace.temporary)


def test_two_forks_have_random_numbers_of_their_own(parent: WarmParent, workspace: Workspace) -> None:
    first = forked(parent, workspace)
    numbers = {told(first)["random"]}
    first.stop()
    workspace.log.unlink()
    second = forked(parent, workspace)
    numbers.add(told(second)["random"])
    second.stop()
    assert len(numbers) == 2
    assert second.exit_code == -signal.SIGTERM


def test_variables_that_are_read_late_may_differ(parent: WarmParent, workspace: Workspace) -> None:
    server = forked(parent, workspace, CUDA_VISIBLE_DEVICES="3", VLLM_API_KEY="secret")
    assert told(server)["environment"]["CUDA_VISIBLE_DEVICES"] == "3"
    server.stop()


# --- what refuses a fork ---


def test_another_environment_than_the_import_saw_is_refused(parent: WarmParent, workspace: Workspace) -> None:
    assert ": HF_HUB_OFFLINE" in refusal(parent, workspace, HF_HUB_OFFLINE="1")


def test_another_module_is_refused(parent: WarmParent, workspace: Workspace) -> None:
    assert "json.tool is not what was imported" in refusal(parent, workspace, module="json.tool")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "entry could not be imported: ModuleNotFoundError"),
        ({"entry": "import nowhere_at_all"}, "entry could not be imported: ModuleNotFoundError"),
        ({"entry": "raise SystemExit(1)"}, "entry could not be imported: SystemExit"),
        ({"entry": "import torch", "torch": FAKE_TORCH}, "has initialised CUDA"),
        ({"entry": STARTS_A_THREAD}, "has started threads: t"),
    ],
)  # fmt: skip
def test_an_import_that_a_fork_would_not_survive_is_refused(
    files: dict[str, str], words: str, tmp_path: Path, workspace: Workspace
) -> None:
    for name, content in files.items():
        (tmp_path / f"{name}.py").write_text(content)
    parent = WarmParent(("entry",), environment(tmp_path))
    try:
        with pytest.raises(NotWarm, match=words):
            offer(parent.socket, lambda: False)
    finally:
        parent.close()


def test_what_is_no_request_does_not_end_the_parent(parent: WarmParent, workspace: Workspace) -> None:
    for content in (b"", b"{", b'{"module": 1}'):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(parent.socket))
            if content:
                read_end, write_end = os.pipe()
                socket.send_fds(client, [content], [read_end])
                os.close(read_end)
                os.close(write_end)
    server = forked(parent, workspace)
    told(server)
    server.stop()


# --- whoever dies ---


def test_nothing_is_left_of_a_forked_server_that_is_killed(parent: WarmParent, workspace: Workspace) -> None:
    server = forked(parent, workspace, "--stubborn", str(workspace.root / "child"))
    told(server)
    family = processes.tree(server.guard_pid)
    assert len(family) == 3
    os.kill(server.pid, signal.SIGKILL)
    until(lambda: server.exit_code == -signal.SIGKILL)
    assert not any(processes.is_running(pid) for pid in family[1:])
    server.stop()
    assert not processes.is_running(server.guard_pid)


def test_a_server_outlives_its_warm_parent_and_ends_with_its_owner(workspace: Workspace) -> None:
    parent = WarmParent((ENGINE,), environment(INSIDE_IT="yes"))
    server = forked(parent, workspace)
    told(server)
    os.kill(parent.pid, signal.SIGKILL)
    with pytest.raises(NotWarm, match="no warm parent answers"):
        offer(parent.socket, lambda: False)
    assert server.running
    server.stop()
    assert not server.running
    parent.close()


def test_a_server_outlives_what_is_done_about_a_warm_parent_that_was_killed_with_its_owner(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(temporary, "ENDING_LIMIT_S", 0.0)
    parent = WarmParent((ENGINE,), environment(INSIDE_IT="yes"))
    server = forked(parent, workspace)
    told(server)
    directory = parent.socket.parent
    os.kill(parent.pid, signal.SIGKILL)
    os.close(parent._owned._lock)
    assert temporary.remove_ownerless(directory.name) == [directory]
    assert server.running
    server.stop()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_when_the_owner_of_all_dies(number: int) -> None:
    workspace = Workspace.make()
    mark = workspace.root / "child"
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(workspace.root), str(mark), ENGINE], cwd=ROOT, env=environment(), text=True,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert owner.stdout is not None
    family = [int(pid) for line in (owner.stdout.readline(), owner.stdout.readline()) for pid in line.split()]
    directory = Path(f"/proc/{family[0]}/cwd").resolve()
    until(lambda: mark.exists() and mark.read_text() != "")
    family.append(int(mark.read_text()))
    owner.send_signal(number)
    owner.wait()
    owner.stdout.close()
    until(lambda: not any(processes.is_running(pid) for pid in family))
    until(lambda: not workspace.root.exists() and not directory.exists())


def test_a_parent_that_is_still_importing_ends_with_its_owner(tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text("import time\ntime.sleep(600)\n")
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, "-", "-", "endless"], cwd=ROOT, env=environment(tmp_path), text=True,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    directory = Path(f"/proc/{pid}/cwd").resolve()
    until((directory / "s").exists)
    owner.kill()
    owner.wait()
    owner.stdout.close()
    until(lambda: not processes.is_running(pid) and not directory.exists())


def test_forks_that_are_killed_at_any_moment_neither_hang_nor_stay_nor_add_up() -> None:
    found = warm_kills.kill_often(20)
    assert (found.rounds, found.hung, found.left, found.descriptors_gained) == (20, 0, 0, 0)
    assert found.resident_gained_bytes < 2**20
