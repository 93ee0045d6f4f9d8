"""Bytes per KV token by three estimates side by side, and why they differ where they do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from analysis.memory.kv_account import Accounts
from analysis.memory.kv_fit import Committed, Interval, KvResult, pool_bytes
from analysis.memory.kv_pages import Configs, pages_of
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
    error: float | None
    """Its share of departure from the formula; None where the two cannot be held against each other."""


def estimates(result: KvResult) -> list[Estimate]:
    """Return what the run holds of: memory slope (ready, loaded) of every committed series, formula, engine."""
    reference = result.formula_slope
    found = list(_slopes(result, reference))
    if reference is not None:
        words = phrase("formula, from the model's config: slope of bytes per sequence over the lengths measured")
        found.append(Estimate(f"{result.name}.formula_bytes_per_token", "formula", words, reference, 0.0))
    reading = engine_reading(result)
    if reading is not None:
        words = phrase(
            "engine: pool bytes / "
            + ("tokens of its blocks" if _is_rate(reading) else "its KV tokens")
            + " at max_model_len {length} ("
            + reading.measured[0].mode
            + ")",
            length=plain(f"{reading.name}.max_model_len", reading.at),
        )
        value = reading.median("engine_bytes_per_token")
        assert value is not None
        found.append(Estimate(f"{result.name}.engine_bytes_per_token", "engine", words, value, _engine_error(reading)))
    return found


def _is_rate(reading: Reading) -> bool:
    """Whether the engine's figure is over all tokens of its blocks, as where layers are of one kind.

    Else it is over the KV tokens of full-length sequences, a mean, to which what does not grow with the length adds.
    """
    figure, pool = reading.median("engine_bytes_per_token"), pool_bytes(reading)
    blocks, size = reading.median("engine_num_blocks"), reading.median("engine_block_size")
    tokens = reading.median("engine_kv_tokens")
    if not (figure and pool and blocks and size):
        return False
    return tokens is None or abs(pool / figure - blocks * size) <= abs(pool / figure - tokens)


def _engine_error(reading: Reading) -> float | None:
    """Bytes of one full-length sequence, pool / KV concurrency, against the formula's of that length.

    So that a mean is held against a mean: a slope leaves out states and windows, which do not grow.
    """
    pool, held = pool_bytes(reading), reading.median("engine_max_concurrency")
    formula = reading.median("formula_bytes_per_sequence")
    return relative_error(round(pool / held), formula) if pool and held and formula else None


def _slopes(result: KvResult, reference: float | None) -> Iterator[Estimate]:
    for committed in result.committed:
        for column, word in (("mem_ready_bytes", "ready"), ("mem_loaded_bytes", "loaded")):
            value = committed.bytes_per_token(column)
            if value is not None:
                words = phrase("memory slope, " + word + " ({n} sequences)", n=_sequences(committed))
                name = f"{committed.series.name}.{word}.slope_bytes_per_token"
                error = relative_error(value, reference) if reference else None
                yield Estimate(name, f"memory slope ({word})", words, value, error)


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


def add_estimates(doc: Document, result: KvResult, accounts: Accounts, configs: Configs) -> None:
    """Write the table and the sentences under it; `configs` tell why the formula is not one rate."""
    doc.heading(3, "Bytes per KV token: three estimates")
    found = estimates(result)
    if not found:
        doc.say("Not known from this run: no reading, no formula and no figure of the engine; `+sweep=kv` measures it.")
        return
    reference = result.formula_slope
    rows: list[list[str | Part]] = [
        [e.words, count(e.name, e.bytes_per_token), signed_percent(f"{e.name}.error_pct", e.error, 2)] for e in found
    ]
    doc.table(["estimate", "bytes per token", "against the formula"], rows, result.group.points[0].simulated)
    if any(estimate.name.endswith("slope_bytes_per_token") for estimate in found):
        doc.say(
            "Pools sized to the length are as large as the formula says, so a memory slope does not test the formula: "
            "it says whether anything else grew with the length. What tests it is the engine's own count of blocks."
        )
    else:
        doc.say(
            "Memory's slope is not known from this run: it needs pools sized to the length at two lengths, whose "
            "memory may be compared; `+sweep=kv` measures them."
        )
    _engine_words(doc, found, engine_reading(result))
    if reference:
        doc.bullets(_reasons(result, found, reference, accounts, configs))
    else:
        doc.say("The formula is not known for this model, so there is nothing to hold the others against.")


def _engine_words(doc: Document, found: list[Estimate], reading: Reading | None) -> None:
    if reading is None:
        doc.say(
            "The engine's figure is not known from this run: no server gave its pool exactly enough; one whose pool is "
            "sized to the length (`+sweep=kv`) does."
        )
    elif any(estimate.short == "engine" and estimate.error is not None for estimate in found):
        mean = (
            " Over its KV tokens the figure is a mean, to which what does not grow with the length adds: it is no cost "
            "of a further token, and changes with max_model_len."
        )
        doc.say(
            "The engine is held against the formula at its own length: the pool over its KV concurrency, against the "
            "formula's bytes of one full-length sequence." + ("" if _is_rate(reading) else mean)
        )


def _others(found: list[Estimate]) -> list[Estimate]:
    return [estimate for estimate in found if estimate.short != "formula" and estimate.error is not None]


def _how_close(result: KvResult, others: list[Estimate], agree: Part) -> Phrase:
    furthest = max((estimate.error or 0.0 for estimate in others), key=abs)
    close = "and within" if abs(furthest) <= CLOSE_SHARE else "but not within"
    figures: dict[str, Part] = {
        "share": agree,
        "close": percent("rule.estimates_close_pct", CLOSE_SHARE, 1),
        "furthest": signed_percent(f"{result.name}.estimates_furthest_pct", furthest, 3),
    }
    if len(others) == 1:
        only = "The other one (" + others[0].short + ") agrees with the formula within {share}, "
        return phrase(only + close + " {close}; it is {furthest} from it.", **figures)
    return phrase(
        "All {n} others agree with the formula within {share}, " + close + " {close}; the furthest is {furthest} "
        "from it.",
        n=count(f"{result.name}.estimates_beside_formula", len(others)),
        **figures,
    )


def _apart(result: KvResult, others: list[Estimate], apart: list[Estimate], agree: Part) -> Phrase:
    if len(others) == 1:
        return phrase("The other one (" + others[0].short + ") is further than {share} from the formula.", share=agree)
    return phrase(
        "{n} of {all} others " + ("is" if len(apart) == 1 else "are") + " further than {share} from the formula.",
        n=count(f"{result.name}.estimates_apart", len(apart)),
        all=count(f"{result.name}.estimates_beside_formula", len(others)),
        share=agree,
    )


def _reasons(
    result: KvResult, found: list[Estimate], reference: float, accounts: Accounts, configs: Configs
) -> Iterator[Phrase]:
    agree = percent("rule.estimates_agree_pct", AGREE_SHARE, 0)
    others = _others(found)
    apart = [estimate for estimate in others if abs(estimate.error or 0.0) > AGREE_SHARE]
    if not others:
        yield phrase("There is one estimate alone, so nothing for it to agree with.")
    elif not apart:
        yield _how_close(result, others, agree)
    else:
        yield _apart(result, others, apart, agree)
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
    if any(estimate.short == "engine" for estimate in apart):
        yield phrase(
            "The engine reserves another number of bytes for a full-length sequence than the formula: its blocks are "
            "not laid out as the formula takes the model's config to say."
        )
    marginal = result.formula_marginal
    if marginal is not None and abs(relative_error(marginal, reference) or 0.0) > AGREE_SHARE:
        yield phrase(
            "The formula itself is not one rate: at the longest length a further token costs {marginal} bytes{cause}.",
            marginal=count(f"{result.name}.formula_marginal_bytes_per_token", marginal),
            cause=_why_not_one_rate(result, configs),
        )
    if len({r.measured[0].sequences for r in result.readings if r.measured[0].mode == "committed"}) > 1:
        yield phrase("The committed series differ in their divisor (sequences); each slope is divided by its own.")


def _why_not_one_rate(result: KvResult, configs: Configs) -> Phrase:
    """What makes a slope over the lengths another than the cost of a further token: a window's end, or rounding."""
    longest = result.readings[-1]
    pages = pages_of(longest.measured[0], configs)
    if pages is None:
        return phrase("; why is not known from this run, which does not hold the model's config (`manifest.json`)")
    ends = [end for end in pages.kinks if result.readings[0].at < end < longest.at]
    if ends:
        end = plain(f"{result.name}.window_ends_tokens", ends[-1])
        return phrase(", since a sliding window stops growing at {end} tokens", end=end)
    block = pages.layout.block_size
    if any(reading.at % block for reading in result.readings):
        size = count(f"{result.name}.block_tokens", block)
        return phrase(", and the slope is over lengths that are counted in whole blocks of {block} tokens", block=size)
    return phrase("")
