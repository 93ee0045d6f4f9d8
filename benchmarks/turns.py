"""What one side's turn gave, and how the turns of two sides are held together. Pure; by `against_vllm_bench.py`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from analysis.numbers.intervals import Interval, mean_log, pooled_noise, t_quantile
from benchmarks.rounds import Pace
from workers.histogram import gained
from workers.metrics import ServerMetrics


@dataclass(frozen=True)
class Turn:
    """What one client says of one turn."""

    tok_s: float
    p50_ttft_s: float
    p50_tpot_s: float
    mean_ttft_s: float
    server: ServerView
    pace: Pace | None
    """None where no request followed another."""

    @property
    def outside_s(self) -> float | None:
        """Mean TTFT less the server's own: on the way, and in the client."""
        return None if self.server.ttft_s is None else self.mean_ttft_s - self.server.ttft_s


@dataclass(frozen=True)
class ServerView:
    """What the server counted of a turn: means a request in seconds, None where it does not say."""

    ttft_s: float | None
    queue_s: float | None
    prefill_s: float | None
    prefix_hits: float

    @property
    def before_engine_s(self) -> float | None:
        """Of its own TTFT what is neither queueing nor prefill: text is made tokens, the engine ends its step, the
        first token is brought back."""
        if self.ttft_s is None or self.queue_s is None or self.prefill_s is None:
            return None
        return self.ttft_s - self.queue_s - self.prefill_s

    @classmethod
    def between(cls, before: ServerMetrics, after: ServerMetrics) -> ServerView:
        """Return what came between two scrapes."""
        asked = (after.prefix_queries or 0) - (before.prefix_queries or 0)
        return cls(
            gained(before.ttft_s, after.ttft_s).mean,
            gained(before.queue_s, after.queue_s).mean,
            gained(before.prefill_s, after.prefill_s).mean,
            ((after.prefix_hits or 0) - (before.prefix_hits or 0)) / max(asked, 1),
        )


class Interrupted(Exception):
    """Ctrl-C came between the first turn and the last."""

    def __init__(self, kept: list[list[Turn]]) -> None:
        """Keep what each side gave in the rounds that were whole."""
        super().__init__(f"interrupted after {len(kept[0])} whole rounds")
        self.kept = kept


def in_turns(pairs: int, *sides: Callable[[int], Turn]) -> list[list[Turn]]:
    """Return what each side gave, `pairs` turns each, in the order ABBA (ABC, CBA, ...), the first round thrown away.

    A side is given a number that no other turn of it has. Raises `Interrupted` at Ctrl-C.
    """
    kept: list[list[Turn]] = [[] for _ in sides]
    try:
        for pair in range(pairs + 1):
            order = list(zip(sides, kept, strict=True))
            for side, into in reversed(order) if pair % 2 else order:
                turn = side(pair)
                if pair:
                    into.append(turn)
    except KeyboardInterrupt:
        whole = min(map(len, kept))
        raise Interrupted([turns[:whole] for turns in kept]) from None
    return kept


RATIO_TAIL = 0.05
"""Of an interval, on either side."""


def ratio(ours: list[float], theirs: list[float]) -> Interval | None:
    """Return the geometric mean of the pairs' ratios with its 90 % interval; None for one pair, or a value of 0."""
    if min([*ours, *theirs]) <= 0:
        return None
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    noise = pooled_noise([ratios])
    if noise is None:
        return None
    centre, margin = mean_log(ratios), noise.margin(1 / len(ratios), RATIO_TAIL)
    return Interval(math.exp(centre), math.exp(centre - margin), math.exp(centre + margin))


def difference(ours: list[float], theirs: list[float]) -> Interval | None:
    """Return the mean of the pairs' differences with its 90 % interval (paired t), in their unit; None for one pair."""
    differences = [one - other for one, other in zip(ours, theirs, strict=True)]
    if len(differences) < 2:
        return None
    centre = statistics.fmean(differences)
    standard_error = statistics.stdev(differences) / math.sqrt(len(differences))
    margin = t_quantile(1 - RATIO_TAIL, len(differences) - 1) * standard_error
    return Interval(centre, centre - margin, centre + margin)


@dataclass(frozen=True)
class Figure:
    """What is printed of both sides' turns, None where one does not tell, and how the sides are held together."""

    name: str
    of: Callable[[Turn], float | None]
    unit: str = "ms"
    scale: float = 1000
    apart: Callable[[list[float], list[float]], Interval | None] = ratio

    def line(self, ours: list[Turn], theirs: list[Turn]) -> str:
        """Return medians, ranges and what sets the sides apart."""
        sides = [
            [value * self.scale for turn in turns if (value := self.of(turn)) is not None] for turns in (ours, theirs)
        ]
        if not all(len(side) == len(ours) for side in sides):
            return f"{self.name}: not known of every turn"
        cells = [f"{statistics.median(side):.2f} ({min(side):.2f} to {max(side):.2f})" for side in sides]
        line = f"{self.name}: {cells[0]} against {cells[1]} {self.unit}"
        of = self.apart(*sides)
        if of is None:
            return line
        if self.apart is difference:
            return f"{line}, {of.centre:+.2f} {self.unit} (90 % interval {of.low:+.2f} to {of.high:+.2f})"
        return f"{line}, ratio {of.centre:.4f} (90 % interval {of.low:.4f} to {of.high:.4f})"


FIGURES = (
    Figure("tok_s", lambda turn: turn.tok_s, "tok/s", 1),
    Figure("p50_ttft_s", lambda turn: turn.p50_ttft_s),
    Figure("p50_tpot_s", lambda turn: turn.p50_tpot_s),
    Figure("mean_ttft_s", lambda turn: turn.mean_ttft_s),
    Figure("server_ttft_mean_s", lambda turn: turn.server.ttft_s),
    Figure("of mean_ttft_s outside the server", lambda turn: turn.outside_s, apart=difference),
    Figure("of mean_ttft_s before the engine", lambda turn: turn.server.before_engine_s, apart=difference),
    Figure("of mean_ttft_s queued", lambda turn: turn.server.queue_s, apart=difference),
    Figure("of mean_ttft_s in prefill", lambda turn: turn.server.prefill_s, apart=difference),
    Figure("prefix-cache hits", lambda turn: turn.server.prefix_hits, "% of the tokens", 100, difference),
    Figure("turnaround, median", lambda turn: turn.pace.turnaround_s if turn.pace else None, apart=difference),
    Figure("turnaround, mean", lambda turn: turn.pace.mean_turnaround_s if turn.pace else None, apart=difference),
    Figure(
        "spread of the first round's sends", lambda turn: turn.pace.start_s if turn.pace else None, apart=difference
    ),
    Figure(
        "spread of a later round's sends, median",
        lambda turn: turn.pace.spread_s if turn.pace else None,
        apart=difference,
    ),
    Figure("idle, median", lambda turn: turn.pace.idle_s if turn.pace else None),
    Figure("idle, mean", lambda turn: turn.pace.mean_idle_s if turn.pace else None),
)


def report(ours: list[Turn], theirs: list[Turn]) -> list[str]:
    """Return a line for each figure."""
    return [figure.line(ours, theirs) for figure in FIGURES]
