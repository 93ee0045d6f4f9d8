"""Warm starts with real processes: what a forked server finds in itself, what refuses it, and that nothing is left."""

import contextlib
import ctypes
import gc
import importlib.util
import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from benchmarks import warm_kills
from benchmarks.killing import Found
from contract.rows import MUTE_PARENT
from tests.test_session import spec
from workers import processes, temporary
from workers.engines.sim import SimEngine
from workers.launch import process, warm
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
STARTS_A_NATIVE_THREAD = """
import _thread, ctypes, os, threading, time
ends, ended = threading.Event(), threading.Event()
def native():
    ctypes.CDLL(None).prctl(15, {name!r}.encode())  # PR_SET_NAME
    ends.wait()
    ended.set()
    time.sleep(0.1)  # it is in /proc for a while yet
_thread.start_new_thread(native, ())
"""
ENDS_IT_BEFORE_A_FORK = "os.register_at_fork(before=lambda: (ends.set(), ended.wait()))"
FAILING_FORKS = {
    "hangs": "import os, time\nos.register_at_fork(after_in_child=lambda: time.sleep(600))",
    "dies": "import os\nos.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), 11))",
    "cannot": "import os\ndef fork(): raise OSError(11, 'no more processes')\nos.fork = fork",
}
FAKE_TORCH = "class cuda:\n    is_initialized = staticmethod(lambda: True)\n"
OPENS_A_SOCKET = "import socket\nleft, right = socket.socketpair()"
OPENS_AN_EPOLL = "import select\npolled = select.epoll()"
OPENS_AN_EVENTFD = "import os\nwakes = os.eventfd(0)"
SETS_CARDS = "import os\nos.environ.update(CUDA_VISIBLE_DEVICES='', VLLM_WORKER_MULTIPROC_METHOD='spawn', SET='yes')"
PLUGINS = (
    "def load():\n    import threading, time\n    threading.Thread(None, time.sleep, 'p', (99,), daemon=True).start()"
)
NO_SECOND_FORK = """
import os
plain, parent = os.fork, os.getpid()
def fork():
    if os.getpid() != parent:
        raise OSError("no more processes")
    return plain()
os.fork = fork
"""
WAITS = "if __name__ == '__main__':\n    time.sleep(600)"
HANGING_FORK = """
import os, sys, time
sys.modules["__main__"].FORK_LIMIT_S = 0.5
plain, generation = os.fork, 0
def fork():
    global generation
    if generation == {hangs}:
        time.sleep(600)
    pid = plain()
    generation += pid == 0
    return pid
os.fork = fork
"""
STATE = """
import gc, json, multiprocessing, numpy.random, time
if __name__ == "__main__":
    key = multiprocessing.current_process().authkey.hex()
    found = {"numpy": numpy.random.random(), "key": key, "frozen": gc.get_freeze_count()}
    print(json.dumps(found), flush=True)
    time.sleep(600)
"""
DEEP_CALLS = """
import json, resource, time
def leaf(first, second):
    third = fourth = first
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def at(depth):
    if depth:
        return at(depth - 1)
    before = faults()
    for _ in range(1000):
        leaf(1, 2)
    return faults() - before
def most():
    return max(map(at, range(300)))
if __name__ == "__main__":
    print(json.dumps({"faults": most()}), flush=True)
    time.sleep(600)
"""
MAKES_GARBAGE = """
import gc, json, os, time
class Node: ...
if __name__ == "__main__":
    dead, everything = map(int, os.environ["AT_IMPORT"].split())
    print(json.dumps({"dead": dead, "everything": everything, "after": gc.get_threshold()}), flush=True)
    time.sleep(600)
for _ in range(20_000):
    node = Node()
    node.itself = node
os.environ["AT_IMPORT"] = f"{sum(type(each) is Node for each in gc.get_objects())} {gc.get_threshold()[2]}"
"""
FREEZES_ITSELF = "def freeze_gc_heap(): ...\n"
TELLS = "import json, os, sets, time\nif __name__ == '__main__':\n    print(json.dumps(dict(os.environ)), flush=True)\n"


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


def after(looks: int) -> Callable[[], bool]:
    left = iter(range(looks))
    return lambda: next(left, None) is None


def forked(
    parent: WarmParent, workspace: Workspace, *arguments: str, module: str = ENGINE, **variables: str
) -> ServerProcess:
    asked = environment(INSIDE_IT="yes", TMPDIR=str(workspace.temporary)) | variables
    with offer(parent.socket, lambda: False) as offered:
        return ServerProcess([sys.executable, "-m", module, *arguments], asked, workspace, 2.0, offered)


@contextlib.contextmanager
def forked_entry(entry: str, directory: Path, workspace: Workspace) -> Iterator[ServerProcess]:
    """A server forked from a parent of its own that has imported `entry` from that directory."""
    (directory / "entry.py").write_text(entry)
    parent = WarmParent(("entry",), environment(directory))
    with offer(parent.socket, lambda: False) as offered:
        server = ServerProcess([sys.executable, "-m", "entry"], environment(directory), workspace, 2.0, offered)
    yield server
    server.stop()
    parent.close()


def hanging_fork(generation: int) -> str:
    """A module that has a fork hang: in a guard that leaves the parent (1), or in one that forks its server (2)."""
    return HANGING_FORK.format(hangs=generation)


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


@pytest.mark.parametrize(("ends", "code"), [("sys.exit(7)", 7), ("raise ValueError", 1), ("", 0)])
def test_a_forked_server_ends_with_the_code_that_a_cold_one_would(
    ends: str, code: int, tmp_path: Path, workspace: Workspace
) -> None:
    entry = f"import sys\nif __name__ == '__main__':\n    pass\n    {ends}\n"
    with forked_entry(entry, tmp_path, workspace) as server:
        until(lambda: server.exit_code is not None)
        assert server.exit_code == code


def test_no_call_of_a_forked_server_maps_memory_for_its_frame_anew_each_time(
    tmp_path: Path, workspace: Workspace
) -> None:
    """At whatever depth: CPython's chunks of frames end somewhere, and in a loop there each call has a page fault
    (until a fix of 2026 in 3.13)."""
    with forked_entry(DEEP_CALLS, tmp_path, workspace) as server:
        assert told(server)["faults"] < 500


def states(directory: Path, entry: str = STATE) -> list[dict[str, Any]]:
    """Return what a cold server and two forks of one parent say of their random state, key and frozen objects."""
    (directory / "entry.py").write_text(entry)
    parent, found = WarmParent(("entry",), environment(directory)), []
    for number in range(3):
        workspace = Workspace.make()
        asked = environment(directory, TMPDIR=str(workspace.temporary))
        command = [sys.executable, "-m", "entry"]
        with contextlib.ExitStack() as offered:
            warm_offer = offered.enter_context(offer(parent.socket, lambda: False)) if number else None
            server = ServerProcess(command, asked, workspace, 2.0, warm_offer)
        found.append(told(server))
        server.stop()
        workspace.remove()
    parent.close()
    return found


def test_two_forks_have_numpys_random_numbers_and_keys_of_their_own_and_nothing_frozen(tmp_path: Path) -> None:
    found = states(tmp_path)
    assert len({each["numpy"] for each in found}) == 3
    assert len({each["key"] for each in found}) == 3
    assert [each["frozen"] for each in found] == [0, 0, 0]


def test_what_the_parent_made_stays_frozen_where_vllm_freezes_it_as_well(tmp_path: Path) -> None:
    package = tmp_path / "vllm" / "utils"
    package.mkdir(parents=True)
    for directory in (package, package.parent):
        (directory / "__init__.py").touch()
    (package / "gc_utils.py").write_text(FREEZES_ITSELF)
    cold, *forks = states(tmp_path, f"import vllm.utils.gc_utils\n{STATE}")
    assert cold["frozen"] == 0
    assert all(each["frozen"] > 0 for each in forks)


def test_an_import_collects_new_garbage_as_it_goes_and_looks_at_everything_only_at_its_end(
    tmp_path: Path, workspace: Workspace
) -> None:
    with forked_entry(MAKES_GARBAGE, tmp_path, workspace) as server:
        found = told(server)
    assert found["dead"] < 2 * gc.get_threshold()[0]  # of which each lets so many be made before it looks
    assert found["everything"] == 10**9
    assert found["after"] == list(gc.get_threshold())


def test_thresholds_that_an_import_sets_are_kept(tmp_path: Path, workspace: Workspace) -> None:
    sets = "import gc\nif __name__ != '__main__': gc.set_threshold(600, 9, 8)\n"
    with forked_entry(sets + MAKES_GARBAGE, tmp_path, workspace) as server:
        assert told(server)["after"] == [600, 9, 8]


def test_variables_that_are_read_late_may_differ(parent: WarmParent, workspace: Workspace) -> None:
    server = forked(parent, workspace, CUDA_VISIBLE_DEVICES="3", VLLM_API_KEY="secret")
    assert told(server)["environment"]["CUDA_VISIBLE_DEVICES"] == "3"
    server.stop()


def test_a_request_that_its_socket_takes_in_parts_arrives_whole(parent: WarmParent, workspace: Workspace) -> None:
    arguments = [f"{number:0200d}" for number in range(5000)]
    server = forked(parent, workspace, *arguments)
    assert told(server)["argv"][1:] == arguments
    server.stop()


def test_what_an_import_has_left_open_is_the_servers_and_not_its_guards(tmp_path: Path, workspace: Workspace) -> None:
    standard = {os.devnull, str(workspace.log)}
    entry = f"import sys, time\nsys.kept = open({str(tmp_path / 'kept')!r}, 'w')\n{WAITS}"
    with forked_entry(entry, tmp_path, workspace) as server:
        assert [name.partition(":")[0] for name in opened_by(server.guard_pid) if name not in standard] == ["pipe"]
        assert str(tmp_path / "kept") in opened_by(server.pid)


def opened_by(pid: int) -> list[str]:
    return [str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()]


def test_the_parent_is_told_the_order_of_cards_that_servers_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it imports may have read it for good."""
    made: list[dict[str, str]] = []
    monkeypatch.setattr(warm, "WarmParent", lambda _modules, environment: made.append(environment))
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    warm.parent_for(SimEngine(), spec(), None)
    assert made[0]["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_another_order_of_cards_than_the_parents_is_refused(parent: WarmParent, workspace: Workspace) -> None:
    assert ": CUDA_DEVICE_ORDER" in refusal(parent, workspace, CUDA_DEVICE_ORDER="FASTEST_FIRST")


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
        ({"entry": STARTS_A_NATIVE_THREAD.format(name="tokio-rt")}, "threads that forks would lack: tokio-rt$"),
        ({"entry": STARTS_A_NATIVE_THREAD.format(name="cuda_is_not_it")}, "would lack: cuda_is_not_it$"),
        ({"entry": OPENS_A_SOCKET}, r"has opened what all forks would share: socket:\["),
        ({"entry": OPENS_AN_EPOLL}, r"has opened what all forks would share: anon_inode:\[eventpoll\]"),
        ({"entry": OPENS_AN_EVENTFD}, r"has opened what all forks would share: anon_inode:\[eventfd\]"),
        ({"entry": "", "plugins": PLUGINS}, "has started threads: p"),
        ({"entry": "", "plugins": "def load(): import nowhere"}, "plugins:load could not be imported: ModuleNotFound"),
    ],
)  # fmt: skip
def test_an_import_that_a_fork_would_not_survive_is_refused(
    files: dict[str, str], words: str, tmp_path: Path, workspace: Workspace
) -> None:
    for name, content in files.items():
        (tmp_path / f"{name}.py").write_text(content)
    parent = WarmParent(("entry", "plugins:load"), environment(tmp_path))
    try:
        with pytest.raises(NotWarm, match=words):
            offer(parent.socket, lambda: False)
    finally:
        parent.close()


@pytest.mark.parametrize(
    ("fails", "words"),
    [
        ("hangs", "failed: it hung for 0.5 s"),
        ("dies", "failed: exit code -11"),
        ("cannot", "it cannot fork: .*no more"),
    ],
)
def test_a_parent_whose_forks_fail_says_so_before_anybody_needs_one(fails: str, words: str, tmp_path: Path) -> None:
    limit = "import sys\nsys.modules['__main__'].FORK_LIMIT_S = 0.5\n"
    (tmp_path / "entry.py").write_text(limit + FAILING_FORKS[fails])
    parent = WarmParent(("entry",), environment(tmp_path))
    for _ in range(2):
        with pytest.raises(NotWarm, match=words):
            offer(parent.socket, lambda: False)
    assert forks_of(parent) == [parent.pid]
    parent.close()


@pytest.mark.parametrize(
    ("entry", "threads"),
    [
        (STARTS_A_NATIVE_THREAD.format(name="cuda00001800007"), ("cuda00001800007",)),
        (STARTS_A_NATIVE_THREAD.format(name="jemalloc_bg_thd"), ("jemalloc_bg_thd",)),
        (STARTS_A_NATIVE_THREAD.format(name="blas") + ENDS_IT_BEFORE_A_FORK, ()),
    ],
)
def test_threads_that_forks_can_do_without_are_no_reason_and_are_those_that_a_fork_leaves_behind(
    entry: str, threads: tuple[str, ...], tmp_path: Path, workspace: Workspace
) -> None:
    (tmp_path / "entry.py").write_text(f"{entry}\n{WAITS}")
    parent = WarmParent(("entry",), environment(tmp_path))
    for _ in range(2):  # of a first session as of a later one
        with offer(parent.socket, lambda: False) as offered:
            assert offered.threads == threads
            server = ServerProcess([sys.executable, "-m", "entry"], environment(tmp_path), workspace, 2.0, offered)
        server.stop()
        workspace.log.unlink()
    parent.close()


@pytest.mark.parametrize("plugins", [{}, {"plugins": "other = 1"}])
def test_plugins_of_a_version_that_has_none_there_are_no_reason(plugins: dict[str, str], tmp_path: Path) -> None:
    for name, content in {"entry": "", **plugins}.items():
        (tmp_path / f"{name}.py").write_text(content)
    parent = WarmParent(("entry", "plugins:load"), environment(tmp_path))
    offer(parent.socket, lambda: False).close()
    parent.close()


NVML_OPENS = {4: "/dev/nvidia0", 5: "/dev/nvidia-uvm", 6: "anon_inode:[eventfd]", 7: "pipe:[3]"}


@pytest.mark.parametrize(
    ("opened", "named"),
    [
        (NVML_OPENS | {8: "/some/file"}, None),
        (NVML_OPENS | {8: "anon_inode:[eventpoll]"}, "anon_inode:[eventpoll]"),
        (NVML_OPENS | {8: "socket:[1]"}, "socket:[1]"),
        ({4: "/dev/nvidiactl", 6: "anon_inode:[eventfd]", 7: "pipe:[3]"}, "anon_inode:[eventfd], pipe:[3]"),
        ({4: "anon_inode:[timerfd]", 5: "anon_inode:inotify"}, "anon_inode:[timerfd], anon_inode:inotify"),
        ({4: "anon_inode:[signalfd]", 5: "anon_inode:[io_uring]"}, "anon_inode:[io_uring], anon_inode:[signalfd]"),
    ],
)
def test_what_nvml_opens_is_no_reason_and_what_others_open_is(
    opened: dict[int, str], named: str | None, warm_parent: Any
) -> None:
    before = {0: "/dev/null", 3: "socket:[2]"}
    assert warm_parent.opened_problem(before, before) is None
    problem = warm_parent.opened_problem(before, before | opened)
    assert problem == (f"an import has opened what all forks would share: {named}" if named else None)


def test_nvml_that_was_there_before_the_import_excuses_nothing(warm_parent: Any) -> None:
    before = {5: "/dev/nvidia-uvm"}
    assert "eventfd" in warm_parent.opened_problem(before, before | {6: "anon_inode:[eventfd]"})


class Driver:
    """CUDA's: what it answers when it is asked how many cards there are."""

    def __init__(self, result: int) -> None:
        self.result = result

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = 4
        return self.result


@pytest.mark.parametrize(
    ("result", "problem"),
    [(0, "an import has initialised CUDA's driver"), (100, r"driver does not say .* fails with 100")],
)
def test_a_driver_that_is_initialised_or_does_not_say_is_a_reason_whatever_torch_says(
    result: int, problem: str, warm_parent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_parent, "loaded", lambda _: Driver(result))
    with pytest.raises(warm_parent.NotFit, match=problem):
        warm_parent.Imported("entry", {}, []).check()


def test_a_driver_that_is_loaded_and_not_initialised_is_no_reason(warm_parent: Any) -> None:
    assert warm_parent.initialised_problem(Driver(warm_parent.CUDA_ERROR_NOT_INITIALIZED)) is None


def test_a_library_is_asked_only_where_it_is_loaded_and_is_not_loaded_for_it(warm_parent: Any) -> None:
    assert warm_parent.loaded("libc.so.6").getpid() == os.getpid()
    never = "libBrokenLocale.so.1"  # a part of libc that nobody uses
    assert warm_parent.loaded(never) is None
    assert never not in Path("/proc/self/maps").read_text()
    ctypes.CDLL(never)
    assert warm_parent.loaded(never) is not None


@pytest.fixture
def warm_parent(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module: it removes its own directory from the path and its guard from the modules."""
    monkeypatch.setattr(sys, "path", [str(warm.SCRIPT.parent), *sys.path])
    specification = importlib.util.spec_from_file_location("warm_parent_script", warm.SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "warm_parent_script", module)
    specification.loader.exec_module(module)
    return module


def test_what_an_import_sets_for_the_parent_does_not_hide_what_a_server_is_given(
    tmp_path: Path, workspace: Workspace
) -> None:
    (tmp_path / "sets.py").write_text(SETS_CARDS)
    (tmp_path / "entry.py").write_text(TELLS)
    variables = environment(tmp_path)
    parent = WarmParent(("entry",), variables)
    asked = variables | {"CUDA_VISIBLE_DEVICES": "3", "TMPDIR": str(workspace.temporary)}
    with offer(parent.socket, lambda: False) as offered:
        server = ServerProcess([sys.executable, "-m", "entry"], asked, workspace, 2.0, offered)
    found = told(server)
    server.stop()
    parent.close()
    assert (found["CUDA_VISIBLE_DEVICES"], found["SET"]) == ("3", "yes")
    assert found["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"  # nobody has asked for another


def test_all_sessions_together_wait_once_for_an_import_and_none_is_warm_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = tmp_path / "end"
    (tmp_path / "entry.py").write_text(f"import os, time\nwhile not os.path.exists({str(end)!r}): time.sleep(0.01)")
    with monkeypatch.context() as patched:
        patched.setattr(warm, "IMPORT_LIMIT_S", 0.3)
        parent = WarmParent(("entry",), environment(tmp_path))
    monkeypatch.setattr(warm, "FORK_LIMIT_S", 0.1)
    for _ in range(2):
        with pytest.raises(NotWarm, match=f"^{MUTE_PARENT}it was still importing"):
            offer(parent.socket, after(20))
    end.touch()

    def refused() -> str:
        with pytest.raises(NotWarm) as error:
            offer(parent.socket, lambda: False)
        return str(error.value)

    until(lambda: refused() == "its import was not over in time")
    parent.close()


def test_a_parent_that_heeds_nothing_is_killed_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that hangs in a library's code, where Python does not come to its signal handlers."""
    monkeypatch.setattr(warm, "CLOSE_LIMIT_S", 0.2)
    (tmp_path / "entry.py").write_text(
        "import signal, time\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGIO])\n"
        "print('deaf', flush=True)\ntime.sleep(600)"
    )
    parent = WarmParent(("entry",), environment(tmp_path))
    until(lambda: "deaf" in (parent.socket.parent / "log").read_text())
    parent.close()
    until(lambda: not processes.is_running(parent.pid))


# --- a session that stands still, and a parent that does ---

IMPATIENT = "import sys\nsys.modules['__main__'].CLIENT_LIMIT_S = 0.2\n"
TOO_LATE = "this session sent no request within 0.2 s of the warm parent's answer"


def says(connection: socket.socket) -> bool:
    return bool(select.select([connection], [], [], 0)[0])


def test_a_session_that_stood_still_is_cold_by_itself_and_its_parent_forks_for_the_next(
    tmp_path: Path, workspace: Workspace
) -> None:
    (tmp_path / "entry.py").write_text(IMPATIENT + WAITS)
    parent, command = WarmParent(("entry",), environment(tmp_path)), [sys.executable, "-m", "entry"]
    with offer(parent.socket, lambda: False) as offered:
        until(lambda: says(offered._connection))
        with pytest.raises(NotWarm, match=f"^{TOO_LATE}$"):
            ServerProcess(command, environment(tmp_path), workspace, 2.0, offered)
    with offer(parent.socket, lambda: False) as offered:
        ServerProcess(command, environment(tmp_path), workspace, 2.0, offered).stop()
    parent.close()


def test_a_session_that_stood_still_while_it_was_answered_hears_that_it_is_too_late() -> None:
    ours, parents = socket.socketpair()
    with ours, parents:
        parents.sendall(b'{"threads": []}\n')
        assert warm._heard(ours) == {"threads": []}
        parents.sendall(b'{"threads": []}\n' + json.dumps({"refused": TOO_LATE}).encode() + b"\n")
        with pytest.raises(NotWarm, match=f"^{TOO_LATE}$"):
            warm._heard(ours)


def test_a_session_that_stood_still_past_the_deadline_takes_the_answer_that_came_meanwhile(
    parent: WarmParent, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(warm, "time", SimpleNamespace(monotonic=lambda: now))
    heard = warm._heard

    def stands_still(connection: socket.socket) -> dict[str, Any]:
        nonlocal now
        if now == 0.0:
            now = math.inf
            until(lambda: says(connection))
            raise TimeoutError
        return heard(connection)

    monkeypatch.setattr(warm, "_heard", stands_still)
    offer(parent.socket, lambda: False).close()


@pytest.mark.parametrize(("number", "mute"), [(signal.SIGKILL, False), (signal.SIGSTOP, True)])
def test_a_parent_that_stands_still_is_told_from_one_that_has_ended(
    number: signal.Signals, mute: bool, tmp_path: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks the first one again waits again; the other one refuses at once."""
    (tmp_path / "entry.py").write_text(WAITS)
    monkeypatch.setattr(warm, "FORK_LIMIT_S", 0.3)
    parent = WarmParent(("entry",), environment(tmp_path))
    with offer(parent.socket, lambda: False) as offered:
        os.kill(parent.pid, number)
        until(lambda: not processes.is_running(parent.pid) or mute)
        with pytest.raises(NotWarm) as refused:
            ServerProcess([sys.executable, "-m", "entry"], environment(tmp_path), workspace, 2.0, offered)
    assert str(refused.value) == (
        f"{MUTE_PARENT}nothing within 0.3 s" if mute else "no warm parent answers: it hung up"
    )
    parent.close()


# --- a fork that fails ---


def forks_of(parent: WarmParent) -> list[int]:
    """Return the parent and all that it has forked: /proc shows the parent's command line of them too."""
    directory = str(parent.socket.parent)
    return [each.pid for each in psutil.process_iter(["cmdline"]) if directory in (each.info["cmdline"] or ())]


class Silent(warm.Offer):
    """An offer whose answer is lost after the fork, as where the parent is killed right then."""

    __slots__ = ()

    def fork(self, *arguments: Any) -> None:
        super().fork(*arguments)
        raise NotWarm("no warm parent answers: it hung up")


def test_a_guard_whose_session_has_not_heard_of_it_leaves_the_directory_alone(
    parent: WarmParent, workspace: Workspace
) -> None:
    asked = environment(INSIDE_IT="yes", TMPDIR=str(workspace.temporary))
    command = [sys.executable, "-m", ENGINE]
    with offer(parent.socket, lambda: False) as offered:
        lost = Silent(offered.threads, offered._connection)
        with pytest.raises(NotWarm):
            ServerProcess(command, asked, workspace, 0.2, lost)
    server = ServerProcess(command, asked, workspace, 0.2)
    told(server)
    until(lambda: forks_of(parent) == [parent.pid])
    assert "warm start" not in server.log_text()
    assert server._status()["guard"] == server.guard_pid
    server.stop()
    assert server.exit_code == -signal.SIGTERM


def test_a_guard_that_fails_is_no_warm_start(
    parent: WarmParent, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its server's log cannot be made, so it ends; the session need not wait until it would have given up."""
    looks: list[dict[str, Any]] = []
    looked = ServerProcess._status
    monkeypatch.setattr(ServerProcess, "_status", lambda self: looks.append(looked(self)) or looks[-1])
    workspace.log.mkdir()
    with pytest.raises(NotWarm, match="did not start the server"):
        forked(parent, workspace)
    assert len(looks) < 500  # of the 1,500 until then
    assert workspace.temporary.is_dir()


def test_a_guard_that_cannot_be_forked_is_no_warm_start(tmp_path: Path, workspace: Workspace) -> None:
    (tmp_path / "entry.py").write_text(NO_SECOND_FORK)
    parent = WarmParent(("entry",), environment(tmp_path))
    asked = environment(tmp_path)
    with pytest.raises(NotWarm, match="no guard could be forked"), offer(parent.socket, lambda: False) as offered:
        ServerProcess([sys.executable, "-m", "entry"], asked, workspace, 2.0, offered)
    parent.close()


def test_a_guard_that_hangs_in_its_making_does_not_stop_the_parent(tmp_path: Path, workspace: Workspace) -> None:
    (tmp_path / "entry.py").write_text(hanging_fork(1))
    parent = WarmParent(("entry",), environment(tmp_path))
    for _ in range(2):
        with (
            pytest.raises(NotWarm, match=r"no guard could be forked: it hung for 0\.5 s"),
            offer(parent.socket, lambda: False) as offered,
        ):
            ServerProcess([sys.executable, "-m", "entry"], environment(tmp_path), workspace, 2.0, offered)
    until(lambda: forks_of(parent) == [parent.pid])
    parent.close()


def test_a_guard_that_hangs_when_it_forks_the_server_is_ended_and_is_no_warm_start(
    tmp_path: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would remove the directory, in which a cold server is by then, when it comes to itself."""
    monkeypatch.setattr(process, "STATUS_LIMIT_S", 0.5)
    (tmp_path / "entry.py").write_text(hanging_fork(2))
    parent = WarmParent(("entry",), environment(tmp_path))
    with pytest.raises(NotWarm, match="did not start the server"), offer(parent.socket, lambda: False) as offered:
        ServerProcess([sys.executable, "-m", "entry"], environment(tmp_path), workspace, 2.0, offered)
    assert processes.working_in(workspace.root) == []
    until(lambda: forks_of(parent) == [parent.pid])
    assert workspace.temporary.is_dir()
    parent.close()


def test_a_parent_whose_script_fails_leaves_nothing_and_says_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys\nsys.exit('no such thing')")
    monkeypatch.setattr(warm, "SCRIPT", script)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    monkeypatch.setattr(temporary, "SHORT", tmp_path / "t")
    opened = sorted(Path("/proc/self/fd").iterdir())
    with pytest.raises(RuntimeError, match=r"did not start \(exit code 1\): no such thing"):
        WarmParent((ENGINE,), environment())
    assert sorted(Path("/proc/self/fd").iterdir()) == opened
    assert list((tmp_path / "t").iterdir()) == []


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
    assert set(found.victims) == set(warm_kills.VICTIMS)
    assert found.struck == found.victims - Counter(nobody=found.victims["nobody"])  # who is drawn is there to be struck
    assert (found.rounds, found.bad, found.grew) == (20, 0, False), found


@pytest.mark.parametrize(
    ("more", "code"),
    [({}, 0), ({"descriptors_gained": 1}, 1), ({"resident_gained_bytes": 2**20 + 1}, 1), ({"processes_left": 1}, 1)],
)
def test_a_parent_that_grows_under_kills_is_exit_code_1(
    more: dict[str, int], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_kills.sys, "argv", ["warm_kills.py", "1"])
    monkeypatch.setattr(warm_kills, "kill_often", lambda _: Found(rounds=1, **more))
    with pytest.raises(SystemExit) as ended:
        warm_kills.main()
    assert ended.value.code == code
