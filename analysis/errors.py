"""The one exception that analysis raises on purpose; `python -m analysis` prints it as one line and exits with 2."""

from __future__ import annotations


class AnalysisError(Exception):
    """The run directory cannot be analysed; the message is one line and names the file."""
