"""Knees, blow-ups and intervals on synthetic runs whose truth is known: how often analysis is right, and how exact.

    python benchmarks/knee_truth.py [RUNS]

A run has 6 to 9 levels in doublings, 3 or 5 repeats, and lognormal noise of 1 to 5 % on tok/s and on p95. Throughput
follows P (1 + (K / c) ** a) ** (-1 / a): it scales up to about K requests and is flat beyond, with a sharp or a soft
bend. In half of the runs it also falls past some level. p95 is what Little's law leaves, and in half of the runs its
tail grows longer past K. The truth is the rule of docs/definitions.md on the curve without noise. A run is *at the
border* where the true gain of its last doubling is within two true standard errors of the rule's 10 %; those are
counted apart. A 95 % interval is decided for sure about twice as far from the border only, so some runs with a clear
knee stay undecided, too: shares are given of all knees, the undecided as misses, and of those that were found. What
`+sweep=knee` finds of such servers: `knee_search.py`.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from analysis.load.knee import BlowUp, Knee, KneeVerdict, Level, find_blow_up, find_knee
from analysis.numbers.intervals import noise_of, pooled, pooled_noise, spread

SEED = 20261125
WITHIN_PEAK, STILL_GAINS = 0.05, 0.10
"""The rule again, not imported: a rule that was changed by accident must not take the truth with it."""
ANSWER_TOKENS = 64
BANDS = ((0.01, 0.02), (0.02, 0.03), (0.03, 0.04), (0.04, 0.05))
"""Of noise: standard deviations."""


@dataclass(frozen=True)
class Truth:
    """A curve without noise, and what the rule says about it."""

    levels: tuple[int, ...]
    tok_s: tuple[float, ...]
    p95_s: tuple[float, ...]

    @property
    def doubling(self) -> float:
        """Share that the last doubling gains."""
        return self.tok_s[-1] / self.tok_s[-2] - 1

    @property
    def knee(self) -> int | None:
        """The lowest level within the band; None where there is no knee yet."""
        if self.doubling > STILL_GAINS:
            return None
        return next(c for c, t in zip(self.levels, self.tok_s, strict=True) if t >= (1 - WITHIN_PEAK) * max(self.tok_s))

    @property
    def last_before_blow_up(self) -> int:
        """The level with the lowest p95 over tok/s."""
        return min(zip(self.levels, self.tok_s, self.p95_s, strict=True), key=lambda at: at[2] / at[1])[0]


@dataclass(frozen=True)
class Trial:
    """A truth, the noise that it was seen through, and what came out."""

    truth: Truth
    sds: tuple[float, ...]
    """Of every level."""
    repeats: int
    knee: Knee
    blow_up: BlowUp
    covered: tuple[bool, ...]
    """Of every level, for tok/s and then for p95: whether the interval holds the true value."""
    covered_by_pool: tuple[bool, ...]
    """The same of an interval that takes the pooled noise for every level's."""
    wider: tuple[float, ...]
    """How much wider the interval is than that one, on the logarithm."""

    @property
    def sd(self) -> float:
        """The noise of its levels on average."""
        return math.fsum(self.sds) / len(self.sds)

    @property
    def at_the_border(self) -> bool:
        """Whether the true gain of the last doubling is within two standard errors of the rule's."""
        return self.errors_from_the_border < 2

    @property
    def errors_from_the_border(self) -> float:
        """How many true standard errors lie between the true gain of the last doubling and the rule's."""
        away = math.log1p(self.truth.doubling) - math.log1p(STILL_GAINS)
        return abs(away) / (self.sd * math.sqrt(2 / self.repeats))


def trials(runs: int, seed: int = SEED, uneven: bool = False) -> Iterator[Trial]:
    """Yield so many runs, seen through noise; `uneven`: each level has its own noise of 1 to 5 %."""
    rng = random.Random(seed)
    for _ in range(runs):
        truth = make_truth(rng)
        repeats, sd = rng.choice((3, 5)), rng.uniform(0.01, 0.05)
        sds = tuple(rng.uniform(0.01, 0.05) if uneven else sd for _ in truth.levels)
        levels = tuple(
            Level(at, _seen(rng, tok_s, own, repeats), _seen(rng, p95, own, repeats))
            for at, tok_s, p95, own in zip(truth.levels, truth.tok_s, truth.p95_s, sds, strict=True)
        )
        yield _judge(truth, levels, sds, repeats)


@dataclass(frozen=True)
class Curve:
    """A server without noise, at any level."""

    bend: float
    sharpness: float
    falls_from: float
    fall: float
    tail: float

    def tok_s(self, level: int) -> float:
        """Rises up to about `bend`, and past `falls_from` it falls."""
        rising = 9000 * (1 + (self.bend / level) ** self.sharpness) ** (-1 / self.sharpness)
        return rising * min(1.0, self.falls_from / level) ** self.fall

    def p95_s(self, level: int) -> float:
        """By Little's law, with a tail that grows past `bend`."""
        return 1.1 * level * ANSWER_TOKENS / self.tok_s(level) * max(1.0, level / self.bend) ** self.tail

    def at(self, levels: Iterable[int]) -> Truth:
        """Return what a grid of levels has for its truth."""
        levels = tuple(levels)
        return Truth(levels, tuple(map(self.tok_s, levels)), tuple(map(self.p95_s, levels)))


def make_truth(rng: random.Random) -> Truth:
    """Return a curve with its bend anywhere from the second level to two levels past the last, at 6 to 9 doublings."""
    curve, count = make_curve(rng)
    return curve.at(2**i for i in range(count))


def make_curve(rng: random.Random) -> tuple[Curve, int]:
    """Return a curve, and how many doublings it is to be seen at."""
    count = rng.randint(6, 9)
    bend, sharpness = 2 ** rng.uniform(1, count + 1), math.exp(rng.uniform(math.log(1.5), math.log(10)))
    falls_from = bend * 2 ** rng.uniform(0.5, 2) if rng.random() < 0.5 else math.inf
    fall, tail = rng.uniform(0.05, 0.4), rng.uniform(0.2, 0.8) if rng.random() < 0.5 else 0.0
    return Curve(bend, sharpness, falls_from, fall, tail), count


def _seen(rng: random.Random, value: float, sd: float, repeats: int) -> tuple[float, ...]:
    return tuple(value * math.exp(rng.gauss(0, sd)) for _ in range(repeats))


def _judge(truth: Truth, levels: tuple[Level, ...], sds: tuple[float, ...], repeats: int) -> Trial:
    tok_s = pooled_noise([level.tok_s for level in levels])
    assert tok_s is not None
    blow_up = find_blow_up(levels, pooled_noise([level.waiting_per_work for level in levels]))
    assert blow_up is not None
    seen = []
    for name, truths in (("tok_s", truth.tok_s), ("p95_s", truth.p95_s)):
        spreads = [spread(getattr(level, name)) for level in levels]
        pool = pooled(spreads)
        for level, own, true in zip(levels, spreads, truths, strict=True):
            noise = noise_of(own, spreads)
            assert noise is not None
            assert pool is not None
            found, plain = (each.interval(getattr(level, name)) for each in (noise, pool))
            wider = math.log(found.high / found.low) / math.log(plain.high / plain.low)
            seen.append((found.low <= true <= found.high, plain.low <= true <= plain.high, wider))
    covered, by_pool, wider_ = zip(*seen, strict=True)
    return Trial(truth, sds, repeats, find_knee(levels, tok_s), blow_up, covered, by_pool, wider_)


@dataclass(frozen=True)
class Shares:
    """What a set of trials shows. Shares are of the runs named; runs at the border are not among them."""

    runs: int
    at_the_border: int
    undecided_at_the_border: int
    numbers_at_the_border_without_a_knee: int
    """Runs at the border without a true knee that were given one: at most 2.5 % of them are expected."""
    knees: int
    without_a_knee: int
    numbers_without_a_knee: int
    """Runs without a true knee that were given one."""
    knees_undecided: int
    """Runs with a true knee that were left undecided."""
    knees_undecided_nearby: int
    """Of these, within twice the border's distance of it."""
    knees_found: int
    knees_called_no_knee: int
    set_holds_truth: float
    """Of the knees that were found."""
    truth_of_all_knees: float
    """The same of all knees: the undecided have no set to hold it."""
    set_holds_one_or_two: float
    one_or_two_of_all_knees: float
    """The same, the undecided counted as sets that are too large."""
    mean_set: float
    blow_up_holds_truth: float
    blow_up_holds_one_or_two: float
    intervals_cover_tok_s: float
    intervals_cover_p95: float


def shares(made: list[Trial]) -> Shares:
    """Return the shares over trials."""
    border = [t for t in made if t.at_the_border]
    clear = [t for t in made if not t.at_the_border]
    knees = [t for t in clear if t.truth.knee is not None]
    found = [t for t in knees if t.knee.verdict is KneeVerdict.KNEE]
    undecided = [t for t in knees if t.knee.verdict is KneeVerdict.UNDECIDED]
    without = [t for t in clear if t.truth.knee is None]
    covered = [(t.covered[: len(t.truth.levels)], t.covered[len(t.truth.levels) :]) for t in made]
    return Shares(
        runs=len(made),
        at_the_border=len(border),
        undecided_at_the_border=sum(t.knee.verdict is KneeVerdict.UNDECIDED for t in border),
        numbers_at_the_border_without_a_knee=sum(bool(t.knee.could_be) for t in border if t.truth.knee is None),
        knees=len(knees),
        without_a_knee=len(without),
        numbers_without_a_knee=sum(bool(t.knee.could_be) for t in without),
        knees_undecided=len(undecided),
        knees_undecided_nearby=sum(t.errors_from_the_border < 4 for t in undecided),
        knees_found=len(found),
        knees_called_no_knee=sum(t.knee.verdict is KneeVerdict.NO_KNEE_YET for t in knees),
        set_holds_truth=_share([t.truth.knee in t.knee.could_be for t in found]),
        truth_of_all_knees=_share([t.truth.knee in t.knee.could_be for t in knees]),
        set_holds_one_or_two=_share([len(t.knee.could_be) <= 2 for t in found]),
        one_or_two_of_all_knees=_share([1 <= len(t.knee.could_be) <= 2 for t in knees]),
        mean_set=_share([len(t.knee.could_be) for t in found]),
        blow_up_holds_truth=_share([t.truth.last_before_blow_up in t.blow_up.last_before for t in made]),
        blow_up_holds_one_or_two=_share([len(t.blow_up.last_before) <= 2 for t in made]),
        intervals_cover_tok_s=_share([hit for tok_s, _ in covered for hit in tok_s]),
        intervals_cover_p95=_share([hit for _, p95 in covered for hit in p95]),
    )


def coverage(made: list[Trial], by_pool: bool = False) -> dict[tuple[float, float], float]:
    """Return how many of the intervals of both metrics hold the truth, by the true noise of their level."""
    held = {id(t): t.covered_by_pool if by_pool else t.covered for t in made}
    return {
        (low, high): _share(
            [hit for t in made for sd, hit in zip(t.sds * 2, held[id(t)], strict=True) if low <= sd < high]
        )
        for low, high in BANDS
    }


def _share(hits: list[bool] | list[int] | list[float]) -> float:
    return sum(hits) / len(hits) if hits else math.nan


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="?", type=int, default=2000, help="%(default)s where left out")
    runs = parser.parse_args().runs
    made = list(trials(runs))
    print_shares("all", made)
    for repeats in (3, 5):
        print_shares(f"{repeats} repeats", [t for t in made if t.repeats == repeats])
    for low, high in BANDS:
        print_shares(f"noise of {low:.0%} to {high:.0%}", [t for t in made if low <= t.sd < high])
    uneven = list(trials(runs, uneven=True))
    print_shares("each level its own noise, which the pool takes for one", uneven)
    for what, some in (("all levels the same noise", made), ("each level its own", uneven)):
        for repeats in (3, 5):
            own = [t for t in some if t.repeats == repeats]
            for by_pool in (False, True):
                held = coverage(own, by_pool).items()
                words = ", ".join(f"{share:.1%} at {low:.0%} to {high:.0%}" for (low, high), share in held)
                print(f"{what}, {repeats} repeats, {'the pool alone covers' if by_pool else 'intervals cover'} {words}")
            print(f"  wider than the pool's by a factor of {_share([w for t in own for w in t.wider]):.2f} on average")


def print_shares(what: str, made: list[Trial]) -> None:
    """Print the shares of some trials."""
    s = shares(made)
    print(
        f"{what}: {s.runs} runs\n"
        f"  knee: {s.knees} runs, {s.knees_found} of them found, {s.knees_undecided} undecided "
        f"({s.knees_undecided_nearby} of these within 4 standard errors of the rule's border), "
        f"{s.knees_called_no_knee} called no knee yet\n"
        f"  of all, the undecided as misses, the set holds the truth in {s.truth_of_all_knees:.1%} and one or two "
        f"levels in {s.one_or_two_of_all_knees:.1%}; of those found in {s.set_holds_truth:.1%} and "
        f"{s.set_holds_one_or_two:.1%}, {s.mean_set:.2f} on average\n"
        f"  no knee: {s.without_a_knee} runs; given a number: {s.numbers_without_a_knee}\n"
        f"  at the border: {s.at_the_border} runs, {s.undecided_at_the_border} of them undecided, "
        f"{s.numbers_at_the_border_without_a_knee} given a number that have no knee\n"
        f"  blow-up: the set holds the truth in {s.blow_up_holds_truth:.1%}, one or two levels in "
        f"{s.blow_up_holds_one_or_two:.1%}\n"
        f"  95 % intervals cover: tok/s {s.intervals_cover_tok_s:.1%}, p95 {s.intervals_cover_p95:.1%}"
    )


if __name__ == "__main__":
    main()
