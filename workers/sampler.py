"""Watches a server while a point is measured: device telemetry and the server's gauges, from a thread of its own.

Used by `workers.measuring` as a context manager around a measured window.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self, TypeVar

import psutil

from contract.rows import ServerSample, TelemetryRow
from workers import metrics, probe
from workers.devices.base import CardProcess, Device
from workers.load.endpoint import Endpoint

METRICS_PERIOD_S = 0.4
"""Shorter than the half second that is promised: a scrape takes its time, too."""
CPU_PERIOD_S = 0.5
PROCESSES_PERIOD_S = 1.0
_Sample = TypeVar("_Sample", TelemetryRow, ServerSample)


@dataclass(slots=True)
class Observed:
    """What was seen. Times are on the monotonic clock, which all processes of a host share, until `window` makes them
    relative."""

    telemetry: list[TelemetryRow] = field(default_factory=list)
    server: list[ServerSample] = field(default_factory=list)
    cpu_pct: list[tuple[float, float]] = field(default_factory=list)
    """(time, mean utilisation of all cores since the sample before)."""
    cpu_s: list[tuple[float, float]] = field(default_factory=list)
    """(time, CPU seconds that one sample of anything took its thread)."""
    processes: list[list[CardProcess]] = field(default_factory=list)
    """Who held memory of the cards, look by look."""

    def window(self, started_s: float, duration_s: float) -> list[TelemetryRow]:
        """Return the samples of the device inside a window, their times in seconds since its start."""
        return _inside(self.telemetry, started_s, duration_s)

    def server_window(self, started_s: float, duration_s: float) -> list[ServerSample]:
        """Return the samples of the server's metrics inside a window, their times in seconds since its start."""
        return _inside(self.server, started_s, duration_s)

    def server_hz(self, started_s: float, duration_s: float) -> float | None:
        """Return how many scrapes a second of a window were answered; None for a window shorter than their period."""
        if duration_s < METRICS_PERIOD_S:
            return None
        return len(self.server_window(started_s, duration_s)) / duration_s

    def cpu_util_pct(self, started_s: float, duration_s: float) -> float | None:
        """Return the mean CPU utilisation of the host inside a window; None for one too short to be sampled."""
        inside = [percent for at, percent in self.cpu_pct if 0 < at - started_s <= duration_s]
        return sum(inside) / len(inside) if inside else None

    def peak(self) -> dict[str, int]:
        """Return what each card held at the moment when all together held most; empty where nothing was read."""
        by_moment: dict[float, dict[str, int]] = {}
        for row in self.telemetry:
            if row.memory_used_bytes is not None:
                by_moment.setdefault(row.t_s, {})[row.device_id] = row.memory_used_bytes
        return max(by_moment.values(), key=lambda held: sum(held.values()), default={})

    def telemetry_hz(self, started_s: float, duration_s: float) -> float | None:
        """Return how many samples with a figure a second of a window has, of the card with the fewest.

        None for a window too short.
        """
        taken: dict[str, int] = {}
        for sample in self.window(started_s, duration_s):
            taken[sample.device_id] = taken.get(sample.device_id, 0) + sample.holds_a_figure
        return min(taken.values()) / duration_s if taken else None

    def cpu_share(self, started_s: float, duration_s: float) -> float | None:
        """Return the CPU time of all sampling in a window, as a share of one core; None for a window too short."""
        inside = [cost for at, cost in self.cpu_s if 0 <= at - started_s <= duration_s]
        return sum(inside) / duration_s if inside else None

    def tree_memory_bytes(self) -> int | None:
        """Return the highest memory attributed to the server's processes at one look; None where none is."""
        looks = [[p.memory_bytes for p in look if p.ours and p.memory_bytes is not None] for look in self.processes]
        return max((sum(look) for look in looks if look), default=None)


def _inside(samples: list[_Sample], started_s: float, duration_s: float) -> list[_Sample]:
    relative = (replace(sample, t_s=sample.t_s - started_s) for sample in samples)
    return [sample for sample in relative if 0 <= sample.t_s <= duration_s]


class Sampler:
    """Samples from `__enter__` to `__exit__`; `observed` is complete afterwards."""

    def __init__(self, device: Device, pid: int, endpoint: Endpoint) -> None:
        self.observed = Observed()
        self._device, self._pid, self._endpoint = device, pid, endpoint
        self._ended = threading.Event()
        self._cpu_primed = False
        self._threads = [
            threading.Thread(target=self._repeat, args=(device.period_s, self._sample_device), daemon=True),
            threading.Thread(target=self._repeat, args=(METRICS_PERIOD_S, self._sample_server), daemon=True),
            threading.Thread(target=self._repeat, args=(CPU_PERIOD_S, self._sample_cpu), daemon=True),
            threading.Thread(target=self._watch_processes, daemon=True),
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _repeat(self, period_s: float, sample: Callable[[], None]) -> None:
        due = time.monotonic()
        while True:
            at, used_s = time.monotonic(), time.thread_time()
            sample()
            self.observed.cpu_s.append((at, time.thread_time() - used_s))
            due = max(due + period_s, time.monotonic())
            if self._ended.wait(due - time.monotonic()):
                return

    def _sample_device(self) -> None:
        now = time.monotonic()
        self.observed.telemetry += [replace(row, t_s=now) for row in self._device.sample(self._pid)]

    def _watch_processes(self) -> None:
        """Look once more at the end: windows are often shorter than the period, and memory is highest after load."""
        self._repeat(PROCESSES_PERIOD_S, self.look_at_processes)
        self.look_at_processes()

    def look_at_processes(self) -> None:
        """Look once at who holds memory of the cards; also when the watch is over."""
        self.observed.processes.append(self._device.processes(self._pid))

    def _sample_server(self) -> None:
        with contextlib.suppress(probe.NoAnswer, ValueError):
            status, text = probe.get(self._endpoint, "/metrics")
            answered_s = time.monotonic()
            if status == 200:
                self.observed.server.append(metrics.parse(text).sample(answered_s))

    def _sample_cpu(self) -> None:
        percent = psutil.cpu_percent(None)  # the mean since the last call in this thread; of the first there is none
        if self._cpu_primed:
            self.observed.cpu_pct.append((time.monotonic(), percent))
        self._cpu_primed = True
