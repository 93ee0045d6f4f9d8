"""What a vLLM server's log says of its KV cache and its scheduler. Pure parsing; formats of 0.25 to 0.32."""

from __future__ import annotations

import re
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, slots=True)
class LogFigures:
    """Figures found in the log; None where no line of any known version gives one."""

    available_kv_bytes: int | None = None
    """Of one GPU, or of the CPU backend's worker; rounded by vLLM to 0.01 GiB."""
    kv_tokens: int | None = None
    max_concurrency: float | None = None
    max_num_batched_tokens: int | None = None
    graph_capture_bytes: int | None = None
    """Memory of one worker's card that went while CUDA graphs were captured; rounded by vLLM to 0.01 GiB."""
    compiled: bool | None = None
    """Whether a graph was compiled for torch.compile; False where all that were needed came from the cache."""


ROUNDING_BYTES = 0.005 * GIB
"""How far a figure that vLLM prints in GiB can be from the truth."""
_NUMBER = r"([\d,]+(?:\.\d+)?)"


def parse(log: str) -> LogFigures:
    """Return the figures of a start-up log; the last line of a kind counts (several ranks write the same)."""
    return LogFigures(
        available_kv_bytes=_bytes(
            _last(rf"Available KV cache memory: {_NUMBER} GiB", log)
            or _last(rf"Auto set \({_NUMBER}/[\d.]+\) GiB for KV cache", log)
        ),
        kv_tokens=_whole(_last(rf"KV cache size: {_NUMBER} tokens", log)),
        max_concurrency=_last(rf"Maximum concurrency for [\d,]+ tokens per request: {_NUMBER}x", log),
        max_num_batched_tokens=_whole(_last(r"max_num_batched_tokens[=:]\s*([\d,]+)", log)),
        graph_capture_bytes=_bytes(_last(rf"Graph capturing finished in .* took {_NUMBER} GiB", log)),
        compiled=_compiled(log),
    )


def _compiled(log: str) -> bool | None:
    """One graph compiled, on any rank, is enough: it takes the memory of compiling."""
    if re.search(r"Compiling a graph for compile range", log):
        return True
    return False if re.search(r"Directly load (?:the compiled graph|AOT compilation)", log) else None


def _last(pattern: str, log: str) -> float | None:
    found = re.findall(pattern, log)
    return float(found[-1].replace(",", "")) if found else None


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _bytes(gib: float | None) -> int | None:
    return None if gib is None else round(gib * GIB)
