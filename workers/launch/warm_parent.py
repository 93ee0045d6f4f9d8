"""Imports a server's modules once and forks servers from then on. Standard library only, beside what it is to import.

    warm_parent.py OWNER_FD LISTENER_FD PRIVATE_DIR MODULE[:FUNCTION]...

Started by `workers.launch.warm`, which makes the socket that it listens on. The first MODULE is what a cold start runs
with `python -m`; a forked server runs it the same way. A FUNCTION is called, for what it imports in turn. It ends,
importing or not, when OWNER_FD's other end closes, and takes PRIVATE_DIR with it. It never touches a GPU and starts no
thread; where a module that it imports does, or a fork made for trial fails, it forks no server, and says why to all who
ask.

A forked server is as a fresh process would be: process group, signals, standard streams, directory, environment,
`sys.path`, argv, random state, temporary directory. Torch's random state is what the import left, as in any process.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import multiprocessing
import os
import random
import re
import runpy
import select
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from workers.launch import guard
else:
    import guard

    del sys.path[0], sys.modules["guard"]  # the directory of this file is nothing that a server should import from

READ_LATE = (
    "CUDA_VISIBLE_DEVICES", "PYTHONPATH", "TMPDIR", "VLLM_API_KEY", "VLLM_RPC_BASE_PATH", "VLLM_SERVER_DEV_MODE",
    "VLLM_WORKER_MULTIPROC_METHOD",
)  # fmt: skip
"""Variables that nothing looks at while it is imported, or that a forked server sets anew: they may differ from the
parent's. Any other one that does is a reason for a cold start. That nothing has kept what CUDA_VISIBLE_DEVICES was in
the parent is proven of each server by the memory of its cards (`workers.session`)."""
MESSAGE_BYTES = 2**20
CLIENT_LIMIT_S = 10.0
"""For a session to send its request: others wait meanwhile."""
FORK_LIMIT_S = 10.0
"""For a fork that only forks or ends to end: milliseconds, unless it hangs."""
KILLED_LIMIT_S = 1.0
THREAD_LIMIT_S = 1.0
"""For a thread that was ended before a fork to be gone from /proc."""
POLL_S = 0.005
PID_FILE = "pid"
DEADLINE_FILE = "deadline"
"""Until when it may import, on the clock of `time.monotonic`, which all processes of a node share."""
FORKED_BESIDE = "warm start: forked beside Python threads"
"""In the log of a forked server that forks in turn and leaves threads behind; their names follow."""
CUDA_DRIVER = "libcuda.so.1"
CUDA_ERROR_NOT_INITIALIZED = 3
IN_COMMON = re.compile(r"anon_inode:|socket:|pipe:")
"""What all forks would share: an event loop has an epoll, for instance, a timer a timerfd."""
CARDS_MEMORY = "/dev/nvidia-uvm"
OF_NVML = re.compile(r"anon_inode:\[eventfd\]$|pipe:")
"""What comes with that. NVML opens it, by which vLLM looks at cards while it is imported (driver 580.159, by the stack
of the call); forks serve as cold ones do."""

HARMLESS_THREADS = re.compile(r"cuda[0-9a-f]+|jemalloc_bg_thd")
"""Of libraries in C that keep them over a fork, and whose forks serve without, with a cold one's memory (seen on H100s
and H200s with vLLM 0.25.1, driver 580.159): one of NVML's, and the one in which pyarrow's jemalloc gives memory back:
where it is forked, threads that allocate do that. A thread in C that has no name of its own has the program's."""

NO_FULL_COLLECTION = 10**9
"""For `gc.set_threshold`: collections of what is new, but none of everything, which are a quarter of an import's CPU
time and find little. Python 3.14 has none of those, and ignores it.

Those of what is new stay, so that memory is laid out as in a cold server: with none at all an import of vLLM has some
22,600 dead objects among those that stay, until it is over, and what is made later lies in their gaps; with these it is
400, with all of them 200."""

FRAME_ROOM = 2**17
"""In words, 1 MiB: the size of a frame, for which CPython takes 2 MiB, so that half is left for the frames above it.
What is not used of it is never touched.

CPython (3.11 and later) keeps frames in chunks of 16 KiB, and gives one back when its last frame ends. A loop whose
calls straddle a chunk's end maps and unmaps one at each call (CPython issue 142183; a 3.13 of 2026 keeps one). An
engine that its server forks stands on the server's frames, so that chunks end elsewhere than in a new program: seven
calls a layer of each prefill of vLLM 0.25.1 did so (Python 3.12, H200), none of a cold one's."""


class NotFit(Exception):
    """Why a server forked from here could be another than one started cold."""


@dataclass
class Imported:
    """What the import has left in this process."""

    entry: str
    environment_before: dict[str, str]
    path_before: list[str]
    problem: str | None = None

    @classmethod
    def of(cls, modules: list[str], deadline: float) -> Imported:
        """Import the modules. One that is not there is a problem if a cold start would run it, and so is a late end."""
        made = cls(modules[0], dict(os.environ), list(sys.path))
        opened = _descriptors()
        thresholds = gc.get_threshold()
        ours = (*thresholds[:2], NO_FULL_COLLECTION)
        gc.set_threshold(*ours)
        for name in modules:
            try:
                _load(name, optional=name != made.entry)
            except BaseException as error:
                made.problem = f"{name} could not be imported: {type(error).__name__}: {error}"
                break
        else:
            made.problem = opened_problem(opened, _descriptors())
        if time.monotonic() > deadline:  # sessions have started cold meanwhile: from now on all do
            made.problem = "its import was not over in time"
        if gc.get_threshold() == ours:  # an import may set its own
            gc.set_threshold(*thresholds)
        gc.collect()
        gc.freeze()  # pages that the collector does not write to stay shared with the servers
        made.problem = made.problem or python_threads_problem() or fork_problem()
        return made

    def check(self) -> None:
        """Raise `NotFit` where no server may be forked."""
        if self.problem:
            raise NotFit(self.problem)
        torch: Any = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            raise NotFit("an import has initialised CUDA")
        driver = loaded(CUDA_DRIVER)
        if driver is not None and (problem := initialised_problem(driver)):
            raise NotFit(problem)
        if problem := python_threads_problem() or left_threads_problem():
            raise NotFit(problem)

    def check_environment(self, asked: dict[str, str]) -> None:
        """Raise `NotFit` where a variable that an import may have read has another value in the parent."""
        names = sorted(
            name
            for name in asked.keys() | self.environment_before.keys()
            if name not in READ_LATE and asked.get(name) != self.environment_before.get(name)
        )
        if names:
            raise NotFit(f"its environment is not the one that was imported in: {', '.join(names)}")

    def environment(self, asked: dict[str, str]) -> dict[str, str]:
        """Return what a cold process would have: `asked`, and what the import adds to it.

        Where it has set one of the variables that may differ, it has done so for the parent: there `asked` counts.
        """
        own, its = self.environment_before.get("TMPDIR"), asked.get("TMPDIR")
        added = {name: value for name, value in os.environ.items() if self.environment_before.get(name) != value}
        if own and its:
            added = {name: value.replace(own, its) for name, value in added.items()}
        return {**asked, **{name: value for name, value in added.items() if name not in READ_LATE or name not in asked}}

    def path(self, asked: dict[str, str], directory: str) -> list[str]:
        """Return `sys.path` as `python -m` in that directory would have it, after the import."""
        own = _paths(self.environment_before)
        kept = [entry for entry in self.path_before if entry not in own]
        added = [entry for entry in sys.path if entry not in self.path_before]
        return [directory, *_paths(asked), *kept, *added]


@dataclass
class Request:
    """One server to start."""

    module: str
    arguments: list[str]
    environment: dict[str, str]
    directory: str
    log: str
    status: str
    grace_s: float


@dataclass
class Forked:
    """A server as its guard sees it."""

    pid: int
    returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, where it has ended."""
        if self.returncode is None:
            with contextlib.suppress(ChildProcessError):
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


class Parent:
    """This process: it imports, then forks a server for each request."""

    def __init__(self, owner_fd: int, listener_fd: int, private_dir: Path, modules: list[str]) -> None:
        """Import; who asks meanwhile waits."""
        self._owner_fd = owner_fd
        _end_with(owner_fd, private_dir)
        self._listener = socket.socket(fileno=listener_fd)
        self.imported = Imported.of(modules, float((private_dir / DEADLINE_FILE).read_text()))

    def serve(self) -> Request:
        """Fork servers for all who ask. Returns in a forked server only."""
        while True:
            connection, _ = self._listener.accept()
            with connection:
                connection.settimeout(CLIENT_LIMIT_S)
                request = self._answer(connection)
            if request is not None:
                return request

    def _answer(self, connection: socket.socket) -> Request | None:
        """Say whether a server can be forked; take one request and fork it. Returns the request in the server only."""
        fds: list[int] = []
        try:
            if _peer(connection) != os.getuid():
                return None
            self.imported.check()
            _say(connection, {"threads": _threads()})
            text, fds = _heard(connection)
            if len(fds) != 1:
                return None  # it has thought better of it
            request = Request(**json.loads(text))
            if request.module != self.imported.entry:
                raise NotFit(f"{request.module} is not what was imported")
            self.imported.check_environment(request.environment)
            if self._forked(request, fds[0], connection):
                return request
            _say(connection, {"forked": True})  # its guard waits until the session has heard this, and says so
        except NotFit as error:
            _refuse(connection, str(error))
        except TimeoutError:
            _refuse(connection, f"this session sent no request within {CLIENT_LIMIT_S:g} s of the warm parent's answer")
        except (OSError, ValueError, TypeError) as error:  # a client that has gone, or is none of ours
            print(f"a request was not answered: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            for fd in fds:
                os.close(fd)
        return None

    def _forked(self, request: Request, its_owner_fd: int, connection: socket.socket) -> bool:
        """Fork a guard, which forks the server. Returns True in the server; the guard does not return."""
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child:
            if problem := _ending_problem(child):
                raise NotFit(f"no guard could be forked: {problem}")
            return False
        try:
            self._listener.close()
            os.close(self._owner_fd)
            connection.close()
            os.chdir(request.directory)  # first, so that whoever hangs from here on is found there
            its_guard = guard.Guard(its_owner_fd, Path(request.status), request.grace_s, Path(request.directory))
            if not its_guard.is_wanted():
                os._exit(0)
            _streams(request.log)
            its_pid = os.getpid()
            server = os.fork()
            if not server:
                guard.end_with_parent(its_pid)
                return True
            _close_all_but(its_owner_fd)  # the import's, NVML's too: a guard uses none of it
            its_guard.watch(Forked(server))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)


def _load(name: str, optional: bool) -> None:
    """Import a module; where a function of it follows a colon, and it has that, call it."""
    module, _, function = name.partition(":")
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError:
        if not optional:
            raise
        return
    if hasattr(loaded, function):
        getattr(loaded, function)()


def _descriptors() -> dict[int, str]:
    """What this process has open, by descriptor."""
    opened = {}
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # that of the directory itself
            opened[int(fd.name)] = str(fd.readlink())
    return opened


def opened_problem(before: dict[int, str], after: dict[int, str]) -> str | None:
    """Return what an import has opened that servers must not have in common, in words; None where there is nothing."""
    opened = {name for fd, name in after.items() if before.get(fd) != name}
    common = {name for name in opened if IN_COMMON.match(name)}
    if CARDS_MEMORY in opened:
        common -= {name for name in common if OF_NVML.match(name)}
    return f"an import has opened what all forks would share: {', '.join(sorted(common))}" if common else None


def loaded(library: str) -> Any | None:
    """Return a shared library that this process has loaded; None where it has not, and it is not loaded now either."""
    try:
        return ctypes.CDLL(library, os.RTLD_NOLOAD)
    except OSError:
        return None


def initialised_problem(driver: Any) -> str | None:
    """Return in words that CUDA's driver is initialised in this process, or does not say; None where it is not.

    A fork could not use it. Initialises nothing: asked before `cuInit`, the driver answers with an error.
    """
    result = driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int()))
    if result == CUDA_ERROR_NOT_INITIALIZED:
        return None
    if result:
        return f"CUDA's driver does not say whether an import has initialised it: cuDeviceGetCount fails with {result}"
    return "an import has initialised CUDA's driver"


def fork_problem() -> str | None:
    """Fork once for trial, and return in words why no fork would do; None where it does.

    Libraries that foresee forks end their threads before one (OpenBLAS): what there is afterwards, every fork of this
    process leaves behind.
    """
    try:
        child = os.fork()
    except OSError as error:
        return f"it cannot fork: {error}"
    if not child:
        os._exit(0)
    if problem := _ending_problem(child):
        return f"a fork for trial failed: {problem}"
    deadline = time.monotonic() + THREAD_LIMIT_S
    while (problem := left_threads_problem()) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return problem


def python_threads_problem() -> str | None:
    """Return in words which Python threads there are beside the first; None where there is none."""
    names = sorted(thread.name for thread in threading.enumerate() if thread is not threading.main_thread())
    return f"an import has started threads: {', '.join(names)}" if names else None


def left_threads_problem() -> str | None:
    """Return in words which threads, of libraries in C too, a fork leaves behind that it may need; None where none."""
    names = sorted({name for name in _threads() if not HARMLESS_THREADS.fullmatch(name)})
    return f"an import has started threads that forks would lack: {', '.join(names)}" if names else None


def _ending_problem(child: int) -> str | None:
    """Wait until a child ends; return in words that it failed, or hung, and is killed. None where all is well."""
    status = _ended(child, FORK_LIMIT_S)
    if status is None:
        os.kill(child, signal.SIGKILL)
        _ended(child, KILLED_LIMIT_S)
        return f"it hung for {FORK_LIMIT_S:g} s"
    return f"exit code {os.waitstatus_to_exitcode(status)}" if status else None


def _ended(child: int, limit_s: float) -> int | None:
    """The status of a child that ends within the limit."""
    deadline = time.monotonic() + limit_s
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        if time.monotonic() > deadline:
            return None
        time.sleep(POLL_S)


def _close_all_but(kept: int) -> None:
    """Close all descriptors but the standard ones and this one."""
    for fd in _descriptors():
        if fd > 2 and fd != kept:
            os.close(fd)


def _streams(log: str) -> None:
    """Nothing to read, and the log to write to."""
    for path, flags, fds in ((os.devnull, os.O_RDONLY, (0,)), (log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, (1, 2))):
        opened = os.open(path, flags, 0o600)
        for fd in fds:
            os.dup2(opened, fd)
        os.close(opened)


def become(request: Request, imported: Imported) -> None:
    """Make this forked process what a fresh one would be."""
    environment, path = imported.environment(request.environment), imported.path(request.environment, request.directory)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if signal.getsignal(number) is not signal.SIG_IGN:  # by nohup, say: that a fresh one has, too
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # as Python does at its start
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = path
    sys.argv[:] = [request.module, *request.arguments]
    tempfile.tempdir = None
    random.seed()
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()
    multiprocessing.current_process().authkey = os.urandom(32)
    if not hasattr(sys.modules.get("vllm.utils.gc_utils"), "freeze_gc_heap"):
        gc.unfreeze()  # else vLLM freezes them too when it is ready; until then no collection need write to them all
    del sys.modules[request.module]  # `python -m` runs its module as `__main__` alone
    os.register_at_fork(before=_tell_threads)


def _tell_threads() -> None:
    """Say in the log which Python threads a fork of this process leaves behind, and with them the locks they hold.

    A cold server makes its processes anew, so the session takes this one for damaged.
    """
    names = sorted(thread.name for thread in threading.enumerate() if thread is not threading.current_thread())
    if names:
        os.write(2, f"{FORKED_BESIDE}: {', '.join(names)}\n".encode())


def _peer(connection: socket.socket) -> int:
    """The user at the other end."""
    size = struct.calcsize("3i")
    return int(struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[1])


def _heard(connection: socket.socket) -> tuple[bytes, list[int]]:
    """All that a client sends, and the descriptors with it."""
    text, fds, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 1)
    while more := connection.recv(MESSAGE_BYTES):
        text += more
    return text, fds


def _say(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _refuse(connection: socket.socket, why: str) -> None:
    with contextlib.suppress(OSError):
        _say(connection, {"refused": why})


def _threads() -> list[str]:
    """Names of this process's threads but its first, those of libraries in C too: forks do not have them."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        if task.name != str(os.getpid()):
            with contextlib.suppress(OSError):
                names.append((task / "comm").read_text().strip())
    return sorted(names)


def _paths(environment: dict[str, str]) -> list[str]:
    return [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]


def _end_with(owner_fd: int, private_dir: Path) -> None:
    """Have the kernel say when the pipe's other end closes, for an import does not look."""

    def ended(_number: int, _frame: FrameType | None) -> NoReturn:
        guard.remove_directory(private_dir)
        os._exit(0)

    signal.signal(signal.SIGIO, ended)
    fcntl.fcntl(owner_fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(owner_fd, fcntl.F_SETFL, fcntl.fcntl(owner_fd, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([owner_fd], [], [], 0)[0]:
        ended(signal.SIGIO, None)


def _leave_owner(pid_file: Path) -> None:
    """Be nobody's child and in nobody's group: Ray kills an actor's, and nobody would remove the directory."""
    child = os.fork()
    if child:
        pid_file.write_text(str(child))
        os._exit(0)
    os.setpgid(0, 0)


def main(argv: list[str]) -> None:
    """Import, fork; in a forked server: be it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's is for the run to act on
    _leave_owner(Path(argv[2]) / PID_FILE)
    parent = Parent(int(argv[0]), int(argv[1]), Path(argv[2]), argv[3:])
    request = parent.serve()
    become(request, parent.imported)
    print(f"warm start: forked from a process that had imported {request.module}", flush=True)
    run_in_room(request.module)


def run_in_room(module: str) -> None:
    """Run a module as `python -m` does. Its frames and those of all that it calls in this thread, forks of it too, lie
    in one piece of memory."""
    runpy.run_module(module, run_name="__main__", alter_sys=True)


run_in_room.__code__ = run_in_room.__code__.replace(co_stacksize=FRAME_ROOM)


if __name__ == "__main__":
    main(sys.argv[1:])
