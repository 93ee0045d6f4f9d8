"""Does a server keep up? On synthetic levels whose truth is known: how often the verdict is false, and how often none.

    python benchmarks/keeping_up_truth.py [LEVELS]

A level sends 20 to 600 requests: Poisson, gamma (burstiness 0.2 to 4) or constant arrivals; flat, in two steps, on a
ramp, or on a ramp and then flat. Its server is ideal. A third have no limit, and answer each request in the same time;
a third serve one after the other, and can do what was sent or up to eight times as much; a third at most 85 % of it.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Callable, Sequence

from contract.arrivals import ArrivalProcess, Arrivals, Stage
from contract.rows import RequestRow
from workers.load.keeping_up import keeping_up, waits_s

SEED = 20261127
LEAST, MOST = 20, 600
"""Requests of a level."""
COURSES = (
    (Stage(1.0),),
    (Stage(1.0), Stage(1.0, 0.3, 0.3)),
    (Stage(1.0, 0, 1),),
    (Stage(0.25, 0.2, 1), Stage(0.75)),
)

Server = Callable[[random.Random, Sequence[float]], list[RequestRow]]


def without_limit(rng: random.Random, sends: Sequence[float]) -> list[RequestRow]:
    """Return requests that are all answered in the same time."""
    e2e_s = 10 ** rng.uniform(-2, 1.3)
    return [RequestRow(n, sent_s, True, e2e_s=e2e_s) for n, sent_s in enumerate(sends)]


def enough(rng: random.Random, sends: Sequence[float]) -> list[RequestRow]:
    """Return the requests of a server that can do what was sent, or more."""
    return _queued(rng, sends, rng.choice((1.0, rng.uniform(1, 8))))


def too_little(rng: random.Random, sends: Sequence[float]) -> list[RequestRow]:
    """Return the requests of a server that can do at most 85 % of what was sent."""
    return _queued(rng, sends, rng.choice((0.85, rng.uniform(0.002, 0.85))))


SERVERS: dict[str, tuple[Server, bool]] = {
    "without a limit": (without_limit, True),
    "that can do what was sent": (enough, True),
    "that can do 85 % of it at most": (too_little, False),
}
"""With whether they keep up."""


def verdicts(server: Server, levels: int, seed: int = SEED) -> Counter[bool | None]:
    """Return how often each verdict is given on so many levels of a server."""
    rng = random.Random(seed)
    found = (keeping_up(server(rng, _sends(rng))) for _ in range(levels))
    return Counter(each.keeps_up if each is not None else None for each in found)


def _sends(rng: random.Random) -> list[float]:
    number = rng.randint(LEAST, MOST)
    process, stages = rng.choice(list(ArrivalProcess)), rng.choice(COURSES)
    rate = number / sum(stage.area for stage in stages)
    return Arrivals(process, rate, stages, 10 ** rng.uniform(-0.7, 0.6)).times(number, str(rng.random()))


def _queued(rng: random.Random, sends: Sequence[float], share: float) -> list[RequestRow]:
    capacity = share * (len(sends) - 1) / (sends[-1] - sends[0])
    least_s = rng.choice((0.0, rng.uniform(0, 6) * (sends[-1] - sends[0]) / 30))
    return [
        RequestRow(n, sent_s, True, e2e_s=wait_s + 1 / capacity + least_s)
        for n, (sent_s, wait_s) in enumerate(zip(sends, waits_s(sends, capacity), strict=True))
    ]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("levels", nargs="?", type=int, default=18_000, help="%(default)s where left out")
    levels = parser.parse_args().levels
    for name, (server, keeps_up) in SERVERS.items():
        each = levels // len(SERVERS)
        found = verdicts(server, each)
        print(
            f"{each} levels of a server {name}: {found[not keeps_up]} false, {found[None] / each:.1%} without a verdict"
        )


if __name__ == "__main__":
    main()
