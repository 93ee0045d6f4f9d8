"""What CUDA itself takes of a card: a probe process that makes a bare context and, where asked, has torch compute.

    context_probe.py [libraries]

Makes the primary context of the one card that CUDA_VISIBLE_DEVICES leaves it, says so, and waits for a line. Then, if
`libraries` was asked for, it makes a tensor and multiplies matrices, says how much torch's allocator holds, and waits
again. It ends when its standard input closes, and is killed by the kernel with the thread that asked. Used through
`context_bytes` and `library_bytes`. Without `libraries` it needs the standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable

LIMIT_S = 20.0
LIBRARIES_LIMIT_S = 90.0
"""To import torch on a machine that reads it for the first time, too."""
BACK_LIMIT_S = 2.0
"""For the driver to give back what an ended process had."""
LOOK_S = 0.02
SAME_BYTES = 2**20
"""Two readings of a card on which nothing happens differ by no more."""
MADE = "made"
LIBRARIES = "libraries"
PR_SET_PDEATHSIG = 1
WIDTH = 4096
ROWS = (1, 64, 2048)
"""Tokens of a batch, as it were: products of one row, few and many are different kernels."""


def context_bytes(card: str, used: Callable[[], int], stopped: Callable[[], bool]) -> int | None:
    """Return the bytes by which `used()` (of the card) grows with a bare context on `card`; None where none is made.

    Waits until the card is as before. Where it does not become so, another process came or went meanwhile and the
    growth is not the context's: None, too. One that both came and went meanwhile is not noticed. Once `stopped()`,
    the probe is killed at once: None, where not all was told by then.
    """
    stages = _measured(card, used, stopped, ["-I", __file__], [LIMIT_S])
    return stages[0][0] if stages else None


def library_bytes(card: str, used: Callable[[], int], stopped: Callable[[], bool]) -> int | None:
    """Return the bytes by which `used()` grows, beyond a bare context, once torch has computed on `card`.

    That is a first tensor and products of bfloat16 matrices: torch's own kernels and cuBLAS. What torch's allocator
    then holds is not in it. None as for `context_bytes`, and where torch cannot be had.
    """
    stages = _measured(card, used, stopped, ["-P", __file__, LIBRARIES], [LIMIT_S, LIBRARIES_LIMIT_S])
    if not stages:
        return None
    (context, _), (all_in_all, held) = stages
    return all_in_all - context - int(held) if held.isdecimal() else None


def _measured(
    card: str, used: Callable[[], int], stopped: Callable[[], bool], command: list[str], limits_s: list[float]
) -> list[tuple[int, str]] | None:
    """Return the growth at each stage of the probe, and what it said there; None where that is not known."""
    if stopped():
        return None
    try:
        before = used()
        stages = _stages(card, lambda: used() - before, stopped, command, limits_s)
        is_back = _comes(lambda: abs(used() - before) <= SAME_BYTES, BACK_LIMIT_S, stopped)
    except OSError:  # no process to be had: a figure less, never a failed start
        return None
    return stages if is_back and len(stages) == len(limits_s) and stages[0][1] == MADE else None


def _stages(
    card: str, grown: Callable[[], int], stopped: Callable[[], bool], command: list[str], limits_s: list[float]
) -> list[tuple[int, str]]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": card, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    probe = subprocess.Popen(
        [sys.executable, *command], env=environment, text=True, errors="replace",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    stages: list[tuple[int, str]] = []
    with probe:
        assert probe.stdin is not None
        assert probe.stdout is not None
        answer = probe.stdout
        try:
            for limit_s in limits_s:
                answers = _comes(lambda: bool(select.select([answer], [], [], 0)[0]), limit_s, stopped)
                told = answers and answer.readline().strip()
                if not told:
                    break
                stages.append((grown(), told))
                probe.stdin.write("\n")
                probe.stdin.flush()
        finally:
            with contextlib.suppress(OSError):  # it has ended, and cannot be told
                probe.stdin.close()
            _comes(lambda: probe.poll() is not None, LIMIT_S if len(stages) == len(limits_s) else 0, stopped)
            probe.kill()
    return stages


def _comes(true: Callable[[], bool], limit_s: float, stopped: Callable[[], bool]) -> bool:
    """Wait for something to be true; False where it is not within the limit, or before a stop."""
    deadline = time.monotonic() + limit_s
    while not true():
        if stopped() or time.monotonic() > deadline:
            return False
        time.sleep(LOOK_S)
    return True


def main() -> None:
    """Entry of the process. CUDA's driver API is called directly: a library would load kernels of its own."""
    # who asked may die before the kernel is told: the first line of input then does not come
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    cuda = ctypes.CDLL("libcuda.so.1")
    device, context = ctypes.c_int(), ctypes.c_void_p()
    steps: list[Callable[[], int]] = [
        lambda: cuda.cuInit(0),
        lambda: cuda.cuDeviceGet(ctypes.byref(device), 0),
        lambda: cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),
    ]
    if any(step() != 0 for step in steps):
        return
    print(MADE, file=answers, flush=True)
    if sys.stdin.readline() and LIBRARIES in sys.argv[1:]:
        print(_computed(), file=answers, flush=True)
    sys.stdin.read()


def _computed() -> int:
    """Have torch compute on the card; return the bytes that its allocator holds when all tensors are gone."""
    import torch

    weights = torch.ones(WIDTH, WIDTH, device="cuda", dtype=torch.bfloat16)
    for rows in ROWS:
        torch.nn.functional.linear(weights[:rows], weights)
    torch.cuda.synchronize()
    del weights
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


if __name__ == "__main__":
    main()
