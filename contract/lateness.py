"""What a load client added to a level's figures, in words: what tables and the command line name beside them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

NAMED_FROM_S = 0.002
"""From here on is named by how much a load client was late, far below what makes it the limit: a reader of a level
with gaps of 10 ms must be told what of its p99 is the client's. The timers of its event loop are good for 1 ms."""
_FIGURES: Mapping[str, str] = {
    "gap_p99_raised_s": "p99 gap between chunks",
    "ttft_p95_raised_s": "p95 of TTFT",
    "ttft_p99_raised_s": "p99 of TTFT",
    "e2e_p95_raised_s": "p95 of E2EL",
    "e2e_p99_raised_s": "p99 of E2EL",
    "tpot_p95_raised_s": "p95 of TPOT",
}
RAISED: Mapping[str, str] = {
    column: f"stalls of load processes raised the level's {figure} by {{n}} ms" for column, figure in _FIGURES.items()
}
"""What stalls did to a level's figures, by the columns of `contract.rows.PointRow`."""
OWN_RAISED: Mapping[str, str] = {
    column: f"stalls of a load process raised the {_FIGURES[column]} of its own requests by {{n}} ms"
    for column in ("gap_p99_raised_s", "ttft_p95_raised_s", "e2e_p95_raised_s", "tpot_p95_raised_s")
}
"""What they did to the worst process's own, by the columns of `contract.rows.ClientRow`: all that is known of levels
before schema version 12."""
SLIP: Mapping[str, str] = {"slip_p99_s": "a load process sent up to {n} ms late (p99)"}
LAG: Mapping[str, str] = {"lag_p99_s": "the load client's event loop was up to {n} ms late (p99)"}
"""The words for the worst process's `slip_p99_s` and `lag_p99_s`."""


def in_an_answer(tokens: float | None) -> float:
    """Return how many times TPOT is in the time of an answer of so many tokens: once for each but the first.

    So often it counts where it is held against a time: a last chunk that is 10 ms late is 0.3 ms of 32 tokens' TPOT.
    """
    return max((tokens or 1.0) - 1.0, 1.0)


def named_s(rows: Iterable[object], columns: Iterable[str], tokens: float | None) -> dict[str, float]:
    """Return the highest seconds in those columns of levels or processes, where they are to be named; an answer has so
    many tokens."""
    rows = tuple(rows)
    worst = {column: max((getattr(each, column) or 0.0 for each in rows), default=0.0) for column in columns}
    times = {"tpot_p95_raised_s": in_an_answer(tokens)}
    return {column: s for column, s in worst.items() if s * times.get(column, 1.0) > NAMED_FROM_S}


def in_ms(seconds: float) -> str:
    """Return seconds as milliseconds for a sentence, with two digits below 10."""
    ms = 1000 * seconds
    return f"{ms:.0f}" if ms >= 9.95 else f"{ms:.2g}"
