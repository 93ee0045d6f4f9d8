"""Answers to the tutorial's questions about memory and context: its first, second and sixth. Pure.

An answer stands only where its data were measured; else it says what is not known, and which sweep would tell.
"""

from __future__ import annotations

from analysis.advice.kv_headroom import TWO_COUNTS, capacities, longest_safe, room_words
from analysis.advice.pool_need import pool_need
from analysis.advice.rules import per_token
from analysis.advice.subject import UNKNOWN, Subject
from analysis.advice.target_load import holds_instead, target_sentences, under_load
from analysis.memory.kv_envelope import HEADROOM, fit_of
from analysis.writing.document import Part, Phrase, join, phrase
from analysis.writing.figures import count, gib, percent, plain


def capacity_decision(subject: Subject) -> Phrase:
    """Needs capacities of the engine, or the formula's cost of a token."""
    kv = subject.kv
    parts: list[Phrase] = []
    readings = [r for r in kv.pool.measured if r.median("engine_max_concurrency") is not None] if kv and kv.pool else []
    pages = subject.envelope.pages if subject.envelope is not None else None
    if readings:
        parts.append(
            phrase(
                "The pool is shared, so the length decides how many full-length requests there is room for, by the "
                "engine's count: {list}.",
                list=capacities(readings),
            )
        )
        if pages is not None and pages.has_windows:
            parts.append(phrase(TWO_COUNTS))
    cost = per_token(kv, pages) if kv is not None else None
    if cost is not None:
        parts.append(cost)
    return join(parts, " ") if parts else phrase(UNKNOWN + "`+sweep=kv` measures it.")


def production_length(subject: Subject) -> Phrase:
    """What memory allows, and how the target that fits it stands under load."""
    return join([_longest_by_memory(subject), *target_sentences(subject)], " ")


def _longest_by_memory(subject: Subject) -> Phrase:
    """Needs a pool taken by utilization, the engine's concurrency, and a target."""
    kv, n = subject.kv, subject.targets.concurrency
    if kv is None or kv.pool is None or all(r.median("engine_max_concurrency") is None for r in kv.pool.measured):
        return phrase(UNKNOWN + "`+sweep=kv` with mode utilization measures what the card holds.")
    if n is None:
        return phrase(UNKNOWN + "it names no `target.concurrency` to hold the pool against.")
    parts: dict[str, Part] = {
        "n": count("target.concurrency", n),
        "rule": percent("rule.headroom_pct", HEADROOM, 0),
    }
    safe = longest_safe(kv, n)
    if safe is None:
        return phrase("None of the measured lengths keeps {n} full-length requests within {rule} of the pool.", **parts)
    words = (
        "The longest that keeps target.concurrency {n} full-length requests within {rule} of the pool: {length} "
        "({room})"
    )
    pages = subject.envelope.pages if subject.envelope is not None else None
    longer = ""
    if pages is not None and pages.limit == safe.at:
        longer = " It is the longest that the model takes."
    elif safe is kv.pool.measured[-1]:
        tried = "was not tried" if safe is kv.pool.readings[-1] else "was tried and not measured"
        longer = " It is the longest measured; a longer one " + tried + "."
    return phrase(
        words + "." + longer,
        length=plain(f"{safe.name}.max_model_len", safe.at),
        room=room_words(safe, pages),
        **parts,
    )


def double_context(subject: Subject) -> Phrase:
    """Needs a target, the formula, and a pool that some server had."""
    n, context = subject.targets.concurrency, subject.targets.context_tokens
    if n is None or context is None:
        return phrase(UNKNOWN + "it names no `target.concurrency` and `target.context_tokens` to double.")
    double = 2 * context
    need = pool_need(subject, double, n)
    if need is None:
        return phrase(UNKNOWN + "`+sweep=kv` measures the pool that the context would have to fit.")
    share = need.need_bytes / need.room_bytes
    limit = need.pages.limit if need.pages is not None else None
    parts: dict[str, Part] = {
        "n": count("target.concurrency", n),
        "double": count(f"{subject.name}.double_context_tokens", double),
        "need": gib(f"{subject.name}.double_need_gib", need.need_bytes),
        "room": gib(f"{subject.name}.double_room_gib", need.room_bytes),
        "share": percent(f"{subject.name}.double_share_pct", share),
        "holds": count(f"{subject.name}.double_holds", need.holds),
    }
    memory = phrase(
        "Memory: target.concurrency {n} requests of {double} tokens need {need} GiB of KV by formula, {share} of "
        + need.which
        + " ({room} GiB without the null block): **"
        + fit_of(share, need.holds >= 1)
        + "**; it holds {holds} of them at once.",
        **parts,
    )
    if limit is None:
        unknown = phrase("Whether the model takes that length is not known from this run.")
        return join([memory, unknown, _latency_at(subject, n, double)], " ")
    longest = count(f"{subject.name}.model_limit_tokens", limit)
    if double > limit:
        return phrase("**No**: the model takes {longest} tokens at most. {memory}", longest=longest, memory=memory)
    takes = phrase("The model takes up to {longest} tokens.", longest=longest)
    return join([memory, takes, _latency_at(subject, n, double)], " ")


def _latency_at(subject: Subject, n: int, tokens: int) -> Phrase:
    context = plain(f"{subject.name}.double_context_tokens", tokens)
    found = phrase("Latency and objectives at that length: {found}.", found=under_load(subject, n, context))
    return join([found, *holds_instead(subject, n, context)], " ")
