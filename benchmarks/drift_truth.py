"""Drift of a server on synthetic sessions whose truth is known: how often it is said of a steady one, and missed.

    python benchmarks/drift_truth.py [SESSIONS]

A session's load is six levels in three rounds; its anchor is read at even times from before the first level on. Noise
is lognormal. A true drift is of 10 %: a step at any moment between the first reading and the last, or a trend.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from analysis.numbers.anchor_drift import Drift, Timed, find_drift

SEED = 20261127
LEVELS, ROUNDS = 6, 3
READINGS = (3, 4, 5, 6, 8, 10)
DRIFT = math.log(1.1)

Course = Callable[[float], float]
"""Logarithm of the server's speed at a time, 0 to 1."""


def steady(at: float) -> float:
    """Return that nothing drifts."""
    return 0.0


@dataclass(frozen=True)
class Session:
    """What is measured, and through which noise."""

    readings: int
    sd: float
    rounds: int = ROUNDS
    anchor_sd: float | None = None
    """Where the anchor scatters otherwise than the levels."""

    @property
    def last(self) -> float:
        """When the last reading is taken."""
        return (self.readings - 1) / self.readings

    def trend(self, at: float) -> float:
        """Return a drift along a line from the first reading to the last."""
        return DRIFT * at / self.last

    def step(self, rng: random.Random) -> Course:
        """Return a drift that comes at once."""
        when = rng.uniform(0, self.last)
        return lambda at: DRIFT * (at > when)

    def drift(self, rng: random.Random, course: Course = steady) -> Drift:
        """Return what is said of it."""

        def timed(at: float, sd: float) -> Timed:
            return Timed(at, 1000 * math.exp(course(at) + rng.gauss(0, sd)))

        anchors = [timed(n / self.readings, self.anchor_sd or self.sd) for n in range(self.readings)]
        every = self.rounds * LEVELS
        others = [
            [timed((r * LEVELS + level + 0.5) / every + 1e-6, self.sd) for r in range(self.rounds)]
            for level in range(LEVELS)
        ]
        found = find_drift(anchors, others)
        assert found is not None
        return found


def marked(session: Session, sessions: int, kind: str = "steady", seed: int = SEED) -> float:
    """Return the share of so many sessions that are said to have drifted."""
    rng = random.Random(seed)
    courses = {"steady": lambda: steady, "trend": lambda: session.trend, "step": lambda: session.step(rng)}
    return sum(session.drift(rng, courses[kind]()).drifted for _ in range(sessions)) / sessions


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sessions", nargs="?", type=int, default=2000, help="%(default)s where left out")
    sessions = parser.parse_args().sessions
    for rounds in (ROUNDS, 1):
        for sd in (0.01, 0.02, 0.03):
            _print(f"steady, noise of {sd:.0%}, repeats: {rounds}", sessions, "steady", sd, rounds)
        for kind in ("step", "trend"):
            _print(f"{kind} of 10 %, noise of 2 %, repeats: {rounds}", sessions, kind, 0.02, rounds)
    for anchor_sd in (0.03, 0.035, 0.05):
        _print(f"steady, noise of 2 %, of the anchor {anchor_sd:.1%}", sessions, "steady", 0.02, ROUNDS, anchor_sd)


def _print(what: str, sessions: int, kind: str, sd: float, rounds: int, anchor_sd: float | None = None) -> None:
    shares = ((n, marked(Session(n, sd, rounds, anchor_sd), sessions, kind)) for n in READINGS)
    print(f"{what}: " + ", ".join(f"{share:.1%} with {n} readings" for n, share in shares))


if __name__ == "__main__":
    main()
