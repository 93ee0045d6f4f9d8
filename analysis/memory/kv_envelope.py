"""The headroom envelope: how many requests of which length a pool holds, and what measured levels of load did. Pure.

Two things that a page must keep apart: need against pool is arithmetic (`Envelope.fit`); the pool's size and what the
server's metrics showed at a level (`Level.outcome`) are measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from analysis.load.signs import kv_signs
from analysis.load.verdicts import Signs
from analysis.memory.kv_fit import KvResult
from analysis.memory.kv_pages import Configs, Pages, pages_of
from analysis.memory.kv_room import kv_room
from analysis.numbers.statistics import interpolate
from analysis.rows.groups import BASE, LOAD, SERVER, grouped, unique_slug
from analysis.rows.series import Reading, Series, make_series
from analysis.rows.tables import RunPoint
from analysis.writing.figures import GIB
from contract.rows import MEASURED

HEADROOM = 0.9
"""A need is said to fit up to this share of the pool; the rest is for what moves (fragmentation, longer answers)."""
POOL = (*BASE, *SERVER, "gpu_memory_utilization", "kv_cache_memory_bytes")
"""Columns that a pool is told apart by: servers that agree in them have pools of one size."""


class Fit(StrEnum):
    """Whether so many requests of a length are held at once, by arithmetic."""

    FITS = "fits"
    TIGHT = "tight"
    PREEMPTS = "waits or preempts"
    NEVER = "does not fit"
    """Not even one."""


def fit_of(share: float, one_fits: bool) -> Fit:
    """Return the verdict on requests that need this share of a pool, which holds at least one of them or not."""
    if share <= HEADROOM:
        return Fit.FITS
    if share <= 1:
        return Fit.TIGHT
    return Fit.PREEMPTS if one_fits else Fit.NEVER


class Outcome(StrEnum):
    """What the server's metrics showed of the KV pool at a level of load."""

    QUIET = "no preemption"
    WAITED = "waited for KV"
    PREEMPTED = "preempted"
    UNKNOWN = "metrics missing"


@dataclass(frozen=True, slots=True)
class Level:
    """A measured level of load: so many requests at once of so many tokens, prompt and answer together."""

    reading: Reading
    tokens: int
    """The mean of its workload's successes, else what was asked for; rounded."""
    at_once: int
    """Its concurrency, or `max_num_seqs` where that is lower."""
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Envelope:
    """A pool, what a sequence of any length takes of it, and the levels that were measured on it."""

    name: str
    """Prefix of the names of its figures."""
    slug: str
    """Its part of a plot's file name; empty for the pool that stands for the card."""
    sample: RunPoint
    size_bytes: int
    null_block_bytes: float
    """Of them, what no request gets; 0 where the engine did not say how many blocks there are."""
    pages: Pages | None
    known: tuple[tuple[int, float], ...]
    """Length and bytes of a sequence from the rows, for a model whose page function is not known."""
    marginal: float
    """Bytes of a token past them."""
    levels: tuple[Level, ...]

    @property
    def whole_card(self) -> bool:
        """Whether it is a pool that vLLM took at a utilization, not one of a stated size."""
        return self.sample.mode == "utilization"

    @property
    def room_bytes(self) -> float:
        """What requests get of the pool."""
        return self.size_bytes - self.null_block_bytes

    def need_bytes(self, tokens: int, at_once: int) -> float:
        """Return the KV bytes of so many requests at once, all at their full length.

        Exact where the page function is known or the length is a row's; else on straight lines between the rows'.
        """
        if self.pages is not None:
            return self.pages.at_once_bytes(at_once, tokens)
        return at_once * interpolate(self.known, tokens, self.marginal)

    def share(self, tokens: int, at_once: int) -> float:
        """Return the share of the pool's room that the requests need."""
        return self.need_bytes(tokens, at_once) / self.room_bytes

    def most(self, tokens: int, share: float = 1.0) -> float:
        """Return how many requests need that share of the pool, not rounded."""
        if self.pages is not None:
            return self.pages.requests(share * self.room_bytes, tokens)
        return share * self.room_bytes / self.need_bytes(tokens, 1)

    def fit(self, tokens: int, at_once: int) -> Fit:
        """Return the verdict of the arithmetic."""
        return fit_of(self.share(tokens, at_once), self.share(tokens, 1) <= 1)

    def longest(self, sequences: int) -> int | None:
        """Return the longest length, in tokens, of which so many sequences fit as the engine counts them.

        Its KV concurrency counts tokens in flight for every sequence. None without a page function, 0 for none at all.
        """
        if self.pages is None:
            return None
        low, high = 0, self.pages.limit or 2**24
        while low < high:
            middle = (low + high + 1) // 2
            fits = sequences * self.pages.sequence_bytes(middle) <= HEADROOM * self.size_bytes
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


def envelopes(result: KvResult, points: Sequence[RunPoint], configs: Configs) -> list[Envelope]:
    """Return the envelope of the pool that stands for the card, then of every other pool that load was measured on.

    The first (its slug is empty) is the smallest pool, over the lengths, of the highest utilization, else the largest
    committed pool. Empty where no engine gave its pool's size, or the formula is not known.
    """
    base = _base(result.group.points[0])
    rows = [p for p in points if p.status == MEASURED and (p.purpose == "kv_scaling" or p.concurrency)]
    main, taken = _main(result), set[str]()
    made: list[Envelope] = []
    for group in grouped([point for point in rows if _base(point) == base], POOL):
        loads = [point for point in group.points if point.concurrency]
        stands_for_card = any(point is main for point in group.points)
        sample = main if stands_for_card else min(filter(_pool, loads), key=_pool, default=None)
        known = result.per_sequence() | _lengths(group.points)
        if sample is None or not known:
            continue
        size = _pool(sample)
        pages = pages_of(sample, configs)
        made.append(
            Envelope(
                name=f"{result.name}.envelope" + ("" if stands_for_card else f".{unique_slug([f'pool{size}'], taken)}"),
                slug="" if stands_for_card else unique_slug([f"pool-{size / GIB:.3g}-gib"], taken),
                sample=sample,
                size_bytes=size,
                null_block_bytes=size / blocks if (blocks := sample.engine_num_blocks or 0) > 1 else 0.0,
                pages=pages,
                known=tuple(sorted(known.items())),
                marginal=result.formula_marginal or sample.formula_bytes_per_token or 0.0,
                levels=tuple(_levels(loads, pages)),
            )
        )
    return sorted(made, key=lambda envelope: (bool(envelope.slug), envelope.size_bytes))


def card_envelope(result: KvResult, points: Sequence[RunPoint], configs: Configs) -> Envelope | None:
    """Return the envelope of the pool that stands for the card."""
    return next((envelope for envelope in envelopes(result, points, configs) if not envelope.slug), None)


def _base(point: RunPoint) -> tuple[object, ...]:
    return tuple(getattr(point, column) for column in BASE)


def _main(result: KvResult) -> RunPoint | None:
    """Return a point on the pool that stands for the card."""
    taken = [p for r in (result.pool.measured if result.pool else ()) for p in r.measured if _pool(p)]
    if taken:
        return min(taken, key=_pool)
    committed = [p for c in result.committed for r in c.series.measured for p in r.measured if _pool(p)]
    return max(committed, key=_pool, default=None)


def _pool(point: RunPoint) -> int:
    """Bytes over all ranks; 0 where the engine did not say."""
    return (point.engine_kv_bytes or 0) * max(point.gpus, 1)


def _lengths(points: Iterable[RunPoint]) -> dict[int, float]:
    return {p.max_model_len: p.formula_bytes_per_sequence for p in points if p.formula_bytes_per_sequence is not None}


def _levels(points: Sequence[RunPoint], pages: Pages | None) -> list[Level]:
    """Closed-loop levels, but for those whose prompts share a prefix: their requests share blocks."""
    rows = [point for point in points if point.shared_prefix is None]
    every = make_series(rows, LOAD, "concurrency", "level")
    return [level for series in every for level in _of(series, pages)]


def _of(series: Series, pages: Pages | None) -> list[Level]:
    sizes = [tokens for reading in series.measured for point in reading.measured if (tokens := _tokens(point))]
    if not sizes:
        return []
    tokens = round(sum(sizes) / len(sizes))
    most = series.sample.max_num_seqs
    made = []
    for reading in series.measured:
        room = kv_room(reading, tokens, reading.at, pages)
        seen = kv_signs(reading, tokens, most, None if room is None else room.request_share)
        made.append(Level(reading, tokens, seen.at_once, outcome_of(seen)))
    return made


def _tokens(point: RunPoint) -> float:
    prompt = point.mean_prompt_tokens or point.prompt_tokens or 0
    return prompt + (point.mean_completion_tokens or point.output_tokens or 0)


def outcome_of(seen: Signs) -> Outcome:
    """Return what the signs of a level say of the KV pool: preempted or waited where `verdicts.limit` is KV-bound."""
    waited = seen.waited_for_kv
    if seen.preemptions:
        return Outcome.PREEMPTED
    if waited:
        return Outcome.WAITED
    return Outcome.UNKNOWN if None in (seen.preemptions, seen.running, waited) else Outcome.QUIET
