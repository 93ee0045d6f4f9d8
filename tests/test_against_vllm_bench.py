"""The benchmark against vLLM's own client: neither side may gain by coming first."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from benchmarks.against_vllm_bench import ServerView, Turn, in_turns, ratio
from workers.histogram import Histogram
from workers.metrics import ServerMetrics


def test_sides_take_turns_in_coming_first_and_the_first_pair_is_thrown_away() -> None:
    order: list[str] = []

    def side(name: str) -> Callable[[int], Turn]:
        def turn(number: int) -> Turn:
            order.append(name)
            return Turn(number, 0.0, 0.0, 0.0, ServerView(None, None, None, 0.0))

        return turn

    ours, theirs = in_turns(3, side("a"), side("b"))
    assert "".join(order) == "abbaabba"
    assert [turn.tok_s for turn in ours] == [turn.tok_s for turn in theirs] == [1, 2, 3]


def test_a_ratio_is_that_of_the_pairs_so_what_both_sides_share_is_in_no_interval() -> None:
    """Drift of the server by 50 % from pair to pair, and a side that is 2 % faster in each."""
    exact = ratio([102.0, 153.0, 204.0], [100.0, 150.0, 200.0])
    assert exact is not None
    assert (exact.low, exact.centre, exact.high) == pytest.approx((1.02, 1.02, 1.02))


def test_a_ratios_interval_is_students() -> None:
    """Logarithms -0.01, 0, 0.01: sd 0.01, t(0.95, 2) = 2.920."""
    of = ratio([math.exp(-0.01), 1.0, math.exp(0.01)], [1.0, 1.0, 1.0])
    assert of is not None
    margin = 2.920 * 0.01 / math.sqrt(3)
    assert (of.low, of.centre, of.high) == pytest.approx((math.exp(-margin), 1.0, math.exp(margin)), rel=1e-5)


def test_one_pair_and_a_figure_of_nothing_have_no_ratio() -> None:
    assert ratio([1.0], [1.0]) is None
    assert ratio([0.0, 1.0], [1.0, 1.0]) is None


def test_the_servers_view_of_a_turn_is_what_it_gained() -> None:
    before = ServerMetrics(prefix_queries=100, prefix_hits=10, ttft_s=Histogram(5.0, 10), queue_s=Histogram(0.0, 10))
    after = ServerMetrics(prefix_queries=300, prefix_hits=20, ttft_s=Histogram(6.0, 14), queue_s=Histogram(0.4, 14))
    assert ServerView.between(before, after) == ServerView(0.25, 0.1, None, 0.05)
