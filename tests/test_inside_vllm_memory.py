"""What the extension of vLLM's workers says of a card's memory, with a torch and a worker that are made up."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from workers import engines

MIB, GIB = 2**20, 2**30
TOTAL = 80 * GIB
WEIGHTS, KV = 0x1000_0000, 0x9000_0000


class Tensor:
    """Of one storage at an address."""

    def __init__(self, address: int, size: int) -> None:
        self._storage = SimpleNamespace(data_ptr=lambda: address, nbytes=lambda: size)

    def untyped_storage(self) -> SimpleNamespace:
        return self._storage


SEGMENTS: list[dict[str, Any]] = [
    {"device": 0, "address": WEIGHTS, "blocks": [{"size": 7 * GIB, "state": "active_allocated"}]},
    {"device": 0, "address": KV, "blocks": [{"size": 9 * GIB, "state": "active_allocated"}]},
    {
        "device": 0,
        "address": 0x5000_0000,
        "segment_pool_id": (0, 1),
        "blocks": [{"size": 300 * MIB, "state": "active_allocated"}, {"size": 36 * MIB, "state": "inactive"}],
    },
    {
        "device": 0,
        "address": 0x7000_0000,
        "blocks": [{"size": 40 * MIB, "state": "active_allocated"}, {"size": 210 * MIB, "state": "inactive"}],
    },
    {"device": 1, "address": 0x8000_0000, "blocks": [{"size": GIB, "state": "active_allocated"}]},
]
HELD = sum(block["size"] for segment in SEGMENTS if segment["device"] == 0 for block in segment["blocks"])
OUTSIDE = 760 * MIB


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The extension as a worker imports it: by itself, beside a torch whose card is pretended."""
    cuda = SimpleNamespace(
        synchronize=lambda: None,
        memory_snapshot=lambda: SEGMENTS,
        memory_reserved=lambda device: HELD,
        mem_get_info=lambda device: (TOTAL - HELD - OUTSIDE, TOTAL),
        get_device_properties=lambda device: SimpleNamespace(uuid="aa"),
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda, Tensor=Tensor))  # type: ignore[arg-type]
    spec = importlib.util.spec_from_file_location("vllm_memory", f"{engines.__path__[0]}/inside/vllm_memory.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def account(inside: ModuleType, kind: str = "cuda", **kept: object) -> dict[str, Any]:
    """Return what a worker on such a device says, that keeps these attributes besides."""
    model = SimpleNamespace(parameters=lambda: iter([Tensor(WEIGHTS, 7 * GIB)]), buffers=lambda: iter([]))
    layers = {"layer": SimpleNamespace(kv_cache=[Tensor(KV, 9 * GIB)])}
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))
    worker = inside.MemoryAccount()
    worker.device = SimpleNamespace(type=kind, index=0)
    worker.model_runner = SimpleNamespace(get_model=lambda: model, vllm_config=config)
    vars(worker).update(kept)
    said: dict[str, Any] = worker.account_memory()
    return said


def test_what_the_allocator_holds_is_told_apart_by_address(inside: ModuleType) -> None:
    said = account(inside)
    assert (said["weights"], said["kv"], said["graphs"]) == (7 * GIB, 9 * GIB, 336 * MIB)
    assert (said["buffers"], said["cached"]) == (40 * MIB, 210 * MIB)
    assert sum(said[part] for part in ("weights", "kv", "graphs", "buffers", "cached")) == said["reserved"] == HELD
    assert said["uuid"] == "aa"


def test_what_is_outside_is_read_now_and_as_the_engine_first_saw_it(inside: ModuleType) -> None:
    snapshot = SimpleNamespace(total_memory=TOTAL, free_memory=79 * GIB, torch_memory=MIB, non_torch_memory=530 * MIB)
    said = account(inside, init_snapshot=snapshot)
    assert (said["outside"], said["outside_at_init"]) == (OUTSIDE, 530 * MIB)


@pytest.mark.parametrize("kept", [{}, {"init_snapshot": None}, {"init_snapshot": SimpleNamespace(free_memory=GIB)}])
def test_an_engine_without_such_a_look_says_none(inside: ModuleType, kept: dict[str, object]) -> None:
    said = account(inside, **kept)
    assert (said["outside"], said["outside_at_init"]) == (OUTSIDE, None)


def test_on_a_cpu_there_are_tensors_alone(inside: ModuleType) -> None:
    assert account(inside, "cpu") == {"weights": 7 * GIB, "kv": 9 * GIB}


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllms_worker_keeps_that_look_by_these_names() -> None:
    """Read, not imported: that takes seconds."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    assert "self.init_snapshot = " in (package / "v1/worker/gpu_worker.py").read_text()
    snapshot = (package / "utils/mem_utils.py").read_text()
    assert "self.non_torch_memory = self.cuda_memory - self.torch_memory" in snapshot
