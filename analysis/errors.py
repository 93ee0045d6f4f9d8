"""The one exception that analysis raises on purpose; `python -m analysis` prints it as one line and exits with 2."""

from __future__ import annotations


class AnalysisError(Exception):
    """The run directory cannot be analysed; the message is one line and names the file."""


def first_line(error: BaseException) -> str:
    """Return what a foreign error says, short enough for a message of ours; its name where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
