"""Private temporary directories with paths short enough for the Unix sockets that are made below them."""

from __future__ import annotations

import tempfile
from pathlib import Path

SOCKET_PATH_CHARACTERS = 107
"""What a Unix socket's path may have (unix(7))."""


def private_directory(prefix: str, below: int) -> Path:
    """Make a 0700 directory in the user's TMPDIR, or in /tmp where that is too long.

    `below` is how many characters the longest socket's path adds to it.
    """
    directory = Path(tempfile.mkdtemp(prefix=prefix))
    if len(str(directory)) + below <= SOCKET_PATH_CHARACTERS:
        return directory
    directory.rmdir()
    return Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))
