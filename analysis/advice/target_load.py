"""The target under load: the measured level that tells whether so many requests of such a context hold the objectives.

Beside what arithmetic says of memory, in the answer, the notes on KV and the questions. Pure. No latency is computed: a
level stands for the target only where it had as many in flight, each as long or almost filling a max_model_len so long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from analysis.advice.operating_point import Basis, Candidate, Choice
from analysis.advice.operating_sentences import gives, objective_figure
from analysis.advice.operating_tables import verdict
from analysis.advice.subject import Subject
from analysis.load.checks import Standing
from analysis.load.knee_sentences import repeats_tell
from analysis.load.ladder import sized_pool
from analysis.load.load_tables import cell, interval_words, label_figure, lengths, unmeasured_notes
from analysis.load.rates import level_words
from analysis.load.strangers import marked
from analysis.memory.kv_pages import pages_of
from analysis.writing.document import Part, Phrase, join, phrase
from analysis.writing.figures import Figure, count, plain, quote

NEAREST = (Standing.MEETS, Standing.UNDECIDED, Standing.MISSES, Standing.NOT_MEASURED)
"""Of servers with the same load the one that holds the target most surely is the one to run."""


@dataclass(frozen=True, slots=True)
class TargetLevel:
    """A level that had as many requests in flight as are asked for, on average none shorter."""

    choice: Choice
    """The load that it is a level of."""
    candidate: Candidate
    concurrency: int
    tokens: int
    """Prompt and answer of each, as asked for."""

    @property
    def longer(self) -> bool:
        """Whether its requests had more tokens than are asked for."""
        return self.candidate.curve.request_tokens > self.tokens

    @property
    def small_pool(self) -> bool:
        """Whether the sweep had sized its server's KV pool for fewer full-length sequences."""
        sequences = self.candidate.curve.series.sample.sequences
        return sequences is not None and sequences < self.concurrency

    @property
    def told(self) -> bool:
        """Whether its standing is the target's, too: what is harder and holds tells, what is harder and does not
        leaves the target open."""
        return self.candidate.standing is Standing.MEETS or not (self.longer or self.small_pool)


def target_level(choices: Sequence[Choice], concurrency: int, tokens: int) -> TargetLevel | None:
    """Return the level of these loads that stands for a target, the one nearest to its length; None without any."""
    found = [
        TargetLevel(choice, candidate, concurrency, tokens)
        for choice in choices
        if not choice.open_loop
        for candidate in choice.candidates
        if candidate.reading.at == concurrency and _as_long(candidate, tokens)
    ]
    return min(found, key=_order, default=None)


def _as_long(candidate: Candidate, tokens: int) -> bool:
    """Near-full requests leave a few tokens of max_model_len, but those whose answers are drawn many more."""
    curve, sample = candidate.curve, candidate.curve.series.sample
    fills = sample.purpose == "near_full_context" and sample.output_lengths is None and sample.max_model_len >= tokens
    return curve.request_tokens >= tokens or fills


def _order(level: TargetLevel) -> tuple[bool, int, int, float]:
    candidate = level.candidate
    length = max(candidate.curve.request_tokens, level.tokens)
    tok_s = candidate.reading.median("tok_s") or 0.0
    return not candidate.measured, length, NEAREST.index(candidate.standing), -tok_s


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


def _target_context(subject: Subject) -> Figure | None:
    tokens = subject.targets.context_tokens
    return None if tokens is None else plain("target.context_tokens", tokens)


def under_load(subject: Subject, concurrency: int, context: Figure) -> Phrase:
    """Return how so many requests of a context stand under load, by the rule of operating_point.md.

    `context`: the tokens of each, as a flag would carry them. Unmet, which sweep would tell. Without a full stop.
    """
    level = target_level(subject.choices, concurrency, _tokens(context))
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
    words = "not known from this run, for what was measured is harder: {found}; {tells}"
    sweep = _sweep_tells(subject, concurrency, context, level)
    return join([phrase(words, found=found, tells=sweep), *others], "")


def holds_instead(subject: Subject, concurrency: int, context: Figure) -> list[Phrase]:
    """Return what holds of the load whose level stands for a target; needs that level to be told, and not to hold, and
    an operating point by the objectives."""
    level = target_level(subject.choices, concurrency, _tokens(context))
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


def _sweep_tells(subject: Subject, concurrency: int, context: Figure, harder: TargetLevel | None) -> Phrase:
    """Which sweep measures it, as far as the model takes the length; the CPU backend's near-full pool is a small one
    unless it is sized."""
    limit = _model_limit(subject)
    if limit is not None and _tokens(context) > limit:
        return phrase(
            "the model takes {limit} tokens at most", limit=count(f"{subject.name}.model_limit_tokens", limit)
        )
    cpu = subject.group.points[0].device == "cpu"
    sized = cpu or (harder is not None and harder.small_pool)
    words = "`+sweep=capacity server.max_model_len={context} 'sweep.near_full_context.concurrency=[{n}]'"
    words += " sweep.near_full_context.sequences={n}" if sized else ""
    parts: dict[str, Part] = {"context": context, "n": plain("target.concurrency", concurrency)}
    drawn = next((c for choice in subject.choices for c in choice.curves if c.series.sample.output_lengths), None)
    if drawn is not None:  # near-full prompts leave room for the longest of the answers
        words += " load.output_tokens={output}"
        parts["output"] = plain(f"{drawn.name}.output_tokens", drawn.series.sample.output_tokens or 1)
    words += "` measures it, beyond noise with `sweep.near_full_context.repeats` of three or more"
    return phrase(words, **parts)


def _model_limit(subject: Subject) -> int | None:
    if subject.envelope is not None:
        pages = subject.envelope.pages
    else:
        pages = pages_of(subject.main.sample, subject.configs) if subject.main is not None else None
    return pages.limit if pages is not None else None
