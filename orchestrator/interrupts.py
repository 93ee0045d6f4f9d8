"""Ctrl-C and SIGTERM: raised as a KeyboardInterrupt, but never in the middle of starting or ending Ray."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """An interrupt that can be answered wherever it is met.

    Python ends `python -m` by SIGINT, whatever exit code it was given, where a plain KeyboardInterrupt has come out of
    the last code that was run from a string, caught or not (Python 3.11, `run_eval_code_obj` in pythonrun.c asks for
    that very type); and an import makes its data classes and named tuples of strings.
    """


def raise_on_all() -> None:
    """Let SIGTERM (`ray job stop`, `kill`) and a closed terminal end the program as Ctrl-C does, all cleaned up."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted

    for number in _heeded():
        signal.signal(number, interrupt)


def ignore() -> None:
    """Heed no more of them: the program ends already, by its own exit code (`timeout` and terminals send one twice)."""
    for number in _heeded():
        signal.signal(number, signal.SIG_IGN)


def _heeded() -> list[signal.Signals]:
    """Not those that whoever started us has set to be ignored (`nohup`, a script's background job)."""
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


@contextlib.contextmanager
def handled_by(loop: asyncio.AbstractEventLoop, callback: Callable[[int], None]) -> Iterator[None]:
    """Let `callback` answer interrupts, by their number, while `loop` runs the block; afterwards they are as before."""
    before = {number: signal.getsignal(number) for number in _heeded()}
    for number in before:
        loop.add_signal_handler(number, callback, number)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


@contextlib.contextmanager
def deferred() -> Iterator[list[int]]:
    """Hold interrupts back until the block is done, then raise: half a Ray, or half an event loop, could not be ended.

    Yields the list of those received; a block that has answered them clears it.
    """
    received: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: received.append(number)) for number in _heeded()}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if received:
            raise Interrupted
