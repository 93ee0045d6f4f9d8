"""A level that ends once its metric is known within a share of itself: how often the truth is within that share.

    python benchmarks/stopping_truth.py [LEVELS]

An interval of 95 % is one of a number of values that was fixed beforehand. Ending at the first look at which it is
narrow enough favours those that are narrow by chance. Latencies here are independent of each other, a level has 32 of
them at the least, and is looked at after every eight.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

from contract.specs import METRICS
from workers.load.ending import Estimate

SEED = 20261127
LEAST, EVERY = 32, 8
WITHIN = (0.1, 0.2, 0.3)
SHARES = {metric: METRICS[metric] for metric in ("mean_e2e_s", "p50_e2e_s", "p95_e2e_s")}


@dataclass(frozen=True)
class Latencies:
    """A distribution, and what is true of it."""

    name: str
    draw: Callable[[random.Random], float]
    mean: float
    quantile: Callable[[float], float]

    def truth(self, metric: str) -> float:
        """Return the metric itself."""
        share = SHARES[metric]
        return self.mean if share is None else self.quantile(share)


def _lognormal(sigma: float) -> Latencies:
    return Latencies(
        f"lognormal of {sigma:g}",
        lambda rng: rng.lognormvariate(0, sigma),
        math.exp(sigma**2 / 2),
        lambda share: math.exp(sigma * NormalDist().inv_cdf(share)),
    )


LATENCIES = (
    Latencies("exponential", lambda rng: rng.expovariate(1), 1.0, lambda share: -math.log(1 - share)),
    _lognormal(0.3),
    _lognormal(1.0),
)


def stopped(latencies: Latencies, metric: str, within: float, rng: random.Random) -> float:
    """Return the metric of a level that ended at the first look at which its interval was narrow enough."""
    estimate, values, share = Estimate(metric), [], SHARES[metric]
    while True:
        for _ in range(EVERY):
            values.append(latencies.draw(rng))
            estimate.add(values[-1])
        width = estimate.half_width() if estimate.count >= LEAST else None
        if width is not None and width <= within:
            break
    return sum(values) / len(values) if share is None else sorted(values)[int(len(values) * share)]


def covered(latencies: Latencies, metric: str, within: float, levels: int, seed: int = SEED) -> float:
    """Return the share of so many levels whose metric is within `within` of itself from the truth."""
    rng, truth = random.Random(seed), latencies.truth(metric)
    found = (stopped(latencies, metric, within, rng) for _ in range(levels))
    return sum(abs(each - truth) <= within * each for each in found) / levels


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("levels", nargs="?", type=int, default=1000, help="%(default)s where left out")
    levels = parser.parse_args().levels
    for latencies in LATENCIES:
        for metric in SHARES:
            shares = ((within, covered(latencies, metric, within, levels)) for within in WITHIN)
            told = ", ".join(f"{share:.1%} within {within:.0%}" for within, share in shares)
            print(f"{latencies.name}, {metric}: {told}", flush=True)


if __name__ == "__main__":
    main()
