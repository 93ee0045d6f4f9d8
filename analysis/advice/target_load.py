"""The target under load: the measured level that tells whether so many requests of such a context hold the objectives.

Beside what arithmetic says of memory, in the answer, the notes on KV and the questions. Pure. No latency is computed: a
level stands for the target only where it had as many in flight, each as long or almost filling a max_model_len so long.
"""

from __future__ import annotations

from dataclasses import dataclass

from analysis.advice.operating_point import Basis, Candidate, Choice
from analysis.advice.operating_sentences import gives, objective_figure
from analysis.advice.operating_tables import verdict
from analysis.advice.pool_need import PoolNeed, configured_need
from analysis.advice.subject import Subject
from analysis.load.checks import Standing
from analysis.load.knee_sentences import repeats_tell
from analysis.load.ladder import sized_pool
from analysis.load.load_tables import cell, interval_words, label_figure, lengths, unmeasured_notes
from analysis.load.rates import level_words
from analysis.load.strangers import marked
from analysis.memory.kv_pages import pages_of
from analysis.memory.kv_room import kv_room
from analysis.rows.groups import SERVER
from analysis.rows.tables import RunPoint
from analysis.writing.document import Part, Phrase, join, phrase
from analysis.writing.figures import Figure, count, plain, quote

SUREST = (Standing.MEETS, Standing.UNDECIDED, Standing.MISSES, Standing.NOT_MEASURED)
"""Of servers the one that holds the target most surely is the one to run."""
POOL = ("gpu_memory_utilization", "kv_cache_memory_bytes")
"""Columns that servers as they are configured differ by in their pools."""


@dataclass(frozen=True, slots=True)
class TargetLevel:
    """A level that had as many requests in flight as are asked for, on average none shorter."""

    choice: Choice
    """The load that it is a level of."""
    candidate: Candidate
    concurrency: int
    tokens: int
    """Prompt and answer of each, as asked for."""
    sized_for: int | None
    """Of its requests, those that its pool holds at once; None where the sweep had not sized that pool."""
    need: PoolNeed | None
    """The target against the pool that servers get by their configuration; None where that is not known."""

    @property
    def longer(self) -> bool:
        """Whether its requests had more tokens than are asked for."""
        return self.candidate.curve.request_tokens > self.tokens

    @property
    def small_pool(self) -> bool:
        """Whether its pool, sized by the sweep, let fewer run at once than the target's would."""
        return self.sized_for is not None and self.sized_for < self._target_runs

    @property
    def large_pool(self) -> bool:
        """Whether its pool, sized by the sweep, let more run at once than the target's would."""
        return self.sized_for is not None and min(self.sized_for, self.concurrency) > self._target_runs

    @property
    def _target_runs(self) -> int:
        return self.concurrency if self.need is None else min(self.need.holds, self.concurrency)

    @property
    def told(self) -> bool:
        """Whether its standing is the target's, too: what is harder tells where it holds, what is easier where it does
        not."""
        harder, easier = self.longer or self.small_pool, self.large_pool
        standing = self.candidate.standing
        return not ((easier and standing is not Standing.MISSES) or (harder and standing is not Standing.MEETS))


def target_level(subject: Subject, concurrency: int, tokens: int) -> TargetLevel | None:
    """Return the level that stands for a target: of every server what tells most surely, of servers the one that holds
    it most surely. None without any."""
    need = configured_need(subject, tokens, concurrency)
    found = [
        TargetLevel(choice, candidate, concurrency, tokens, _sized_for(subject, candidate), need)
        for choice in subject.choices
        if not choice.open_loop
        for candidate in choice.candidates
        if candidate.reading.at == concurrency and _as_long(candidate, tokens)
    ]
    best = [one for one in found if not any(_one_server(one, other) and _tells(other) < _tells(one) for other in found)]
    return min(best, key=_holds, default=None)


def _sized_for(subject: Subject, candidate: Candidate) -> int | None:
    """With sliding windows a pool holds more at once than the sequences that it is sized for."""
    curve = candidate.curve
    sample = curve.series.sample
    if sample.sequences is None:
        return None
    room = kv_room(candidate.reading, curve.request_tokens, candidate.reading.at, pages_of(sample, subject.configs))
    return sample.sequences if room is None else max(room.holds, sample.sequences)


def _as_long(candidate: Candidate, tokens: int) -> bool:
    """Near-full requests leave a few tokens of max_model_len, but those whose answers are drawn many more."""
    curve, sample = candidate.curve, candidate.curve.series.sample
    fills = sample.purpose == "near_full_context" and sample.output_lengths is None and sample.max_model_len >= tokens
    return curve.request_tokens >= tokens or fills


def _one_server(one: TargetLevel, other: TargetLevel) -> bool:
    """Whether two levels are of one server: a pool that a sweep sized is that of no other one to run."""
    a, b = one.candidate.curve.series.sample, other.candidate.curve.series.sample
    columns = SERVER if one.sized_for is not None or other.sized_for is not None else (*SERVER, *POOL)
    return all(getattr(a, column) == getattr(b, column) for column in columns)


def _tells(level: TargetLevel) -> tuple[bool, bool, bool, int, int]:
    """Order of levels of one server: what decides first, the nearest length of it, what contradicts before what holds.

    A level that is missed under another purpose is undecided by two that decide, not by too few repeats.
    """
    candidate = level.candidate
    contradicted, standing = candidate.contradicted, candidate.standing
    decides = contradicted or standing in (Standing.MEETS, Standing.MISSES)
    rank = 0 if contradicted else 1 if standing is Standing.MISSES else 2
    length = max(candidate.curve.request_tokens, level.tokens)
    return not candidate.measured, not level.told, not decides, length, rank


def _holds(level: TargetLevel) -> tuple[bool, bool, int, int, float]:
    """Order of levels of several servers."""
    candidate = level.candidate
    length = max(candidate.curve.request_tokens, level.tokens)
    tok_s = candidate.reading.median("tok_s") or 0.0
    return not candidate.measured, not level.told, SUREST.index(candidate.standing), length, -tok_s


def target_under_load(subject: Subject) -> list[Phrase]:
    """Return `N requests at once of N tokens under load: …` of the run's target, without a full stop; nothing where it
    names no requests at once or no context."""
    n, context = subject.targets.concurrency, _target_context(subject)
    if n is None or context is None:
        return []
    found = under_load(subject, n, context)
    words = "{n} requests at once of {tokens} tokens under load: {found}"
    return [phrase(words, n=count("target.concurrency", n), tokens=context, found=found)]


def target_sentences(subject: Subject) -> list[Phrase]:
    """Return the same as a sentence, and what of its load holds where the target does not."""
    n, context = subject.targets.concurrency, _target_context(subject)
    said = [phrase("The target, {found}.", found=found) for found in target_under_load(subject)]
    return [*said, *(holds_instead(subject, n, context) if n is not None and context is not None else [])]


def target_rows(subject: Subject) -> list[RunPoint]:
    """Return the measured rows of the load that `target_sentences` tells of; nothing where no level stands for the
    target."""
    n, tokens = subject.targets.concurrency, subject.targets.context_tokens
    level = target_level(subject, n, tokens) if n is not None and tokens is not None else None
    return [row for candidate in level.choice.candidates for row in candidate.reading.measured] if level else []


def _target_context(subject: Subject) -> Figure | None:
    tokens = subject.targets.context_tokens
    return None if tokens is None else plain("target.context_tokens", tokens)


def under_load(subject: Subject, concurrency: int, context: Figure) -> Phrase:
    """Return how so many requests of a context stand under load, by the rule of operating_point.md.

    `context`: the tokens of each, as a flag would carry them. Unmet, which sweep would tell. Without a full stop.
    """
    level = target_level(subject, concurrency, _tokens(context))
    if level is None:
        return phrase("not measured; {tells}", tells=_sweep_tells(subject, concurrency, context, None))
    candidate = level.candidate
    if not candidate.measured:
        notes = join(unmeasured_notes(candidate.reading), ", ")
        return phrase("tried and not measured: {notes}; `resume=RUN` tries it again", notes=notes)
    found = _found(level)
    others = [phrase(" ({mark})", mark=mark) for mark in marked([candidate.reading])]
    if level.told:
        open_ = candidate.standing is Standing.UNDECIDED
        tells = "; " + repeats_tell(candidate.curve, "slo") if open_ and level.choice.slo.percentiles() else ""
        return join([found, phrase(tells), *others], "")
    sweep = _sweep_tells(subject, concurrency, context, level)
    if candidate.standing is Standing.MISSES or not level.large_pool or level.need is None:
        words = "not known from this run, for what was measured is harder: {found}; {tells}"
        return join([phrase(words, found=found, tells=sweep), *others], "")
    words = "not known from this run, for what was measured is easier: {found}; " + level.need.which
    holds = count(f"{subject.name}.pool_holds_of_{level.tokens}", level.need.holds)
    easier = phrase(
        words + " holds {holds} of {tokens} tokens at once; {tells}",
        found=found,
        holds=holds,
        tokens=context,
        tells=sweep,
    )
    return join([easier, *others], "")


def holds_instead(subject: Subject, concurrency: int, context: Figure) -> list[Phrase]:
    """Return what holds of the load whose level stands for a target; needs that level to be told, and not to hold, and
    an operating point by the objectives."""
    level = target_level(subject, concurrency, _tokens(context))
    if level is None or not level.told or level.candidate.standing is Standing.MEETS:
        return []
    choice = level.choice
    if choice.basis is not Basis.OBJECTIVES or choice.point is None:
        return []
    reading = choice.point.reading
    return [phrase("Of that load {at} holds: {gives}.", at=level_words(reading), gives=gives(reading))]


def _tokens(context: Figure) -> int:
    assert isinstance(context.value, int)
    return context.value


def _found(level: TargetLevel) -> Phrase:
    """Standing, p95 with its interval, and what was sent."""
    candidate, curve = level.candidate, level.candidate.curve
    checks = [check for check in candidate.checks if not check.nothing_to_miss]
    several = len(level.choice.servers) > 1
    words = "{values}, measured with {lengths}" + (" on {label}" if several else "")
    parts: dict[str, Part] = {"lengths": lengths(curve)}
    if several:
        parts["label"] = label_figure(curve)
    if level.longer:
        words += ", which are longer"
    words += "{pool}"
    parts["pool"] = sized_pool(curve)
    if curve.series.sample.shared_prefix:
        words += ", {shared}"
        parts["shared"] = quote(f"{curve.name}.shared_prefix", curve.series.sample.shared_prefix)
    if not level.choice.slo.percentiles():
        words += "; no objective is given to hold that against (`slo.p95_e2e_s`)"
        return phrase(words, values=_value(candidate, "p95_e2e_s"), **parts)
    values = [
        phrase(
            "{value} where at most {limit} s is asked",
            value=_value(candidate, check.column),
            limit=objective_figure(check.column, check.limit_s),
        )
        for check in checks
    ]
    standing = [phrase(verdict(candidate)), *([join(values, ", ")] if values else [])]
    return phrase(words, values=join(standing, ", with "), **parts)


def _value(candidate: Candidate, column: str) -> Phrase:
    curve, reading = candidate.curve, candidate.reading
    value = cell(reading, column, 4)
    if curve.interval(reading, column) is None:
        return phrase(column + " {value} s (no interval: one repeat)", value=value)
    return phrase(column + " {value} s ({interval})", value=value, interval=interval_words(curve, reading, column))


def _sweep_tells(subject: Subject, concurrency: int, context: Figure, level: TargetLevel | None) -> Phrase:
    """Which sweep measures it, as far as the model takes the length and the pool holds one such request.

    A pool is sized on the CPU backend, whose near-full pool is else a small one, or in place of one that was sized for
    too few; never larger than the one that servers get by their configuration.
    """
    limit, tokens = _model_limit(subject), _tokens(context)
    if limit is not None and tokens > limit:
        return phrase(
            "the model takes {limit} tokens at most", limit=count(f"{subject.name}.model_limit_tokens", limit)
        )
    need = configured_need(subject, tokens, concurrency)
    if need is not None and need.holds < 1:
        return phrase(need.which + " does not hold one of that length")
    fits = need is None or need.holds >= concurrency
    words = "`+sweep=capacity server.max_model_len={context} 'sweep.near_full_context.concurrency=[{n}]'"
    parts: dict[str, Part] = {"context": context, "n": plain("target.concurrency", concurrency)}
    if subject.group.points[0].device == "cpu" or (level is not None and level.small_pool and fits):
        words += " sweep.near_full_context.sequences={sequences}"
        parts["sequences"] = parts["n"] if need is None or fits else _pool_sequences(subject, need, tokens)
    drawn = next((c for choice in subject.choices for c in choice.curves if c.series.sample.output_lengths), None)
    if drawn is not None:  # near-full prompts leave room for the longest of the answers
        words += " load.output_tokens={output}"
        parts["output"] = plain(f"{drawn.name}.output_tokens", drawn.series.sample.output_tokens or 1)
    words += "` measures it, beyond noise with `sweep.near_full_context.repeats` of three or more"
    return phrase(words, **parts)


def _pool_sequences(subject: Subject, need: PoolNeed, tokens: int) -> Figure:
    return plain(f"{subject.name}.pool_sequences_of_{tokens}", max(need.sequences, 1))


def _model_limit(subject: Subject) -> int | None:
    if subject.envelope is not None:
        pages = subject.envelope.pages
    else:
        pages = pages_of(subject.main.sample, subject.configs) if subject.main is not None else None
    return pages.limit if pages is not None else None
