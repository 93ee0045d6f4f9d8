"""What is printed, for a reader who may leave before the end (`| head`): the run goes on, its exit code is its own.

A run measures for hours and all that it finds is on disk: a closed pipe is no reason to lose it, or to fail a point.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any, TextIO


class _Outliving(io.FileIO):
    """A file whose reader may go: what is written after that goes nowhere."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            # as the documentation of Python's signal module does; children that inherit the descriptor are quiet, too
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return super().write(data)


def outlives_its_reader() -> None:
    """Let standard output and standard error go on without a reader. At a program's start: it replaces both streams."""
    if sys.stdout is not None:  # as where a shell closed it (`>&-`)
        sys.stdout = _outliving(sys.stdout)
    if sys.stderr is not None:
        sys.stderr = _outliving(sys.stderr)


def _outliving(stream: TextIO) -> io.TextIOWrapper:
    raw = _Outliving(stream.fileno(), "wb", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), stream.encoding, stream.errors, line_buffering=True, write_through=False
    )
