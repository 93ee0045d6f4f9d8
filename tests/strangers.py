"""A second user of this host: what it can do is tried as that user, in a forked process."""

import json
import os
import subprocess
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stranger() -> Iterator[int]:
    """Make a user and lend its id. Raises `OSError` where users cannot be made."""
    name = f"vct{os.getpid()}"
    try:
        subprocess.run(["useradd", "--system", "--no-create-home", name], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise OSError(error.stderr.strip()) from None
    try:
        yield int(subprocess.run(["id", "-u", name], check=True, capture_output=True, text=True).stdout)
    finally:
        subprocess.run(["userdel", name], check=False, capture_output=True)


def start_as(user: int, act: Callable[[], Any]) -> tuple[int, int]:
    """Fork a process of that user; return its id and the pipe on which it will say what `act` returned (JSON)."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child:
        os.close(write_end)
        return child, read_end
    try:
        os.close(read_end)
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
        said: Any = act()
    except BaseException as error:
        said = {"raised": type(error).__name__, "where": traceback.format_exc()}
    os.write(write_end, json.dumps(said).encode())
    os._exit(0)


def heard(child: int, read_end: int) -> Any:
    """Wait for a process of `start_as` and return what it said."""
    with os.fdopen(read_end) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return json.loads(said)


def as_user(user: int, act: Callable[[], Any]) -> Any:
    """Return what `act` returns when that user does it; `{"raised": NAME}` for an exception."""
    return heard(*start_as(user, act))
