"""When the requests of an open loop are due. Pure: the same plan and seed give the same moments in any process.

An arrival process of rate 1 is mapped onto the course of the rate, so that any process goes with any course.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

HIGHEST_RATE = 1e5
"""Requests a second that can be asked for."""


class ArrivalProcess(StrEnum):
    """What the gaps between arrivals are drawn from, for a mean of 1."""

    POISSON = "poisson"  # exponential: arrivals know nothing of each other
    GAMMA = "gamma"  # of shape `burstiness`: below 1 in bursts, above 1 more even, 1 is Poisson
    CONSTANT = "constant"  # all alike, nothing drawn


@dataclass(frozen=True, slots=True)
class Stage:
    """A time in which the rate goes in a straight line from one value to another; in shares of a level's rate.

    Raises:
        ValueError: it does not last, or a share is negative, or both are 0.
    """

    seconds: float
    start: float = 1.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"a stage of {self.seconds:g} s: must be above 0")
        if min(self.start, self.end) < 0 or not 0 < max(self.start, self.end) < math.inf:
            raise ValueError(f"shares {self.start:g} and {self.end:g}: one must be above 0, none below")

    @property
    def area(self) -> float:
        """Integral of the share over the stage, in seconds: as long would the whole rate take to send as much."""
        return self.seconds * (self.start + self.end) / 2

    def after(self, area: float) -> float:
        """Return the seconds after which the integral is `area` (0 to the whole).

        The root of start * t + (end - start) * t**2 / (2 * seconds) = area, in the form that holds for a flat stage,
        too.
        """
        slope = (self.end - self.start) / self.seconds
        root = math.sqrt(max(self.start**2 + 2 * slope * area, 0.0))
        return min(2 * area / (self.start + root), self.seconds) if area > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Arrivals:
    """An open loop: requests are sent when they are due, however many are in flight.

    Raises:
        ValueError: the rate or the burstiness is not above 0, there is no stage, or the last one ends at 0.
    """

    process: ArrivalProcess
    rate: float
    """Of the level, requests a second."""
    stages: tuple[Stage, ...]
    """In their order; beyond the last one its end goes on until the last request."""
    burstiness: float = 1.0
    """Shape of the gamma process, as `vllm bench serve --burstiness`; not looked at for the others."""

    def __post_init__(self) -> None:
        for name, value in (("rate", self.rate), ("burstiness", self.burstiness)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value:g}: must be above 0")
        if not self.stages:
            raise ValueError("an open loop needs a stage")
        if not self.stages[-1].end > 0:
            raise ValueError("the last stage must end at a rate above 0")

    def __str__(self) -> str:
        """Everything but the rate, in words."""
        name = f"gamma of burstiness {self.burstiness:g}" if self.process is ArrivalProcess.GAMMA else str(self.process)
        return f"{name}, {', '.join(_in_words(stage) for stage in self.stages)}"

    @property
    def seconds(self) -> float:
        """Length of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def highest_rate(self) -> float:
        """Requests a second at the height of the course."""
        return self.rate * max(max(stage.start, stage.end) for stage in self.stages)

    @property
    def requests(self) -> int:
        """Requests that are sent: as many as are expected in all stages, at least one."""
        return max(1, round(self.rate * sum(stage.area for stage in self.stages)))

    def times(self, number: int, seed: str) -> list[float]:
        """Return when the first `number` requests are due: seconds since the start, ascending.

        Nothing is scaled to make the number come out in the stages' time (`vllm bench serve` does that with its gaps):
        the count in a given time has the spread that the process has.
        """
        return list(self._due(number, random.Random(f"arrivals:{seed}")))

    def _due(self, number: int, dice: random.Random) -> Iterator[float]:
        """By a change of time: moments of a process of the whole rate, taken as integrals of the shares."""
        ahead = list(self.stages)
        at = before = begun = 0.0
        for index in range(number):
            if index or self.process is not ArrivalProcess.CONSTANT:
                at += self._gap(dice) / self.rate
            while ahead and at - before > ahead[0].area:
                stage = ahead.pop(0)
                before, begun = before + stage.area, begun + stage.seconds
            yield begun + (ahead[0].after(at - before) if ahead else (at - before) / self.stages[-1].end)

    def _gap(self, dice: random.Random) -> float:
        if self.process is ArrivalProcess.CONSTANT:
            return 1.0
        if self.process is ArrivalProcess.POISSON:
            return dice.expovariate(1.0)
        return dice.gammavariate(self.burstiness, 1 / self.burstiness)


def _in_words(stage: Stage) -> str:
    if stage.start == stage.end == 1:
        return f"{stage.seconds:g} s"
    if stage.start == stage.end:
        return f"{stage.start:g} of the rate for {stage.seconds:g} s"
    return f"{stage.start:g} to {stage.end:g} of the rate in {stage.seconds:g} s"
