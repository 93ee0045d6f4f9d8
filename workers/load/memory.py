"""What a load's answers take until they are judged, and whether the host has it. Asked before anything is sent.

In a window nothing is parsed (`workers.load.client`), so every read of every answer is kept until it has closed.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil

from contract.lengths import Lengths, expected

BYTES_A_TOKEN = 450
"""A token that came in a chunk of its own: the bytes that vLLM writes for it, two Python objects and their places, and
its gap in the request's row. Of reads of 298 bytes, 10 ms apart, 419 were measured (tests/test_load_memory.py)."""
BYTES_BESIDE = 2**14
"""Set apart for an answer beside its tokens: its row and usage, a proxy's comments, an error page."""
SHARE = 0.25
"""Of the memory that is available: several sessions of a host may begin a level at once."""
CGROUP = Path("/sys/fs/cgroup")


def most_bytes(max_tokens: int) -> int:
    """Return what the reads of an answer of so many tokens may take; one that takes more is given up.

    Four times (1 / `SHARE`) what is set apart for it, for a server may write it in several pieces a token; those of a
    few bytes are merged (`workers.load.reads.Room`). So one that ignores `max_tokens` on every request of one load
    cannot fill more than what was available when that was let through; several that do so, under loads of as many
    sessions, can.
    """
    return int(_bytes_an_answer(max_tokens) / SHARE)


def most_requests(output_tokens: Lengths) -> int:
    """Return how many answers of such a length a load may wait to judge on this host."""
    return int(_room_bytes() / _bytes_an_answer(output_tokens))


def refusal(requests: int, output_tokens: Lengths) -> str | None:
    """Return why a load is too large for this host; None where it is not."""
    room, each = _room_bytes(), _bytes_an_answer(output_tokens)
    most = int(room / each)
    if requests <= most:
        return None
    return (
        f"{requests} answers of {expected(output_tokens):.0f} tokens need some {requests * each / 2**30:.1f} GiB until "
        f"they are judged, and {SHARE:.0%} of what this host has available are {room / 2**30:.1f} GiB: "
        f"send {most} at the most"
    )


def _room_bytes() -> float:
    return SHARE * available_bytes()


def _bytes_an_answer(output_tokens: Lengths) -> float:
    return BYTES_BESIDE + BYTES_A_TOKEN * expected(output_tokens)


def available_bytes() -> float:
    """Return the memory that can be had without pushing anybody out: the host's, or its container's where that is less.

    Of a container (cgroup v2) its limit less its working set, which is what it uses without inactive files.
    """
    available = float(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError, KeyError):  # another version, or no limit ("max")
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        available = min(available, limit - used + int(stat["inactive_file"]))
    return max(available, 0.0)
