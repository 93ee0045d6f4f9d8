"""Memory at a fixed gpu_memory_utilization: whether it is flat over max_model_len, and what makes it differ there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from analysis.memory.kv_account import BESIDE, MOVED_BYTES, Accounts
from analysis.memory.kv_fit import (
    CUDA_SEGMENT_BYTES,
    HOST_SCATTER_BYTES,
    Interval,
    flat_bytes,
    pool_bytes,
)
from analysis.memory.kv_scaling import digits
from analysis.numbers.statistics import linear_fit
from analysis.rows.series import Reading, Series
from analysis.writing.document import Document, Part, Phrase, join, phrase
from analysis.writing.figures import Figure, count, decimal, mib, plain

WORDS = {"mem_ready_bytes": "ready", "mem_loaded_bytes": "loaded"}
CAPACITY = " Read the capacity instead: max_model_len divides the pool into fewer, longer sequences."


@dataclass(frozen=True, slots=True)
class Pools:
    """The KV pools of a series' servers."""

    sizes: tuple[float, ...]
    """Bytes over all cards, by length."""
    exact: bool
    """By the account; else by the engine's log, which gives them to 0.01 GiB."""

    @property
    def range_bytes(self) -> float:
        """The largest less the smallest."""
        return max(self.sizes) - min(self.sizes)


@dataclass(frozen=True, slots=True)
class Course:
    """A memory column over the lengths of a series that hold it."""

    series: Series
    column: str

    @property
    def known(self) -> list[tuple[Reading, float]]:
        """Readings and their memory in bytes, by length."""
        return [(r, value) for r in self.series.measured if (value := r.median(self.column)) is not None]

    @property
    def range_bytes(self) -> float:
        """The highest less the lowest."""
        values = [value for _, value in self.known]
        return max(values) - min(values)

    @property
    def limit_bytes(self) -> float:
        """Up to which range it is flat."""
        return flat_bytes(self.series.sample, max(value for _, value in self.known))

    @property
    def is_flat(self) -> bool:
        """Whether its range is within the limit."""
        return self.range_bytes <= self.limit_bytes

    def by_start(self, accounts: Accounts) -> dict[bool, list[float]]:
        """Return the bytes of servers that compiled (True) and of those that loaded; of others it is not known."""
        kinds: dict[bool, list[float]] = {}
        for reading, value in self.known:
            if (compiled := accounts.compiled(reading)) is not None:
                kinds.setdefault(compiled, []).append(value)
        return kinds

    @property
    def turn(self) -> tuple[Reading, Reading, float] | None:
        """The step against the course's direction that is the largest, with its bytes; None where it has one direction.

        A step counts that is more than what two readings can be told apart by.
        """
        sample = self.series.sample
        grain = HOST_SCATTER_BYTES if sample.device == "cpu" else CUDA_SEGMENT_BYTES * max(sample.gpus, 1)
        steps = [(a, b, high - low) for (a, low), (b, high) in pairwise(self.known) if abs(high - low) > grain]
        rises, falls = [s for s in steps if s[2] > 0], [s for s in steps if s[2] < 0]
        if not rises or not falls:
            return None
        against = falls if sum(s[2] for s in steps) >= 0 else rises
        return max(against, key=lambda step: abs(step[2]))


def pools_of(series: Series, accounts: Accounts) -> Pools | None:
    """Return the pools of all measured lengths; None where one is not known."""
    told = [accounts.at(reading, "ready") for reading in series.measured]
    exact = [account.parts["kv"] for account in told if account is not None]
    by_account = [size for size in exact if size is not None]
    if by_account and len(by_account) == len(series.measured):
        return Pools(tuple(by_account), True)
    by_log = [size for reading in series.measured if (size := pool_bytes(reading)) is not None]
    return Pools(tuple(by_log), False) if by_log and len(by_log) == len(series.measured) else None


def add_flat(doc: Document, series: Series, accounts: Accounts) -> None:
    """Write the verdicts on one series whose memory is one curve."""
    courses = [Course(series, column) for column in WORDS]
    for course in courses:
        _verdict(doc, course, accounts)
    _line(doc, courses[0], pools_of(series, accounts))
    add_compiled(doc, series, accounts)
    if not all(course.is_flat for course in courses if len(course.known) > 1):
        _compiled_unknown(doc, series, accounts)
    for column in BESIDE:
        _range(doc, series, accounts, column)


def add_kv_tokens(doc: Document, series: Series, accounts: Accounts) -> None:
    """Say why KV tokens differ; needs one pool at all lengths, whose tokens do."""
    pools = pools_of(series, accounts)
    tokens = {reading.median("engine_kv_tokens") for reading in series.measured}
    if pools is not None and pools.range_bytes == 0 and len(tokens) > 1:
        doc.say(
            "KV tokens are the engine's concurrency times max_model_len. They differ though the pool does not: what a "
            "sequence takes whatever its length (a block begun, a window's further block, a state) weighs less the "
            "longer it is, and what a window has left behind costs nothing."
        )


def _verdict(doc: Document, course: Course, accounts: Accounts) -> None:
    word, series = WORDS[course.column], course.series
    values = [value for _, value in course.known]
    if len(values) < 2:
        doc.say("Whether memory when *" + word + "* is flat is not known: fewer than two lengths were measured.")
        return
    name, places = f"{series.name}.mem_{word}", digits(series.sample)
    doc.say(
        "Memory when *"
        + word
        + ("* is **flat**" if course.is_flat else "* is **not flat**")
        + ": from {low} to {high} MiB, a range of {span} MiB over {n} lengths (rule: at most {limit} MiB)."
        + (_why(course.is_flat) if word == "ready" else "")
        + "{course}"
        + (CAPACITY if word == "ready" else ""),
        low=mib(f"{name}_lowest_mib", min(values), places),
        high=mib(f"{name}_highest_mib", max(values), places),
        span=mib(f"{name}_range_mib", course.range_bytes, max(places, 1)),
        n=count(f"{name}_lengths", len(values)),
        limit=mib(f"{name}_flat_limit_mib", course.limit_bytes, places),
        course=phrase("") if course.is_flat else _direction(course, accounts),
    )


def _why(flat: bool) -> str:
    return (
        " Today's vLLM takes the share of the card that it is given and cuts the pool from what weights and "
        "activations leave, whatever max_model_len is."
        if flat
        else " vLLM cuts this pool from the memory that it finds, not from max_model_len, so the difference is not a "
        "cost per token."
    )


def _direction(course: Course, accounts: Accounts) -> Phrase:
    """What the order of the readings tells: one start of each length tells no effect of the length."""
    if course.turn is not None:
        shorter, longer, change = course.turn
        return phrase(
            " It does not follow the length: from {shorter} to {longer} tokens it "
            + ("falls" if change < 0 else "rises")
            + " by {change} MiB, so servers differ in it by more than their length.",
            shorter=plain(f"{shorter.name}.max_model_len", shorter.at),
            longer=plain(f"{longer.name}.max_model_len", longer.at),
            change=mib(f"{course.series.name}.mem_{WORDS[course.column]}_turn_mib", abs(change), 1),
        )
    kinds = course.by_start(accounts)
    made_by_kinds = len(kinds) > 1 and all(max(of) - min(of) <= course.limit_bytes for of in kinds.values())
    if made_by_kinds or any(len(reading.measured) > 1 for reading, _ in course.known):
        return phrase("")
    return phrase(
        " Whether the difference is of the length, or from start to start of one server, is not known from this run, "
        "which started each length once; the same sweep again tells."
    )


def _line(doc: Document, course: Course, pools: Pools | None) -> None:
    """The line that the tutorial would read a cost per token from."""
    fit = linear_fit([reading.at for reading, _ in course.known], [value for _, value in course.known])
    if fit is None:
        return
    name = course.series.name
    parts: dict[str, Part] = {"slope": decimal(f"{name}.slope_bytes_per_token", fit.slope, 1)}
    quality = ""
    if fit.points > 2 and fit.r_squared is not None:
        quality = " (R² {r2}, largest residual {residual} MiB)"
        parts["r2"] = Figure(f"{name}.r_squared", fit.r_squared, f"{fit.r_squared:.6f}")
        parts["residual"] = mib(f"{name}.max_residual_mib", fit.max_residual, 1)
    doc.say(
        "The line through memory when ready has a slope of {slope} bytes per token of max_model_len"
        + quality
        + ". That is no cost of a KV token: {pool}.",
        pool=_pool_words(name, pools),
        **parts,
    )


def _pool_words(name: str, pools: Pools | None) -> Phrase:
    if pools is None:
        return phrase("vLLM cuts this pool from the memory that it finds, and how large it was is not known here")
    rounded = "" if pools.exact else ", as far as the log tells, which gives it to a hundredth of a GiB"
    if pools.range_bytes == 0:
        return phrase("the pool is the same at every length" + rounded)
    return phrase(
        "vLLM cuts this pool from the memory that it finds, and the pool itself differs by {range} MiB between these "
        "servers" + rounded,
        range=mib(f"{name}.pools_range_mib", pools.range_bytes, 1),
    )


def add_compiled(doc: Document, series: Series, accounts: Accounts) -> None:
    """Name the servers of a curve that compiled and those that loaded, where it mixes them."""
    kinds = {kind: [r for r in series.measured if accounts.compiled(r) is kind] for kind in (True, False)}
    if not all(kinds.values()):
        return
    doc.say(
        "**Servers that compiled and servers that loaded are mixed here**: by their logs those of {compiled} tokens "
        "compiled their graphs, those of {loaded} tokens loaded them from the cache. The two were seen to differ in "
        "memory and in the pool that it leaves, so a difference between them is not to be read as one of "
        "max_model_len.{within} The same sweep again finds all graphs in the cache.",
        compiled=_lengths(kinds[True]),
        loaded=_lengths(kinds[False]),
        within=join([_within(series, compiled, accounts) for compiled in kinds], ""),
    )


def _lengths(readings: Sequence[Reading]) -> Phrase:
    return join([plain(f"{reading.name}.max_model_len", reading.at) for reading in readings], ", ")


def _within(series: Series, compiled: bool, accounts: Accounts) -> Phrase:
    """How far apart servers of one kind are; nothing of a single one."""
    kind = "compiled" if compiled else "loaded"
    ready, loaded = (Course(series, column).by_start(accounts).get(compiled, []) for column in WORDS)
    if len(ready) < 2 or len(loaded) < 2:
        return phrase("")
    return phrase(
        " Those that " + kind + " lie within {ready} MiB when *ready* and within {loaded} MiB when *loaded*.",
        ready=mib(f"{series.name}.mem_ready_range_of_{kind}_mib", max(ready) - min(ready), 1),
        loaded=mib(f"{series.name}.mem_loaded_range_of_{kind}_mib", max(loaded) - min(loaded), 1),
    )


def _compiled_unknown(doc: Document, series: Series, accounts: Accounts) -> None:
    """Of rows before schema version 10, and of logs that do not tell."""
    eager = series.sample.enforce_eager or series.sample.simulated
    if not eager and any(accounts.compiled(r) is None for r in series.measured):
        doc.say(
            "Which of these servers compiled their graphs and which loaded them from the cache, a difference in memory "
            "of its own, is not known from this run (rows of older runs and some logs do not tell it); the same sweep "
            "again finds all graphs in the cache."
        )


def _range(doc: Document, series: Series, accounts: Accounts, column: str) -> None:
    """Say what a memory column's range over the lengths is made of; needs an account of both its ends."""
    known = [reading for reading in series.measured if reading.median(column) is not None]
    low, high = (of(known, key=lambda reading: reading.median(column) or 0, default=None) for of in (min, max))
    if low is None or high is None:
        return
    span = (high.median(column) or 0) - (low.median(column) or 0)
    name = f"{series.name}.{column.removesuffix('_bytes')}_range"
    causes = accounts.causes(Interval(low, high, None, column), name)
    if span >= MOVED_BYTES and causes is not None:
        doc.say(
            ("Ready" if column == "mem_ready_bytes" else "Loaded")
            + ", the {span} MiB between the servers of {low} and of {high} tokens are, by the account: {causes}.",
            span=mib(f"{name}_mib", span, 1),
            low=plain(f"{low.name}.max_model_len", low.at),
            high=plain(f"{high.name}.max_model_len", high.at),
            causes=causes,
        )
