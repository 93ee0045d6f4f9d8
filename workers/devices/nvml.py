"""NVML: cards by physical UUID, memory as `nvidia-smi` shows it, utilisation, power, energy, clock.

Used through `Device`; never changes a setting of a card.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import takewhile
from typing import Any, TypeVar

from contract.rows import TelemetryRow
from workers import processes
from workers.devices.base import Card, CardLost, CardProcess

_T = TypeVar("_T")


class NvmlDevice:
    """The cards that `visible` names: indices in PCI order, `GPU-…` UUIDs or what they begin with, `MIG-…` UUIDs.

    A slice of a card (MIG) is a card here; a split card named as a whole stands for its first slice, as in CUDA.
    Raises `NoSuchCard`.
    """

    period_s = 0.1

    def __init__(self, visible: list[str]) -> None:
        import pynvml

        self._nvml = pynvml
        pynvml.nvmlInit()
        try:
            self._handles = _handles(pynvml, visible)
            self.cards = [_card(pynvml, handle) for handle in self._handles]
            self._used = [_used(pynvml, handle) for handle in self._handles]
            self.driver_version: str | None = _text(pynvml.nvmlSystemGetDriverVersion())
        except BaseException:
            self.close()
            raise

    def memory_by_card(self, pid: int | None) -> list[int]:
        """Return bytes used on each card by anybody, the driver's own reserve left out, as `nvidia-smi` does."""
        return [self._told(card, used) for card, used in zip(self.cards, self._used, strict=True)]

    def _told(self, card: Card, used: Callable[[], int]) -> int:
        try:
            return used()
        except self._nvml.NVMLError as error:
            raise CardLost(f"NVML does not read {card.id} any more: {error}") from None

    def sample(self, pid: int | None) -> list[TelemetryRow]:
        """Return one row a card; what a card does not offer stays None."""
        every = zip(self.cards, self._handles, self._used, strict=True)
        return [self._sample(card, handle, used) for card, handle, used in every]

    def _sample(self, card: Card, handle: Any, used: Callable[[], int]) -> TelemetryRow:
        nvml = self._nvml
        return TelemetryRow(
            0.0,
            card.id,
            memory_used_bytes=_offered(used),
            utilization_pct=_offered(lambda: float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)),
            power_w=_offered(lambda: float(nvml.nvmlDeviceGetPowerUsage(handle) / 1000)),
            sm_clock_mhz=_offered(lambda: int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))),
            temperature_c=_offered(lambda: int(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))),
            energy_j=_offered(lambda: float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000)),
            clock_event_reasons=_offered(lambda: int(_clock_event_reasons(nvml, handle))),
        )

    def processes(self, pid: int | None) -> list[CardProcess]:
        """Return the compute processes on the cards; none of a card that does not tell.

        NVML numbers processes as the host does: in a container with numbers of its own none is in the tree of `pid`.
        """
        seen = [
            (card.id, process)
            for card, handle in zip(self.cards, self._handles, strict=True)
            for process in _offered(partial(self._nvml.nvmlDeviceGetComputeRunningProcesses, handle)) or ()
        ]
        ours = set(processes.tree(pid)) if pid is not None else set()  # after NVML: what was forked since is in it
        return [CardProcess(card, int(p.pid), p.usedGpuMemory, p.pid in ours) for card, p in seen]

    def close(self) -> None:
        """Shut NVML down."""
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()


def visible_cards() -> list[Card]:
    """Return the cards this process may use, CUDA_VISIBLE_DEVICES respected; none where there is no NVML.

    As for CUDA, an empty name or -1 ends the list. Of a card that is split by MIG and not named by its slices' ids only
    the first slice is listed: CUDA would use no other. Raises `NoSuchCard`, also for a name where there is no NVML, and
    where no card is named and one of them cannot be read.
    """
    import pynvml

    names = _named()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if names:
            raise NoSuchCard(f"CUDA_VISIBLE_DEVICES names {names[0]!r}, but this node has no NVML ({error})") from None
        return []
    try:
        return _every_card(pynvml) if names is None else [_card(pynvml, each) for each in _handles(pynvml, names)]
    finally:
        pynvml.nvmlShutdown()


def _every_card(nvml: Any) -> list[Card]:
    """All cards of the node. Raises `NoSuchCard` where NVML counts one and does not read it: who is to say it is gone
    for good, that the others may do without it, is the user."""
    cards: dict[int, Card] = {}
    unread: list[str] = []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            cards[index] = _card(nvml, _first_slice(nvml, nvml.nvmlDeviceGetHandleByIndex(index)))
        except nvml.NVMLError as error:
            unread.append(f"{index} ({error})")
    if not unread:
        return list(cards.values())
    way_out = f": leave it out with CUDA_VISIBLE_DEVICES={','.join(map(str, cards))}" if cards else ""
    raise NoSuchCard(f"NVML does not read card {', '.join(unread)}{way_out}")


def kinds_of_cards() -> tuple[str, ...]:
    """Return the names of all cards of this node, each once, whether this process may use them or not; none where there
    is no NVML. A card that is lost has none."""

    def names(nvml: Any) -> tuple[str, ...]:
        told = {_offered(partial(_name_at, nvml, index)) for index in range(nvml.nvmlDeviceGetCount())}
        return tuple(sorted(name for name in told if name is not None))

    return _told_of_the_host(names) or ()


def _name_at(nvml: Any, index: int) -> str:
    return _text(nvml.nvmlDeviceGetName(nvml.nvmlDeviceGetHandleByIndex(index)))


def _named() -> list[str] | None:
    """Return what CUDA_VISIBLE_DEVICES names; None where it is not set."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return None
    return list(takewhile(lambda name: name not in _END, (name.strip() for name in value.split(","))))


def driver_version() -> str | None:
    """Return the version of this host's NVIDIA driver; None where there is no NVML."""
    return _told_of_the_host(lambda nvml: _text(nvml.nvmlSystemGetDriverVersion()))


def _told_of_the_host(asked: Callable[[Any], _T]) -> _T | None:
    """Return what NVML is asked while it is open; None where there is none."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return asked(pynvml)
    finally:
        pynvml.nvmlShutdown()


_END = ("", "-1", "NoDevFiles")
"""What ends CUDA_VISIBLE_DEVICES; the last is how Slurm says that a job has no GPU."""


class NoSuchCard(Exception):
    """CUDA_VISIBLE_DEVICES or the cluster names a card that NVML does not know, or one card twice as if it were two; or
    nobody names any, and NVML does not read one of them."""


def _handles(nvml: Any, names: list[str]) -> list[Any]:
    """Return the cards' handles, in the order of their names."""
    handles: list[Any] = []
    name_of: dict[str, str] = {}
    for name in names:
        handle = _handle(nvml, name)
        uuid = _text(nvml.nvmlDeviceGetUUID(handle))
        if uuid in name_of:
            raise NoSuchCard(f"CUDA_VISIBLE_DEVICES names {uuid} twice, as {name_of[uuid]!r} and as {name!r}")
        name_of[uuid] = name
        handles.append(handle)
    return handles


def _handle(nvml: Any, name: str) -> Any:
    try:
        if name.isdigit():
            return _first_slice(nvml, nvml.nvmlDeviceGetHandleByIndex(int(name)))
        by_instance = _MIG_BY_INSTANCE.fullmatch(name)
        if by_instance:
            return _slice(nvml, by_instance[1], int(by_instance[2]), int(by_instance[3]))
        return _first_slice(nvml, nvml.nvmlDeviceGetHandleByUUID(name))
    except nvml.NVMLError as error:
        alike = _beginning_with(nvml, name)
        if len(alike) == 1:
            return _first_slice(nvml, alike[0])
        missing = f"the UUIDs of {len(alike)} GPUs begin so" if alike else f"this node has no such GPU ({error})"
        raise NoSuchCard(f"CUDA_VISIBLE_DEVICES names {name!r}, but {missing}") from None


_MIG_BY_INSTANCE = re.compile(r"MIG-(GPU-[0-9a-f-]+)/(\d+)/(\d+)")
"""How drivers before R470 name a slice: its card, its GPU instance and its compute instance."""


def _slices(nvml: Any, card: Any) -> Iterator[Any]:
    for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(card)):
        with contextlib.suppress(nvml.NVMLError):
            yield nvml.nvmlDeviceGetMigDeviceHandleByIndex(card, index)


def _first_slice(nvml: Any, card: Any) -> Any:
    with contextlib.suppress(nvml.NVMLError):
        if nvml.nvmlDeviceGetMigMode(card)[0] == nvml.NVML_DEVICE_MIG_ENABLE:
            return next(_slices(nvml, card), card)
    return card


def _slice(nvml: Any, card: str, gpu_instance: int, compute_instance: int) -> Any:
    for found in _slices(nvml, nvml.nvmlDeviceGetHandleByUUID(card)):
        ids = nvml.nvmlDeviceGetGpuInstanceId(found), nvml.nvmlDeviceGetComputeInstanceId(found)
        if ids == (gpu_instance, compute_instance):
            return found
    raise nvml.NVMLError(nvml.NVML_ERROR_NOT_FOUND)


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
        _offered(lambda: float(nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000)),
    )


def _clock_event_reasons(nvml: Any, handle: Any) -> int:
    """The bits under the name that the installed binding has: `throttle` became `event` in 2023."""
    ask = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
    return int((ask or nvml.nvmlDeviceGetCurrentClocksThrottleReasons)(handle))


THROTTLES = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "heat, by software",
    0x40: "heat, by hardware",
    0x80: "power brake",
}
"""Bits that mean a clock held down against the card's will. Source: nvml.h, nvmlClocksEventReason*."""


def throttle_reasons(bits: int) -> list[str]:
    """Return the words for the bits that hold a clock down; idle and settings are none of them."""
    return [words for bit, words in THROTTLES.items() if bits & bit]


def _used(nvml: Any, handle: Any) -> Callable[[], int]:
    """Return what reads the bytes in use on a card, by the same version of NVML's call every time.

    Version 2 leaves the driver's reserve out; version 1 counts it in and is taken only where 2 is not offered: of a
    card read now by the one and now by the other, the reserve would be a peak.
    """

    def by_version_1() -> int:
        return int(nvml.nvmlDeviceGetMemoryInfo(handle).used)

    def by_version_2() -> int:
        return int(nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2).used)

    if not hasattr(nvml, "nvmlMemory_v2"):
        return by_version_1
    try:
        by_version_2()
    except nvml.NVMLError as error:
        not_offered = (
            nvml.NVML_ERROR_FUNCTION_NOT_FOUND,
            nvml.NVML_ERROR_NOT_SUPPORTED,
            nvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
        )
        if error.value not in not_offered:
            raise
        return by_version_1
    return by_version_2


def _offered(read: Callable[[], _T]) -> _T | None:
    import pynvml

    with contextlib.suppress(pynvml.NVMLError):
        return read()
    return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
