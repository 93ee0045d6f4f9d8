"""How late load processes were, in words: what tables and the command line name beside a level's figures. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from contract.rows import ClientRow

NAMED_FROM_S = 0.002
"""From here on is named by how much a load client was late, far below what makes it the limit: a reader of a level
with gaps of 10 ms must be told what of its p99 is the client's. The timers of its event loop are good for 1 ms."""
RAISED: Mapping[str, str] = {
    "gap_p99_raised_s": "stalls of a load process raised its p99 gap between chunks by {n} ms",
    "ttft_p95_raised_s": "stalls of a load process raised its p95 of TTFT by {n} ms",
    "e2e_p95_raised_s": "stalls of a load process raised its p95 of E2EL by {n} ms",
    "tpot_p95_raised_s": "stalls of a load process raised its p95 of TPOT by {n} ms",
}
"""What stalls did, by the columns of `contract.rows.ClientRow`, and the words for the worst process."""
ADDED: Mapping[str, str] = {**RAISED, "slip_p99_s": "a load process sent up to {n} ms late (p99)"}
"""All that load processes say they added to a level's figures."""
LAG = "the load client's event loop was up to {n} ms late (p99)"
"""The words for the worst `lag_p99_s`."""


def in_an_answer(tokens: float | None) -> float:
    """Return how many times TPOT is in the time of an answer of so many tokens: once for each but the first.

    So often it counts where it is held against a time: a last chunk that is 10 ms late is 0.3 ms of 32 tokens' TPOT.
    """
    return max((tokens or 1.0) - 1.0, 1.0)


def named_s(clients: Iterable[ClientRow], columns: Iterable[str], tokens: float | None) -> dict[str, float]:
    """Return the worst process's seconds of those columns that are to be named; an answer has so many tokens."""
    clients = tuple(clients)
    worst = {column: max((getattr(each, column) or 0.0 for each in clients), default=0.0) for column in columns}
    times = {"tpot_p95_raised_s": in_an_answer(tokens)}
    return {column: s for column, s in worst.items() if s * times.get(column, 1.0) > NAMED_FROM_S}


def in_ms(seconds: float) -> str:
    """Return seconds as milliseconds for a sentence, with two digits below 10."""
    ms = 1000 * seconds
    return f"{ms:.0f}" if ms >= 9.95 else f"{ms:.2g}"
