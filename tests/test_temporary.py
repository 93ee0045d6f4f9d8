"""Private directories: what a killed process has left in one is removed by the next, and nobody else's is."""

import errno
import fcntl
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.command_line import ROOT
from workers import temporary
from workers.launch import guard
from workers.temporary import Owned, own, private_directory, remove_ownerless

SLEEPS = "import time; time.sleep(60)"
SHARES = """
import os, time
held = os.open("/dev/shm/NAME", os.O_CREAT | os.O_RDWR)
print("made", flush=True)
time.sleep(60)
"""
CLEANS_UP = """
import pathlib, time
print("begun", flush=True)
time.sleep(1)
pathlib.Path("../cleaned").touch()
"""
OWNERS = {
    "a session": "from workers.launch.workspace import Workspace; made = Workspace.make().root",
    "a warm parent": """
import os, signal
from workers.launch.warm import WarmParent
parent = WarmParent(("json",), dict(os.environ))
os.kill(parent.pid, signal.SIGKILL)
made = parent.socket.parent
""",
}


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return an empty TMPDIR, short enough for sockets; what lies in /tmp is not looked at."""
    with tempfile.TemporaryDirectory(prefix="vct-", dir="/tmp") as made:
        monkeypatch.setattr(tempfile, "tempdir", made)
        monkeypatch.setattr(temporary, "SHORT", Path(made))
        yield Path(made)


def left_by_a_killed_process(prefix: str = "x-") -> Path:
    directory = private_directory(prefix, 1)
    os.close(own(directory))
    return directory


def working_in(directory: Path, program: str) -> "subprocess.Popen[str]":
    """Start a program there as a server is started, and wait for its first word if it has one."""
    environment = {**os.environ, "TMPDIR": str(directory)}
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=directory, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    if "print" in program:
        process.stdout.readline()
    process.stdout.close()
    return process


def test_only_directories_whose_owner_is_dead_are_removed_and_what_works_in_them_is_ended(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(temporary, "ENDING_LIMIT_S", 0.1)
    alive, unmarked, dead = Owned("x-", 1), private_directory("x-", 1), left_by_a_killed_process()
    made_hours_ago(alive.path)
    (place / "x-link").symlink_to(dead)
    works = working_in(dead, SLEEPS)
    assert remove_ownerless("x-") == [dead]
    assert works.wait(10) == -9
    assert (alive.path.exists(), unmarked.exists(), dead.exists()) == (True, True, False)
    alive.remove()
    alive.remove()
    assert remove_ownerless("x-") == []


@pytest.mark.parametrize("who", OWNERS)
def test_what_a_killed_process_had_made_is_known_for_it_from_the_making_on(who: str, place: Path) -> None:
    program = f"{OWNERS[who]}\nprint(made, flush=True)\nimport time; time.sleep(60)"
    owner = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "TMPDIR": str(place)}, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert owner.stdout
    made = Path(owner.stdout.readline().strip())
    assert remove_ownerless() == []
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert remove_ownerless() == [made]
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("environment", [{}, {"TMPDIR": "/tmp"}])
def test_a_users_shell_that_stands_there_lives_on(environment: dict[str, str], place: Path) -> None:
    inherited = {name: value for name, value in os.environ.items() if name != "TMPDIR"}
    dead = left_by_a_killed_process()
    shell = subprocess.Popen(["sh"], cwd=dead, env=inherited | environment, stdin=subprocess.PIPE)
    assert remove_ownerless("x-") == [dead]
    shell.communicate(b"exit 7")
    assert shell.returncode == 7


TITLED = """
import setproctitle, time
setproctitle.setproctitle("VLLM::EngineCore")
print("titled", flush=True)
time.sleep(60)
"""
FORKED = """
import os, time
os.chdir("../OTHER")
print("forked", flush=True)
time.sleep(60)
"""


def test_an_engine_whose_title_stands_where_its_environment_was_is_ended(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("setproctitle")
    monkeypatch.setattr(temporary, "ENDING_LIMIT_S", 0.1)
    works = working_in(left_by_a_killed_process(), TITLED)
    assert psutil.Process(works.pid).environ() == {}
    remove_ownerless("x-")
    assert works.wait(10) == -9


def test_a_server_that_was_forked_is_ended_by_where_it_works(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its environment shows the warm parent's TMPDIR, and that directory may be gone."""
    monkeypatch.setattr(temporary, "ENDING_LIMIT_S", 0.1)
    parents, dead = Owned(temporary.PREFIX, 1), left_by_a_killed_process()
    works = working_in(parents.path, FORKED.replace("OTHER", dead.name))
    parents.remove()
    assert remove_ownerless("x-") == [dead]
    assert works.wait(10) == -9


KILLED_BEFORE_IT_OWNS = """
import fcntl, os, signal
from workers.temporary import Owned
fcntl.flock = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
Owned("x-", 1)
"""


def made_hours_ago(directory: Path) -> Path:
    os.utime(directory, (time.time() - 7200, time.time() - 7200))
    return directory


def test_what_was_killed_before_it_owned_its_directory_is_known_by_its_age(place: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(place)}
    killed = subprocess.run([sys.executable, "-c", KILLED_BEFORE_IT_OWNS], cwd=ROOT, env=environment, check=False)
    assert killed.returncode == -9
    (half,) = place.iterdir()
    assert [path.name for path in half.iterdir()] == [temporary.UNSEEN]
    empty, users = (private_directory("x-", 1) for _ in range(2))
    (users / "file").touch()
    assert remove_ownerless("x-") == []
    for directory in (half, empty, users):
        made_hours_ago(directory)
    assert sorted(remove_ownerless("x-")) == sorted([half, empty])
    assert list(users.iterdir()) == [users / "file"]


def test_who_cleans_up_is_let_to(place: Path) -> None:
    works = working_in(left_by_a_killed_process(), CLEANS_UP)
    remove_ownerless("x-")
    assert works.wait(10) == 0
    assert [path.name for path in place.iterdir()] == ["cleaned"]


def test_what_a_guard_removes_by_itself_is_not_said_to_have_been_left(place: Path) -> None:
    directory = left_by_a_killed_process()
    works = working_in(directory, CLEANS_UP + "import shutil, os; shutil.rmtree(os.getcwd())")
    assert remove_ownerless("x-") == []
    assert works.wait(10) == 0


def test_shared_memory_of_what_is_killed_goes_with_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temporary, "ENDING_LIMIT_S", 0.1)
    shared = Path("/dev/shm", place.name)
    works = working_in(left_by_a_killed_process(), SHARES.replace("NAME", shared.name))
    assert shared.exists()
    remove_ownerless("x-")
    assert works.wait(10) == -9
    assert not shared.exists()


def test_shared_memory_is_known_still_when_all_who_shared_it_and_who_killed_them_are_dead(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = Path("/dev/shm", place.name)
    directory = left_by_a_killed_process()
    works = working_in(directory, SHARES.replace("NAME", shared.name))
    with monkeypatch.context() as patched:
        patched.setattr(guard, "remove", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            temporary.end_what_works_in(directory, 0.0)
    assert works.wait(10) == -9
    assert shared.exists()
    assert remove_ownerless("x-") == [directory]
    assert not shared.exists()


def test_what_lies_in_tmp_because_tmpdir_is_long_is_found_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = place / ("n" * 70)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    short = private_directory("x-", 30)
    assert short.parent == place
    os.close(own(short))
    assert remove_ownerless("x-") == [short]
    below = left_by_a_killed_process()
    assert below.parent == long
    assert remove_ownerless("x-") == [below]


def test_directories_of_other_hosts_are_left_alone(place: Path) -> None:
    directory = left_by_a_killed_process()
    (directory / temporary.OWNER).write_text("another-host")
    assert remove_ownerless("x-") == []
    assert directory.exists()


def test_an_owner_that_is_dying_has_time_for_it(place: Path) -> None:
    held = Owned("x-", 1)
    assert remove_ownerless("x-") == []
    dies = threading.Timer(0.3, lambda: os.close(held._lock))
    dies.start()
    assert remove_ownerless("x-", patience_s=20) == [held.path]


def test_a_file_system_without_locks_is_said_with_what_to_do(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuses)
    with pytest.raises(OSError, match=rf"TMPDIR={place} cannot be locked \(No locks available\): export TMPDIR="):
        Owned("x-", 1)
    assert list(place.iterdir()) == []


def test_a_directory_is_removed_while_others_write_into_it(place: Path) -> None:
    over = threading.Event()

    def write() -> None:
        while not over.is_set():
            for number in range(50):
                for directory in list(directories):
                    try:
                        (directory / f"{number}").touch()
                    except OSError:
                        continue

    directories: list[Path] = []
    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(20):
            directories.append(left_by_a_killed_process())
            time.sleep(0.02)
            guard.remove_directory(directories[-1])
            directories.clear()
    finally:
        over.set()
        writer.join()
    assert list(place.iterdir()) == []


def test_who_is_killed_in_the_middle_of_removing_leaves_what_the_next_one_finds(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = left_by_a_killed_process()
    (directory / "sub").mkdir()
    (directory / "sub" / "file").touch()
    with monkeypatch.context() as patched:
        patched.setattr(guard.shutil, "rmtree", lambda *_, **__: sys.exit("killed"))
        with pytest.raises(SystemExit):
            guard.remove_directory(directory)
    (half,) = place.iterdir()
    assert remove_ownerless("x-") == [half]
    assert list(place.iterdir()) == []
