"""What is said while nobody reads: no run waits for it, all of it comes in its order, and what had no room is said."""

import contextlib
import io
import os
import pty
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import pytest

from contract.rows import MEASURED
from orchestrator import printer
from orchestrator.printer import Printer, to_file
from orchestrator.progress import Progress
from tests.test_driver import LEVELS, PretendedCluster, drive, statuses

WATCH_S = 30.0
SHOWN_CURSOR = "\x1b[?25h"


@dataclass
class FullPipe:
    """A pipe with room for nothing more, until `read` is called."""

    reads: int
    stream: TextIO
    fill: int
    read_in_vain: bool = False
    """Whether somebody had to read, or what is tested would have stood still for ever."""
    _reader: threading.Thread | None = None
    _got: bytearray = field(default_factory=bytearray)

    def read(self) -> None:
        """Begin to read, if that has not begun."""
        if self._reader is None:
            self._reader = threading.Thread(target=self._read)
            self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # so a terminal ends
            while some := os.read(self.reads, 65536):
                self._got += some

    def give_up(self) -> None:
        self.read_in_vain = True
        self.read()

    def lines(self) -> list[str]:
        """Return all that was written, at the end of it."""
        self.stream.close()
        self.read()
        assert self._reader
        self._reader.join(WATCH_S)
        return bytes(self._got[self.fill :]).decode().splitlines()


def filled(writes: int) -> int:
    """Fill a pipe or terminal. Returns by how many bytes."""
    os.set_blocking(writes, False)
    fill = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            fill += os.write(writes, b"." * 4096)
    os.set_blocking(writes, True)
    return fill


@contextlib.contextmanager
def watched(pipe: FullPipe) -> Iterator[FullPipe]:
    watch = threading.Timer(WATCH_S, pipe.give_up)
    watch.start()
    yield pipe
    watch.cancel()
    pipe.lines()
    os.close(pipe.reads)


@pytest.fixture
def full_pipe() -> Iterator[FullPipe]:
    reads, writes = os.pipe()
    with watched(FullPipe(reads, os.fdopen(writes, "w"), filled(writes))) as pipe:
        yield pipe


@pytest.fixture
def terminal() -> Iterator[FullPipe]:
    """One that nobody reads, not full yet: a live line begins before anything hangs on it."""
    reads, writes = pty.openpty()
    with watched(FullPipe(reads, os.fdopen(writes, "w"), 0)) as pipe:
        yield pipe


def test_a_run_does_not_wait_for_who_reads_what_it_says(full_pipe: FullPipe, tmp_path: Path) -> None:
    """Servers live as long as the loop renews their leases: a loop that waits for a reader costs them all."""
    progress = Progress(len(LEVELS), 1.0, full_pipe.stream)
    ran = drive(PretendedCluster(), tmp_path, progress=progress)
    assert not full_pipe.read_in_vain
    assert statuses(ran) == dict.fromkeys(LEVELS, (MEASURED, None, 1))
    full_pipe.read()
    progress.close()
    lines = full_pipe.lines()
    assert [line.partition("] ")[2][:7] for line in lines] == ["ready  ", "[1/3] t", "[2/3] t", "[3/3] t"], lines


def test_what_has_no_room_is_counted_and_said(full_pipe: FullPipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(printer, "LINES_KEPT", 3)
    taken, write = threading.Event(), to_file(full_pipe.stream)

    def slowly(line: str) -> None:
        taken.set()
        write(line)

    printing = Printer(slowly)
    printing.put("first")
    assert taken.wait(WATCH_S)
    for number in range(8):
        printing.put(str(number))
    assert not full_pipe.read_in_vain
    full_pipe.read()
    printing.close()
    assert full_pipe.lines() == ["first", "0", "1", "2", "5 line(s) are not printed here: nobody read for so long"]


def test_the_end_is_not_waited_for_for_ever(full_pipe: FullPipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(printer, "LAST_WORDS_S", 0.05)
    printing = Printer(to_file(full_pipe.stream))
    printing.put("last words")
    printing.close()
    assert not full_pipe.read_in_vain
    full_pipe.read()
    printing._thread.join(WATCH_S)
    assert full_pipe.lines() == ["last words"]


def test_the_end_is_not_waited_for_for_ever_on_a_terminal(terminal: FullPipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(printer, "LAST_WORDS_S", 0.05)
    monkeypatch.setenv("TERM", "xterm")
    streams = sys.stdout, sys.stderr
    progress = Progress(1, 1.0, terminal.stream)
    assert (sys.stdout, sys.stderr) == streams, "who prints would wait for the terminal"
    own = os.open(os.ttyname(terminal.stream.fileno()), os.O_WRONLY | os.O_NOCTTY)
    filled(own)
    os.close(own)
    progress.say("last words")
    progress.close()
    assert not terminal.read_in_vain
    terminal.read()
    progress._printer._thread.join(WATCH_S)
    said = "\n".join(terminal.lines())
    assert said.index("last words") < said.index(SHOWN_CURSOR), said


def test_the_end_waits_once_however_much_is_left(full_pipe: FullPipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(printer, "LINES_KEPT", 2)
    monkeypatch.setattr(printer, "LAST_WORDS_S", 0.05)
    taken, ended, write = threading.Event(), threading.Event(), to_file(full_pipe.stream)

    def slowly(line: str) -> None:
        taken.set()
        write(line)

    printing = Printer(slowly, ended.set)
    printing.put("first")
    assert taken.wait(WATCH_S)
    for number in range(4):
        printing.put(str(number))
    printing.close()
    assert not full_pipe.read_in_vain
    assert not ended.is_set()
    full_pipe.read()
    assert ended.wait(WATCH_S), "a full queue cost the end"
    assert full_pipe.lines() == ["first", "0", "1", "2 line(s) are not printed here: nobody read for so long"]


def test_a_reader_that_is_gone_costs_lines_only() -> None:
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as stream:
        printing = Printer(to_file(stream))
        printing.put("a")
        printing.put("b")
        printing.close()
        assert not printing._thread.is_alive()


def test_what_is_no_file_is_written_to_as_well() -> None:
    said = io.StringIO()
    printing = Printer(to_file(said))
    for word in ("a", "b"):
        printing.put(word)
    printing.close()
    assert said.getvalue() == "a\nb\n"
