"""What the sampler saw of a window, and what looking took of the host's CPU."""

from __future__ import annotations

import time

import pytest

from contract.rows import TelemetryRow
from workers.devices.base import Card, CardProcess
from workers.load.endpoint import Endpoint
from workers.sampler import Observed, Sampler

NOWHERE = Endpoint("http://127.0.0.1:9", "none")
"""A port that nobody listens on: scrapes fail at once."""


class OneCard:
    """A device of one card, of which each reading takes so much CPU time, and so much time asleep."""

    driver_version: str | None = None
    period_s = 0.05

    def __init__(self, busy_s: float = 0.0, asleep_s: float = 0.0, looking_s: float = 0.0) -> None:
        self.cards = [Card("GPU-0", "pretended", 2**30)]
        self._busy_s, self._asleep_s, self._looking_s = busy_s, asleep_s, looking_s

    def memory_by_card(self, pid: int | None) -> list[int]:
        return [0]

    def sample(self, pid: int | None) -> list[TelemetryRow]:
        spend(self._busy_s)
        time.sleep(self._asleep_s)
        return [TelemetryRow(0.0, "GPU-0", 0)]

    def processes(self, pid: int | None) -> list[CardProcess]:
        spend(self._looking_s)
        return []

    def close(self) -> None:
        pass


def spend(cpu_s: float) -> None:
    end = time.thread_time() + cpu_s
    while time.thread_time() < end:
        pass


def watched(device: OneCard) -> float:
    """Return the CPU seconds that watching the device from begin to end took."""
    started = time.monotonic()
    with Sampler(device, 1, NOWHERE) as sampler:
        pass
    lasted = time.monotonic() - started
    share = sampler.observed.cpu_share(started, lasted)
    assert share is not None
    return share * lasted


def test_the_cost_of_sampling_is_cpu_time_of_every_thread() -> None:
    """Only lower bounds: what else a thread does is counted, too, and a busy host makes it more."""
    asleep = watched(OneCard(asleep_s=0.6))
    assert asleep < 0.6, "time asleep is no CPU time"
    assert watched(OneCard(busy_s=0.2)) >= 0.2
    assert watched(OneCard(looking_s=0.2)) >= 0.2, "looks at processes count as readings of the card do"


def test_a_window_counts_what_began_in_it() -> None:
    rows = [TelemetryRow(at, card, 0) for at in (9.9, 10.0, 10.5, 11.0, 11.1) for card in ("a", "b")]
    seen = Observed(telemetry=rows, cpu_s=[(9.9, 5.0), (10.0, 0.01), (10.6, 0.03), (11.1, 5.0)])
    assert seen.telemetry_hz(10.0, 1.0) == 3.0, "of a card, not of all cards"
    assert seen.cpu_share(10.0, 1.0) == pytest.approx(0.04)
    assert (seen.telemetry_hz(20.0, 1.0), seen.cpu_share(20.0, 1.0)) == (None, None)


def test_samples_of_a_lost_card_are_none() -> None:
    rows = [TelemetryRow(at, "a", 0) for at in (10.0, 10.25, 10.5, 10.75)]
    rows += [TelemetryRow(10.0, "b", 0), *(TelemetryRow(at, "b") for at in (10.25, 10.5, 10.75))]
    assert Observed(telemetry=rows).telemetry_hz(10.0, 1.0) == 1.0
    assert Observed(telemetry=rows[-3:]).telemetry_hz(10.0, 1.0) == 0.0


def test_the_peak_is_one_moment_of_all_cards() -> None:
    held = {1.0: (30, 20), 2.0: (20, 35), 3.0: (None, 40)}
    rows = [TelemetryRow(at, card, used) for at, pair in held.items() for card, used in zip("ab", pair, strict=True)]
    assert Observed(telemetry=rows).peak() == {"a": 20, "b": 35}
    assert Observed().peak() == {}
