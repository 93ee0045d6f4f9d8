"""What a bare CUDA context takes of a card: a process that makes one and does nothing else. Standard library only.

    context_probe.py

Makes the primary context of the one card that CUDA_VISIBLE_DEVICES leaves it, says so, and keeps it until its standard
input closes, which it does at the latest when the process that asked dies. Used through `context_bytes`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable

LIMIT_S = 20.0
BACK_LIMIT_S = 2.0
"""For the driver to give back what an ended process had."""
SAME_BYTES = 2**20
"""Two readings of a card on which nothing happens differ by no more."""
MADE = "made"


def context_bytes(card: str, used: Callable[[], int]) -> int | None:
    """Return the bytes by which `used()` (of the card) grows with a bare context on `card`; None where none is made.

    Waits until the card is as before. Where it does not become so, another process came or went meanwhile and the
    growth is not the context's: None, too. One that both came and went meanwhile is not noticed.
    """
    try:
        return _measured(card, used)
    except OSError:  # no process to be had: a figure less, never a failed start
        return None


def _measured(card: str, used: Callable[[], int]) -> int | None:
    before = used()
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": card, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    probe = subprocess.Popen(
        [sys.executable, "-I", __file__], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    with probe:
        assert probe.stdin is not None
        assert probe.stdout is not None
        try:
            told = select.select([probe.stdout], [], [], LIMIT_S)[0] and probe.stdout.readline().strip()
            grown = used() - before
        finally:
            probe.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                probe.wait(LIMIT_S)
            probe.kill()
    return grown if _is_back(before, used) and told == MADE else None


def _is_back(before: int, used: Callable[[], int]) -> bool:
    deadline = time.monotonic() + BACK_LIMIT_S
    while abs(used() - before) > SAME_BYTES:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def main() -> None:
    """Entry of the process. CUDA's driver API is called directly: a library would load kernels of its own."""
    cuda = ctypes.CDLL("libcuda.so.1")
    device, context = ctypes.c_int(), ctypes.c_void_p()
    steps: list[Callable[[], int]] = [
        lambda: cuda.cuInit(0),
        lambda: cuda.cuDeviceGet(ctypes.byref(device), 0),
        lambda: cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),
    ]
    if all(step() == 0 for step in steps):
        print(MADE, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
