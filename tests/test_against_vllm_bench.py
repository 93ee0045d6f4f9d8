"""The benchmark against vLLM's own client: neither side may gain by coming first."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.against_vllm_bench import Turn, in_turns


def test_sides_take_turns_in_coming_first_and_the_first_pair_is_thrown_away() -> None:
    order: list[str] = []

    def side(name: str) -> Callable[[int], Turn]:
        def turn(number: int) -> Turn:
            order.append(name)
            return Turn(number, 0.0, 0.0, 0.0)

        return turn

    ours, theirs = in_turns(3, side("a"), side("b"))
    assert "".join(order) == "abbaabba"
    assert [turn.tok_s for turn in ours] == [turn.tok_s for turn in theirs] == [1, 2, 3]
