"""The headroom envelope on the page: its table, and in words how arithmetic and measured levels go together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from analysis.memory.kv_envelope import HEADROOM, Envelope, Level, Outcome
from analysis.rows.targets import Targets
from analysis.writing.document import Document, Part, Phrase, join, phrase
from analysis.writing.figures import GIB, MIB, count, gib, mib, percent, plain, quote, significant

LEVELS = (1, 4, 16, 64, 256)
"""Columns of every table: requests at once."""
NAMES = (Outcome.UNKNOWN, Outcome.QUIET, Outcome.WAITED, Outcome.PREEMPTED)
"""From the mildest on: where several levels meet in a cell it names the gravest."""


@dataclass(frozen=True, slots=True)
class Tally:
    """Measured levels whose metrics tell, by what the arithmetic says of them."""

    inside: tuple[Level, ...]
    """It lets them fit, or just so."""
    beyond: tuple[Level, ...]

    @property
    def surprises(self) -> list[Level]:
        """Levels at which arithmetic and measurement differ."""
        return [*filter(disturbed, self.inside), *(level for level in self.beyond if not disturbed(level))]


def tally(envelope: Envelope) -> Tally:
    """Return the measured levels in two lots."""
    told = [level for level in envelope.levels if level.outcome is not Outcome.UNKNOWN]
    inside = tuple(level for level in told if envelope.share(level.tokens, level.at_once) <= 1)
    return Tally(inside, tuple(level for level in told if level not in inside))


def disturbed(level: Level) -> bool:
    """Return whether the KV pool was seen to be too small at a level."""
    return level.outcome in (Outcome.WAITED, Outcome.PREEMPTED)


def gravest(levels: Iterable[Level]) -> Outcome | None:
    """Return the gravest outcome; None of none."""
    return max((level.outcome for level in levels), key=NAMES.index, default=None)


def add_envelopes(doc: Document, found: Sequence[Envelope], targets: Targets) -> None:
    """Write the section: for every pool a table and what was measured of it."""
    doc.heading(3, "Headroom envelope")
    if not found:
        doc.say("Not known from this run: the engine gave no pool size or the model's KV formula is unknown.")
        return
    doc.say(
        "*Arithmetic*: the KV that so many requests at once (columns) need, each holding so many tokens of "
        "prompt and answer (rows). *fits*: up to {rule} of the pool; *tight*: up to all of it; *waits or preempts*: "
        "more than it, though one fits; *does not fit*: not even one. *Measured*: the size of the pool, and the words "
        "in brackets, which say what the server's metrics showed at a level of load: *preempted*; *waited for KV*, "
        "requests waiting for capacity beside a full pool, so that never all ran at once; or *no preemption*, neither "
        "of the two.",
        rule=percent("rule.headroom_pct", HEADROOM, 0),
    )
    if any(envelope.pages is not None and envelope.pages.has_windows for envelope in found):
        doc.say(
            "Layers of a sliding window hold the window alone while a request decodes; the tokens that may be in "
            "flight are counted once, for all requests together (*held at once*). The engine's count takes them for "
            "every request, and so is lower than this table."
        )
    for envelope in found:
        if len(found) > 1:
            doc.heading(4, "A pool of {size}", size=_size(envelope))
        _pool(doc, envelope)
        _table(doc, envelope, targets)
        _measured(doc, envelope)


def _pool(doc: Document, envelope: Envelope) -> None:
    parts: dict[str, Part] = {"size": _size(envelope)}
    if envelope.whole_card:
        which = "the pool that vLLM took at gpu_memory_utilization {share}"
        utilization = f"{envelope.sample.gpu_memory_utilization or 0:g}"
        parts["share"] = quote(f"{envelope.name}.utilization", utilization)
    else:
        whose = (
            "a pool of a stated size on which load was measured"
            if envelope.slug
            else "the largest pool this run committed"
        )
        which = whose + ", which is not all that the device can hold"
    if envelope.sample.max_num_seqs is not None:
        which += "; at most {most} requests run at once there (max_num_seqs)"
        parts["most"] = plain(f"{envelope.name}.max_num_seqs", envelope.sample.max_num_seqs)
    doc.say(("MiB" if in_mib(envelope) else "GiB") + " against {size}, " + which + ":", **parts)


def in_mib(envelope: Envelope) -> bool:
    """Return whether needs stand in MiB: the models of the CPU backend are small."""
    return envelope.sample.device == "cpu"


def _size(envelope: Envelope) -> Phrase:
    if in_mib(envelope):
        return phrase("{size} MiB", size=mib(f"{envelope.name}.pool_mib", envelope.size_bytes))
    return phrase("{size} GiB", size=gib(f"{envelope.name}.pool_gib", envelope.size_bytes))


def _table(doc: Document, envelope: Envelope, targets: Targets) -> None:
    target_tokens = [targets.context_tokens] if targets.context_tokens else []
    target_level = [targets.concurrency] if targets.concurrency else []
    lengths = sorted({*dict(envelope.known), *target_tokens, *(level.tokens for level in envelope.levels)})
    columns = sorted({*LEVELS, *target_level, *(level.at_once for level in envelope.levels)})
    rows: list[list[str | Part]] = [
        [plain(f"envelope.len{tokens}", tokens), *(_cell(envelope, tokens, at_once) for at_once in columns)]
        for tokens in lengths
    ]
    heads: list[str | Part] = ["tokens", *(plain(f"envelope.c{at_once}", at_once) for at_once in columns)]
    doc.table(heads, rows, envelope.sample.simulated)
    if envelope.pages is None and set(lengths) - set(dict(envelope.known)):
        doc.say(
            "How this model's KV grows with the length is known at the lengths of max_model_len alone: what lies "
            "between or beyond them is on straight lines."
        )


def _cell(envelope: Envelope, tokens: int, at_once: int) -> Part:
    need = envelope.need_bytes(tokens, at_once)
    unit, word = (MIB, "mib") if in_mib(envelope) else (GIB, "gib")
    size = significant(f"{envelope.name}.len{tokens}.c{at_once}_{word}", need / unit, 3)
    outcome = gravest(level for level in envelope.levels if (level.tokens, level.at_once) == (tokens, at_once))
    seen = "" if outcome is None else f" [{outcome}]"
    return phrase("{size} " + envelope.fit(tokens, at_once) + seen, size=size)


def _measured(doc: Document, envelope: Envelope) -> None:
    name = envelope.name
    if not envelope.levels:
        doc.say(
            "No level of load was measured on this pool, so all of this table is arithmetic; `+sweep=capacity` "
            "(prompts that almost fill max_model_len) measures it."
        )
        return
    lots = tally(envelope)
    unknown = len(envelope.levels) - len(lots.inside) - len(lots.beyond)
    words = [
        phrase(
            "Levels of load measured on this pool: {n}.",
            n=count(f"{name}.levels", len(envelope.levels)),
        )
    ]
    if unknown:
        words.append(
            phrase("At {n} of them the server's metrics do not tell.", n=count(f"{name}.levels_unknown", unknown))
        )
    if lots.inside:
        words.append(
            phrase(
                "Of {n} that the arithmetic calls fitting or tight, {seen} saw a preemption or a wait for KV.",
                n=count(f"{name}.levels_inside", len(lots.inside)),
                seen=count(f"{name}.levels_inside_disturbed", sum(map(disturbed, lots.inside))),
            )
        )
    if lots.beyond:
        words.append(
            phrase(
                "Of {n} that need more than the pool, {seen} did." if lots.inside else _BEYOND,
                n=count(f"{name}.levels_beyond", len(lots.beyond)),
                seen=count(f"{name}.levels_beyond_disturbed", sum(map(disturbed, lots.beyond))),
            )
        )
    words.append(_agreement(lots))
    doc.say("{words}", words=join(words, " "))
    doc.bullets(_surprise(envelope, level) for level in lots.surprises)
    _how_levels_stand(doc, envelope)


_BEYOND = "Of {n} that need more than the pool by the arithmetic, {seen} saw a preemption or a wait for KV."


def _agreement(lots: Tally) -> Phrase:
    """Needs levels on both sides of the border for the word that they agree."""
    if lots.surprises:
        return phrase("Arithmetic and measurement differ here:")
    if lots.inside and lots.beyond:
        return phrase("**Arithmetic and measurement agree** at each of them, on both sides of the border.")
    if lots.inside:
        near_full = any(level.reading.measured[0].purpose == "near_full_context" for level in lots.inside)
        return phrase(
            "None needs more than the pool, so the border itself was not tried; "
            + (
                "higher levels (`sweep.near_full_context.concurrency`) or a smaller pool "
                "(`sweep.near_full_context.sequences`) try it."
                if near_full
                else "`+sweep=capacity` (prompts that almost fill max_model_len) tries it."
            )
        )
    if lots.beyond:
        return phrase("None of them fits, so the border itself was not met from below; lower levels tell.")
    return phrase("Whether the border is where the arithmetic puts it is not known from this run.")


def _surprise(envelope: Envelope, level: Level) -> Phrase:
    name = f"{envelope.name}.len{level.tokens}.c{level.at_once}"
    usage = level.reading.highest("kv_usage_max")
    return phrase(
        "{at_once} requests of {tokens} tokens need {share} of the pool, and yet: " + level.outcome + " (the most seen "
        "in use: {usage})." + ("" if disturbed(level) else " The arithmetic takes all at their full length at once."),
        at_once=plain(f"envelope.c{level.at_once}", level.at_once),
        tokens=plain(f"envelope.len{level.tokens}", level.tokens),
        share=percent(f"{name}.share_pct", envelope.share(level.tokens, level.at_once)),
        usage=percent(f"{name}.kv_usage_pct", usage),
    )


def _how_levels_stand(doc: Document, envelope: Envelope) -> None:
    samples = [level.reading.measured[0] for level in envelope.levels]
    if any(sample.prompt_lengths or sample.output_lengths for sample in samples):
        doc.say("Levels whose requests differ in length stand at the mean of their tokens; single requests held more.")
    if any(level.at_once < level.reading.at for level in envelope.levels):
        doc.say("Levels of more requests than max_num_seqs stand at max_num_seqs: so many run at once.")
