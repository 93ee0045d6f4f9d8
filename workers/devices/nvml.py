"""NVML: cards by physical UUID, memory as `nvidia-smi` shows it, utilisation, power, clock.

Used through `Device`; never changes a setting of a card.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from typing import Any, TypeVar

from contract.rows import TelemetryRow
from workers import processes
from workers.devices.base import Card, ForeignProcess

_T = TypeVar("_T")


class NvmlDevice:
    """The cards that `visible` names: indices in PCI order, `GPU-…` UUIDs or what they begin with, `MIG-…` UUIDs."""

    period_s = 0.1

    def __init__(self, visible: list[str]) -> None:
        import pynvml

        self._nvml = pynvml
        pynvml.nvmlInit()
        try:
            self._handles = [_handle(pynvml, name) for name in visible]
            self.cards = [_card(pynvml, handle) for handle in self._handles]
            self.driver_version: str | None = _text(pynvml.nvmlSystemGetDriverVersion())
        except BaseException:
            self.close()
            raise

    def memory_used(self, pid: int | None) -> int:
        """Return bytes used on the cards by anybody, the driver's own reserve left out, as `nvidia-smi` does."""
        return sum(_used(self._nvml, handle) for handle in self._handles)

    def sample(self, pid: int | None) -> list[TelemetryRow]:
        """Return one row a card; what a card does not offer stays None."""
        return [self._sample(card, handle) for card, handle in zip(self.cards, self._handles, strict=True)]

    def _sample(self, card: Card, handle: Any) -> TelemetryRow:
        nvml = self._nvml
        return TelemetryRow(
            0.0,
            card.id,
            memory_used_bytes=_offered(lambda: _used(nvml, handle)),
            utilization_pct=_offered(lambda: float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)),
            power_w=_offered(lambda: float(nvml.nvmlDeviceGetPowerUsage(handle) / 1000)),
            sm_clock_mhz=_offered(lambda: int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))),
            temperature_c=_offered(lambda: int(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))),
        )

    def foreign_processes(self, pid: int | None) -> list[ForeignProcess]:
        """Return compute processes on the cards that are not in the tree of `pid`; none of a card that does not tell.

        NVML numbers processes in the host's namespace: in a container ours may look foreign, so this is only asked
        before a start.
        """
        ours = set(processes.tree(pid)) if pid is not None else set()
        return [
            ForeignProcess(card.id, int(process.pid), process.usedGpuMemory)
            for card, handle in zip(self.cards, self._handles, strict=True)
            for process in _offered(partial(self._nvml.nvmlDeviceGetComputeRunningProcesses, handle)) or ()
            if process.pid not in ours
        ]

    def close(self) -> None:
        """Shut NVML down."""
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()


def visible_cards() -> list[Card]:
    """Return the cards this process may use, CUDA_VISIBLE_DEVICES respected; none where there is no NVML.

    As for CUDA, an empty name or -1 ends the list. A card that is split by MIG and not named by its slices' `MIG-…`
    UUIDs is listed as the whole card, although CUDA would use only its first slice.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        names = os.environ.get("CUDA_VISIBLE_DEVICES")
        if names is None:
            handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        else:
            named = takewhile(lambda name: name not in _END, (name.strip() for name in names.split(",")))
            handles = [_handle(pynvml, name) for name in named]
        return [_card(pynvml, handle) for handle in handles]
    finally:
        pynvml.nvmlShutdown()


_END = ("", "-1", "NoDevFiles")
"""What ends CUDA_VISIBLE_DEVICES; the last is how Slurm says that a job has no GPU."""


class NoSuchCard(Exception):
    """CUDA_VISIBLE_DEVICES or the cluster names a card that NVML does not know."""


def _handle(nvml: Any, name: str) -> Any:
    try:
        if name.isdigit():
            return nvml.nvmlDeviceGetHandleByIndex(int(name))
        return nvml.nvmlDeviceGetHandleByUUID(name)
    except nvml.NVMLError as error:
        alike = _beginning_with(nvml, name)
        if len(alike) == 1:
            return alike[0]
        missing = f"the UUIDs of {len(alike)} GPUs begin so" if alike else f"this node has no such GPU ({error})"
        raise NoSuchCard(f"CUDA_VISIBLE_DEVICES names {name!r}, but {missing}") from None


def _beginning_with(nvml: Any, name: str) -> list[Any]:
    """CUDA takes as much of a card's UUID as tells it from the others; NVML wants all of it."""
    if not name.startswith("GPU-"):
        return []
    handles = (nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount()))
    return [handle for handle in handles if _text(nvml.nvmlDeviceGetUUID(handle)).startswith(name)]


def _card(nvml: Any, handle: Any) -> Card:
    return Card(
        _text(nvml.nvmlDeviceGetUUID(handle)),
        _text(nvml.nvmlDeviceGetName(handle)),
        int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
    )


def _used(nvml: Any, handle: Any) -> int:
    """Version 2 of the call leaves the driver's reserve out of `used`; version 1 counts it in."""
    with contextlib.suppress(Exception):
        return int(nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2).used)
    return int(nvml.nvmlDeviceGetMemoryInfo(handle).used)


def _offered(read: Callable[[], _T]) -> _T | None:
    import pynvml

    with contextlib.suppress(pynvml.NVMLError):
        return read()
    return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
