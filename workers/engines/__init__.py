"""What serves a model: vLLM, or the simulator. Same sessions, same HTTP, same names of metrics."""

from __future__ import annotations

from workers.engines.base import Engine


def make_engine(name: str) -> Engine:
    """Return the engine of that name: `vllm` or `sim`."""
    if name == "sim":
        from workers.engines.sim import SimEngine

        return SimEngine()
    from workers.engines.vllm import VllmEngine

    return VllmEngine()
