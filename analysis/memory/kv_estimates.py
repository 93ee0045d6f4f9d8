"""Bytes per KV token by three estimates side by side, and why they differ where they do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from analysis.memory.kv_account import Accounts
from analysis.memory.kv_fit import Committed, Interval, KvResult
from analysis.numbers.statistics import relative_error
from analysis.rows.series import Reading
from analysis.writing.document import Document, Part, Phrase, phrase
from analysis.writing.figures import count, percent, plain, signed_percent

AGREE_SHARE = 0.01
"""Two estimates are said to agree within this share."""
CLOSE_SHARE = 0.001
"""What is promised for plain attention, with the defaults."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """One way to bytes per KV token."""

    name: str
    short: str
    """What it is called where a sentence has no place."""
    words: Phrase
    bytes_per_token: float


def estimates(result: KvResult) -> list[Estimate]:
    """Return what the run holds of: memory slope (ready, loaded) of every committed series, formula, engine."""
    found = list(_slopes(result))
    if result.formula_slope is not None:
        words = phrase("formula, from the model's config: slope of bytes per sequence over the lengths measured")
        found.append(Estimate(f"{result.name}.formula_bytes_per_token", "formula", words, result.formula_slope))
    reading = engine_reading(result)
    if reading is not None:
        words = phrase(
            "engine: pool bytes / tokens of its blocks at max_model_len {length} (" + reading.measured[0].mode + ")",
            length=plain(f"{reading.name}.max_model_len", reading.at),
        )
        value = reading.median("engine_bytes_per_token")
        assert value is not None
        found.append(Estimate(f"{result.name}.engine_bytes_per_token", "engine", words, value))
    return found


def _slopes(result: KvResult) -> Iterator[Estimate]:
    for committed in result.committed:
        for column, word in (("mem_ready_bytes", "ready"), ("mem_loaded_bytes", "loaded")):
            value = committed.bytes_per_token(column)
            if value is not None:
                words = phrase("memory slope, " + word + " ({n} sequences)", n=_sequences(committed))
                name = f"{committed.series.name}.{word}.slope_bytes_per_token"
                yield Estimate(name, f"memory slope ({word})", words, value)


def _sequences(committed: Committed) -> Part:
    return count(f"{committed.series.name}.sequences", committed.sequences)


def _causes_over_all(result: KvResult, accounts: Accounts) -> Iterator[Phrase]:
    """What the account says moved between the shortest and the longest length, where a slope is apart."""
    for committed in result.committed:
        for column, word in (("mem_ready_bytes", "ready"), ("mem_loaded_bytes", "loaded")):
            intervals = committed.intervals(column)
            if not any(interval.is_step for interval in intervals):
                continue
            whole = Interval(intervals[0].shorter, intervals[-1].longer, committed.sequences, column)
            causes = accounts.causes(whole, f"{committed.series.name}.{word}.moved")
            if causes is not None:
                yield phrase(
                    "From {shorter} to {longer} tokens ("
                    + word
                    + ") the account has, besides the pool of the formula: "
                    "{causes}.",
                    shorter=plain(f"{whole.shorter.name}.max_model_len", whole.shorter.at),
                    longer=plain(f"{whole.longer.name}.max_model_len", whole.longer.at),
                    causes=causes,
                )


def engine_reading(result: KvResult) -> Reading | None:
    """Return the reading the engine's figure is taken from: the longest length, committed before utilization.

    Of a committed pool the bytes are known exactly; of another vLLM's log gives them to 0.01 GiB.
    """
    known = [reading for reading in result.readings if reading.median("engine_bytes_per_token") is not None]
    return max(known, key=lambda r: (r.at, r.measured[0].mode == "committed"), default=None)


def add_estimates(doc: Document, result: KvResult, accounts: Accounts) -> None:
    """Write the table and the sentences under it."""
    doc.heading(3, "Bytes per KV token: three estimates")
    found = estimates(result)
    if not found:
        doc.say("Not known from this run: no reading, no formula and no figure of the engine; `+sweep=kv` measures it.")
        return
    reference = result.formula_slope
    rows: list[list[str | Part]] = []
    for estimate in found:
        error = relative_error(estimate.bytes_per_token, reference) if reference else None
        share = signed_percent(f"{estimate.name}.error_pct", error, 2)
        rows.append([estimate.words, count(estimate.name, estimate.bytes_per_token), share])
    doc.table(["estimate", "bytes per token", "against the formula"], rows, result.group.points[0].simulated)
    if any(estimate.name.endswith("slope_bytes_per_token") for estimate in found):
        doc.say(
            "Pools sized to the length are as large as the formula says, so a memory slope does not test the formula: "
            "it says whether anything else grew with the length. What tests it is the engine's own count of blocks."
        )
    if reference:
        doc.bullets(_reasons(result, found, reference, accounts))
    else:
        doc.say("The formula is not known for this model, so there is nothing to hold the others against.")


def _others(found: list[Estimate]) -> list[Estimate]:
    return [estimate for estimate in found if estimate.short != "formula"]


def _how_close(result: KvResult, found: list[Estimate], reference: float, agree: Part) -> Phrase:
    errors = [relative_error(estimate.bytes_per_token, reference) or 0.0 for estimate in _others(found)]
    furthest = max(errors, key=abs)
    close = abs(furthest) <= CLOSE_SHARE
    return phrase(
        "All {n} others agree with the formula within {share}, "
        + ("and within" if close else "but not within")
        + " {close}; the furthest is {furthest} from it.",
        n=count(f"{result.name}.estimates_beside_formula", len(errors)),
        share=agree,
        close=percent("rule.estimates_close_pct", CLOSE_SHARE, 1),
        furthest=signed_percent(f"{result.name}.estimates_furthest_pct", furthest, 3),
    )


def _reasons(result: KvResult, found: list[Estimate], reference: float, accounts: Accounts) -> Iterator[Phrase]:
    agree = percent("rule.estimates_agree_pct", AGREE_SHARE, 0)
    apart = [e for e in found if abs(relative_error(e.bytes_per_token, reference) or 0.0) > AGREE_SHARE]
    if len(found) < 2:
        yield phrase("There is one estimate alone, so nothing for it to agree with.")
    elif not apart:
        yield _how_close(result, found, reference, agree)
    else:
        yield phrase(
            "{n} of {all} others are further than {share} from the formula.",
            n=count(f"{result.name}.estimates_apart", len(apart)),
            all=count(f"{result.name}.estimates_beside_formula", len(_others(found))),
            share=agree,
        )
    slopes = [estimate for estimate in apart if ".slope_" in estimate.name]
    if slopes:
        cpu = result.group.points[0].device == "cpu"
        yield phrase(
            "A memory slope apart from the formula on the CPU backend says that resident memory does not follow the "
            "pool: the host gives a page only when it is first written, and what else the processes hold moves, too."
            if cpu
            else "A memory slope sees everything that the card holds: KV tensors that land in segments left by the "
            "profiling forward pass make a difference smaller than the pool's, activations that grow with the length "
            "make it larger. The slope is only as good as the line above."
        )
        yield from _causes_over_all(result, accounts)
    if any(estimate.name.endswith("engine_bytes_per_token") for estimate in apart):
        yield phrase(
            "The engine's figure is its pool over the tokens that its blocks hold. Where the pool was not given, a log "
            "that prints hundredths of a GiB is in it; for models whose layers differ it is over the tokens the engine "
            "says it can serve, and changes with max_model_len."
        )
    marginal = result.formula_marginal
    if marginal is not None and abs(relative_error(marginal, reference) or 0.0) > AGREE_SHARE:
        yield phrase(
            "The formula itself is not one rate: at the longest length a further token costs {marginal} bytes, since "
            "windowed or recurrent layers stop growing.",
            marginal=count(f"{result.name}.formula_marginal_bytes_per_token", marginal),
        )
    if len({r.measured[0].sequences for r in result.readings if r.measured[0].mode == "committed"}) > 1:
        yield phrase("The committed series differ in their divisor (sequences); each slope is divided by its own.")
