"""Lengths that differ from request to request: within their bounds, of the asked shape, the same everywhere."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract.lengths import Drawn, LogNormal, Normal, Uniform, draw, expected, highest, lowest, words
from contract.specs import canonical_json

ROOT = Path(__file__).parent.parent
SHAPES = [
    Uniform(100, 400),
    Normal(512, 128, 64, 1024),
    Normal(40, 60, 30, 300),  # cut hard on one side
    LogNormal(512, 400, 64, 4096),
    LogNormal(200, 600, 100, 250),  # little of it is left
]


@st.composite
def drawn_lengths(strategy: st.DrawFn) -> Drawn:
    low = strategy(st.integers(1, 5000))
    high = low + strategy(st.integers(0, 5000))
    if strategy(st.booleans()):
        return Uniform(low, high)
    mean = strategy(st.floats(low, high))
    std = strategy(st.floats(1e-3, 1e6))
    return strategy(st.sampled_from([Normal, LogNormal]))(mean, std, low, high)


@given(drawn_lengths(), st.integers(0, 2**40), st.integers(0, 2**33))
def test_every_length_lies_in_its_bounds_and_follows_from_seed_and_number(
    lengths: Drawn, seed: int, number: int
) -> None:
    drawn = draw(lengths, "prompt", seed, number)
    assert lengths.low == lowest(lengths) <= drawn <= highest(lengths) == lengths.high
    assert drawn == draw(lengths, "prompt", seed, number)
    assert lengths.low - 0.5 <= expected(lengths) <= lengths.high + 0.5


@given(drawn_lengths())
def test_even_the_outermost_shares_stay_within_the_bounds(lengths: Drawn) -> None:
    outermost = [lengths.at(0.0), lengths.at(math.nextafter(1, 0))]
    assert lengths.low <= min(outermost)
    assert max(outermost) <= lengths.high


@pytest.mark.parametrize("lengths", SHAPES, ids=str)
def test_their_mean_is_the_expected_one(lengths: Drawn) -> None:
    sample = [draw(lengths, "prompt", 1, number) for number in range(20_000)]
    assert fmean(sample) == pytest.approx(expected(lengths), abs=4 * stdev(sample) / math.sqrt(len(sample)) + 0.1)


def redrawn(lengths: Normal | LogNormal, count: int) -> list[int]:
    """Draw as the docstring says it: again and again until the length falls inside."""
    rng, found = random.Random(5), []
    variance = math.log1p((lengths.std / lengths.mean) ** 2)
    while len(found) < count:
        if isinstance(lengths, Normal):
            value = round(rng.gauss(lengths.mean, lengths.std))
        else:
            value = round(rng.lognormvariate(math.log(lengths.mean) - variance / 2, math.sqrt(variance)))
        if lengths.low <= value <= lengths.high:
            found.append(value)
    return found


@pytest.mark.parametrize("lengths", [each for each in SHAPES if not isinstance(each, Uniform)], ids=str)
def test_what_falls_outside_is_as_good_as_drawn_again(lengths: Normal | LogNormal) -> None:
    count = 5000
    ours = sorted(draw(lengths, "prompt", 2, number) for number in range(count))
    theirs = sorted(redrawn(lengths, count))
    apart = max(  # Kolmogorov and Smirnov's distance; 1.95 is its limit at one in a thousand
        abs(sum(v <= at for v in ours) - sum(v <= at for v in theirs)) / count for at in theirs[::50]
    )
    assert apart < 1.95 * math.sqrt(2 / count)


def test_without_bounds_that_matter_mean_and_deviation_are_those_of_the_tokens() -> None:
    sample = [draw(LogNormal(300, 150, 1, 10**6), "output", 3, number) for number in range(20_000)]
    assert fmean(sample) == pytest.approx(300, rel=0.02)
    assert stdev(sample) == pytest.approx(150, rel=0.05)


def test_every_uniform_length_comes_as_often_as_any_other() -> None:
    sample = [draw(Uniform(3, 6), "prompt", 0, number) for number in range(8000)]
    assert all(sample.count(length) == pytest.approx(2000, rel=0.1) for length in range(3, 7))


def test_prompts_and_answers_are_drawn_apart() -> None:
    pairs = [(draw(SHAPES[0], "prompt", 0, n), draw(SHAPES[0], "output", 0, n)) for n in range(4000)]
    mean = fmean(a for a, _ in pairs)
    covariance = fmean((a - mean) * (b - mean) for a, b in pairs)
    assert abs(covariance) < 0.06 * stdev(a for a, _ in pairs) ** 2


def test_a_fixed_length_is_an_int_and_stays_one() -> None:
    assert (draw(12, "prompt", 0, 5), lowest(12), highest(12), expected(12), words(12)) == (12, 12, 12, 12, None)
    assert canonical_json([12]) == "[12]"


def test_distributions_of_equal_figures_are_not_the_same_content() -> None:
    assert canonical_json(Normal(9, 2, 1, 20)) != canonical_json(LogNormal(9, 2, 1, 20))
    assert json.loads(canonical_json(Uniform(1, 2))) == {"kind": "uniform", "low": 1, "high": 2}


def test_another_process_draws_the_same() -> None:
    code = (
        "from contract.lengths import *; print([draw(LogNormal(512, 400, 64, 4096), 'prompt', 9, n) for n in range(9)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={"PYTHONHASHSEED": "7"}, capture_output=True, check=True
    )
    assert json.loads(done.stdout) == [draw(LogNormal(512, 400, 64, 4096), "prompt", 9, n) for n in range(9)]


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Uniform(0, 5), "low is 0: must be at least 1"),
        (lambda: Uniform(6, 5), "low 6 is above high 5"),
        (lambda: Normal(9, 1, 10, 20), "mean 9 is not within low 10 and high 20"),
        (lambda: LogNormal(15, 0, 10, 20), "std is 0: must be above 0"),
        (lambda: LogNormal(15, math.inf, 10, 20), "std is inf: must be above 0"),
        (lambda: Normal(math.nan, 1, 10, 20), "mean nan is not within"),
    ],
)
def test_what_cannot_be_drawn_is_refused(make, complaint: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=complaint):
        make()
