"""Rough seconds for plans: they order the queue and are shown as estimates. Pure; no result depends on them.

Constants are of the order measured on an H100 (CUDA) and on two cores with a tiny model (CPU).
"""

from __future__ import annotations


def start_s(engine: str, on_cpu: bool, eager: bool, warm: bool) -> float:
    """Seconds from launch to ready, and back to nothing."""
    if engine == "sim":
        return 1.0
    if on_cpu:
        return 20.0 if warm else 45.0
    if warm:
        return 10.0 if eager else 20.0
    return 50.0 if eager else 80.0


def import_s(engine: str, on_cpu: bool) -> float:
    """Seconds until a node's warm parent has imported, which its first servers wait for."""
    if engine == "sim":
        return 0.0
    return 10.0 if on_cpu else 18.0


def memory_point_s(on_cpu: bool) -> float:
    """Seconds of readings and the warm-up load between them."""
    return 12.0 if on_cpu else 6.0


def load_point_s(on_cpu: bool, concurrency: int, requests: int, prompt_tokens: float, output_tokens: float) -> float:
    """Seconds of one load level: rounds of `concurrency` requests, each decoded step by step, after their prefills."""
    step_s = 0.005 + 0.0016 * concurrency if on_cpu else 0.008 + 0.00003 * concurrency
    prefill_tokens_per_s = 8_000 if on_cpu else 40_000
    rounds = requests / concurrency
    return 1.0 + rounds * output_tokens * step_s + requests * prompt_tokens / prefill_tokens_per_s
