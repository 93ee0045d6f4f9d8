"""What `benchmarks/client/run.py` prints beneath its table."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CLIENT = Path(__file__).parents[1] / "benchmarks" / "client"
Ratios = Callable[[dict[str, list[dict[str, Any]]]], list[str]]


@pytest.fixture
def ratios(monkeypatch: pytest.MonkeyPatch) -> Ratios:
    monkeypatch.syspath_prepend(str(CLIENT))
    made: Ratios = runpy.run_path(str(CLIENT / "run.py"))["ratios"]
    return made


def runs(*cpu: tuple[float, float]) -> list[dict[str, Any]]:
    return [{"us_window": window, "us_all": parsed} for window, parsed in cpu]


def test_our_cpu_is_held_against_that_of_every_other_client(ratios: Ratios) -> None:
    found = {"floor": runs((4, 4)), "ours": runs((5, 6), (6, 9), (90, 90)), "bench": runs((24, 24)),
             "guidellm": runs((60, 180))}  # fmt: skip
    assert ratios(found) == [
        "ours / the floor, CPU a token: 1.50 in the window, 2.25 with all parsing",
        "ours / vllm bench serve, CPU a token: 0.25 in the window, 0.38 with all parsing",
        "ours / guidellm, CPU a token: 0.10 in the window, 0.05 with all parsing",
    ]


def test_without_a_turn_of_ours_there_is_nothing_to_hold(ratios: Ratios) -> None:
    assert ratios({"floor": runs((4, 4)), "bench": runs((24, 24))}) == []
