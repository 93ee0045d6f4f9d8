"""Runs inside vLLM's workers (`--worker-extension-cls`): what torch's allocator holds there and for what,
and what of the card is outside it.

A file that imports nothing of ours: its directory alone is put on the server's PYTHONPATH. The methods are called by
name through `/collective_rpc`; every figure is in bytes, of the worker's own card.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable, Iterator
from typing import Any

import torch


class MemoryAccount:
    """Methods that vLLM adds to its worker. Their names must not be vLLM's own."""

    device: torch.device
    """The worker's."""

    def account_memory(self) -> dict[str, Any]:
        """Return what the allocator holds, split by the address of every block.

        Keys: weights, kv, graphs (private pools of CUDA graphs), buffers (other live tensors), cached (free blocks)
        and reserved (their sum); outside (what else the whole card held, whoever took it) and outside_at_init (the
        same when the engine first looked, before it loaded the model); uuid names the card. On a CPU there is no such
        allocator: sizes of the tensors only.
        """
        weights = _storages([*_model(self).parameters(), *_model(self).buffers()])
        kv = _storages(_kv_tensors(self))
        if self.device.type != "cuda":
            return {"weights": sum(weights.values()), "kv": sum(kv.values())}
        torch.cuda.synchronize()
        parts = dict.fromkeys(("weights", "kv", "graphs", "buffers", "cached"), 0)
        for address, size, live, private in _blocks(self.device):
            parts[_part(address, live, private, weights, kv)] += size
        free, total = torch.cuda.mem_get_info(self.device)
        reserved = torch.cuda.memory_reserved(self.device)
        return {
            **parts,
            "reserved": reserved,
            "outside": total - free - reserved,
            "outside_at_init": _outside_at_init(self),
            "uuid": str(getattr(torch.cuda.get_device_properties(self.device), "uuid", "")),
        }

    def give_back_memory(self) -> dict[str, Any]:
        """Free all that torch holds, for good, so that the card shows what is left; `reserved` could not be freed.

        The server cannot answer afterwards: only for one that is about to be stopped.
        """
        if self.device.type != "cuda":
            return {}
        torch.cuda.synchronize()
        gc.unfreeze()  # vLLM puts its objects out of the collector's sight
        for graph in _alive(torch.cuda.CUDAGraph):
            graph.reset()
        for tensor in _alive(torch.Tensor):
            _empty(tensor)
        torch._C._cuda_clearCublasWorkspaces()
        gc.collect()
        torch.cuda.empty_cache()
        return {"reserved": torch.cuda.memory_reserved(self.device)}


def _outside_at_init(worker: Any) -> int | None:
    """vLLM's worker keeps a snapshot from before the model was loaded: cudaMemGetInfo, less what torch had reserved."""
    outside = getattr(getattr(worker, "init_snapshot", None), "non_torch_memory", None)
    return None if outside is None else int(outside)


def _model(worker: Any) -> Any:
    return worker.model_runner.get_model() if hasattr(worker.model_runner, "get_model") else worker.model_runner.model


def _kv_tensors(worker: Any) -> Iterator[torch.Tensor]:
    layers = worker.model_runner.vllm_config.compilation_config.static_forward_context
    yield from _tensors([getattr(layer, "kv_cache", None) for layer in layers.values()])


def _tensors(held: Any) -> Iterator[torch.Tensor]:
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, list | tuple):
        for item in held:
            yield from _tensors(item)


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Address to size, each storage once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def _blocks(device: torch.device) -> Iterator[tuple[int, int, bool, bool]]:
    """Address, size, whether a tensor lives there, whether the segment belongs to a private pool (CUDA graphs)."""
    for segment in torch.cuda.memory_snapshot():  # type: ignore[no-untyped-call]
        if segment["device"] != device.index:
            continue
        private = tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0)
        address = segment["address"]
        for block in segment["blocks"]:
            yield block.get("address", address), block["size"], block["state"] != "inactive", private
            address += block["size"]


def _part(address: int, live: bool, private: bool, weights: dict[int, int], kv: dict[int, int]) -> str:
    if live and address in weights:
        return "weights"
    if live and address in kv:
        return "kv"
    if private:
        return "graphs"
    return "buffers" if live else "cached"


def _alive(kind: type) -> list[Any]:
    return [found for found in gc.get_objects() if issubclass(type(found), kind)]


def _empty(tensor: torch.Tensor) -> None:
    with contextlib.suppress(Exception):  # memory that is not the allocator's, tensors that are no plain ones
        if tensor.is_cuda:
            tensor.untyped_storage().resize_(0)
