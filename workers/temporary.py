"""Private temporary directories with paths short enough for the Unix sockets that are made below them."""

from __future__ import annotations

import tempfile
from pathlib import Path

LONGEST_PATH = 40
"""Characters. Ray's and vLLM's sockets add up to about 65, and a socket's path has 107 (unix(7))."""


def private_directory(prefix: str) -> Path:
    """Make a 0700 directory below the user's TMPDIR, or below /tmp where that path is too long for sockets."""
    directory = Path(tempfile.mkdtemp(prefix=prefix))
    if len(str(directory)) <= LONGEST_PATH:
        return directory
    directory.rmdir()
    return Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))
