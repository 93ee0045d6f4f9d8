"""Are there steps in the memory curve: found in the data, and named with what made them.

Two kinds. A *step* is a difference of memory that leaves the formula's: the account of memory names its cause. A
*stair* is a difference of the formula itself, which counts whole blocks and ends windows, that leaves its mean rate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from analysis.memory.kv_account import OUTSIDE_TORCH, Accounts
from analysis.memory.kv_fit import CUDA_SEGMENT_BYTES, HOST_SCATTER_BYTES, STEP_SHARE, Committed, Interval, block_bytes
from analysis.memory.kv_pages import Pages
from analysis.memory.kv_scaling import block_figures
from analysis.numbers.statistics import linear_fit
from analysis.rows.series import Reading
from analysis.writing.document import Document, Part, Phrase, join, phrase
from analysis.writing.figures import count, mib, percent, plain, signed_mib, signed_percent

MOST_OF_IT = 0.5
"""A part of the account that moved by this share of a departure, in its direction, is named as its cause."""


@dataclass(frozen=True, slots=True)
class Stair:
    """A difference of the formula that leaves its mean rate over all lengths of the series."""

    shorter: Reading
    longer: Reading
    bytes_per_token: float
    mean_bytes_per_token: float
    ends: int | None
    """The length at which a sliding window stopped growing, where one did between the two."""
    rounded: bool
    """Whether one of the two is no whole number of blocks."""


def stairs(committed: Committed, pages: Pages | None) -> list[Stair]:
    """Return the stairs of a series, by length; none where the formula is not known at three lengths."""
    known = [(r, v) for r in committed.series.measured if (v := r.median("formula_bytes_per_sequence")) is not None]
    fit = linear_fit([r.at for r, _ in known], [v for _, v in known]) if len(known) > 2 else None
    if fit is None:
        return []
    found = []
    for (shorter, low), (longer, high) in pairwise(known):
        tokens = longer.at - shorter.at
        departure = (high - low - fit.slope * tokens) * (committed.sequences or 1)
        expected = fit.slope * tokens * (committed.sequences or 1)
        block = pages.layout.block_size if pages else longer.median("engine_block_size")
        if abs(departure) > max(STEP_SHARE * abs(expected), block_bytes(longer) or 0):
            ends = next((end for end in pages.kinks if shorter.at < end < longer.at), None) if pages else None
            rounded = bool(block) and any(r.at % (block or 1) for r in (shorter, longer))
            found.append(Stair(shorter, longer, (high - low) / tokens, fit.slope, ends, rounded))
    return found


def add_steps(doc: Document, committed: Committed, accounts: Accounts, pages: Pages | None) -> None:
    """Write what the section says of steps; `pages` is the page function of the series' servers."""
    for column, word in (("mem_ready_bytes", "ready"), ("mem_loaded_bytes", "loaded")):
        intervals = [i for i in committed.intervals(column) if i.departure_bytes is not None]
        if not intervals:
            doc.say(
                "Are there steps ("
                + word
                + ")? Not known: there are no two lengths whose difference the formula predicts."
            )
            continue
        steps = [interval for interval in intervals if interval.is_step]
        grain: dict[str, Part] = {
            "grain": mib(f"{committed.series.name}.{word}.grain_mib", max(i.granularity_bytes for i in intervals), 1),
            "share": percent("rule.step_share_pct", STEP_SHARE, 0),
        }
        if steps:
            doc.say(
                "Are there steps ("
                + word
                + ")? **Yes**, {n} of {all} differences leave the formula's by more than {share} "
                "and by more than {grain} MiB, what memory can be told apart by:",
                n=count(f"{committed.series.name}.{word}.steps", len(steps)),
                all=count(f"{committed.series.name}.{word}.intervals", len(intervals)),
                **grain,
            )
            doc.bullets(_step(interval, word, accounts) for interval in steps)
        else:
            doc.say(
                "Are there steps (" + word + ")? **None**: no difference leaves the formula's by more than {share} and "
                "by more than {grain} MiB, what memory can be told apart by; the largest departure is {largest} MiB.",
                largest=mib(
                    f"{committed.series.name}.{word}.largest_departure_mib",
                    max((i.departure_bytes or 0.0 for i in intervals), key=abs),
                    1,
                ),
                **grain,
            )
        _departures(doc, [interval for interval in intervals if interval not in steps], word, accounts)
    _granularity(doc, committed)
    _stairs(doc, committed, pages)


def _departures(doc: Document, intervals: Sequence[Interval], word: str, accounts: Accounts) -> None:
    """Name what is no step but more than the allocator's unit: the CPU backend has neither unit nor account."""
    found = [i for i in intervals if abs(i.departure_bytes or 0.0) > i.granularity_bytes]
    if found and found[0].longer.measured[0].device != "cpu":
        doc.say("No step, but more than memory can be told apart by (" + word + "):")
        doc.bullets(_step(interval, word, accounts) for interval in found)


def _step(interval: Interval, word: str, accounts: Accounts) -> Phrase:
    departure, expected = interval.departure_bytes or 0.0, interval.expected_bytes or 0.0
    name = f"{interval.longer.name}.{word}"
    what = phrase(
        "{shorter} to {longer}: {delta} MiB where the formula has {expected} ({departure} MiB, {share})",
        shorter=plain(f"{interval.shorter.name}.max_model_len", interval.shorter.at),
        longer=plain(f"{interval.longer.name}.max_model_len", interval.longer.at),
        delta=mib(f"{name}.step_delta_mib", interval.delta_bytes, 1),
        expected=mib(f"{name}.step_expected_mib", expected, 1),
        departure=signed_mib(f"{name}.step_departure_mib", departure),
        share=signed_percent(f"{name}.step_departure_pct", departure / expected if expected else None),
    )
    causes = accounts.causes(interval, f"{name}.moved")
    if causes is None:
        return join([what, phrase("its cause is not known from this run: " + _no_account(interval))])
    named = [phrase("by the account: {causes}", causes=causes)]
    return join([what, *named, *map(phrase, _cause(accounts.moved(interval), departure))])


def _no_account(interval: Interval) -> str:
    if interval.longer.measured[0].device == "cpu":
        return "the CPU backend's memory is not accounted for, and the host gives a page only when it is first written"
    return "no part of the account moved, or none of this memory was made (`server.transport=uds` makes one)"


def _cause(moved: dict[str, int], departure: float) -> Iterator[str]:
    """Name the mechanism behind the part that moved with the departure; nothing where no one part made most of it."""
    if moved.get("cache", 0) / departure >= MOST_OF_IT:
        yield (
            "KV tensors lie in segments that activations had freed, so the card had to give less (a smaller "
            "max_num_batched_tokens or more sequences remove that)"
            if departure < 0
            else "more of what activations freed, or of what rounding to whole segments adds, stays in torch's cache"
        )
    elif sum(moved.get(part, 0) for part in OUTSIDE_TORCH) / departure >= MOST_OF_IT:
        yield "it lies outside torch's allocator: the driver, a library or a process of others took it"


def _granularity(doc: Document, committed: Committed) -> None:
    """What a difference can be told apart by: the block and the allocator's unit, or the scatter of processes."""
    block = next((b for reading in committed.series.measured if (b := block_figures(reading))), None)
    if block is None:
        return
    if committed.series.sample.device == "cpu":
        doc.say(
            "Granularity: vLLM reserves KV in blocks of {block}; the host counts a page once it was written, and the "
            "memory of a tree of processes differs by about {scatter} MiB from start to start.",
            block=block,
            scatter=mib("rule.host_scatter_mib", HOST_SCATTER_BYTES),
        )
        return
    doc.say(
        "Granularity: vLLM reserves KV in blocks of {block}; torch takes memory from a card in segments of whole "
        "{segment} MiB, and NVML sees nothing finer.",
        block=block,
        segment=mib("rule.cuda_segment_mib", CUDA_SEGMENT_BYTES),
    )


def _stairs(doc: Document, committed: Committed, pages: Pages | None) -> None:
    found = stairs(committed, pages)
    known = sum(r.median("formula_bytes_per_sequence") is not None for r in committed.series.measured)
    if not found:
        if known > 2:
            doc.say(
                "The formula itself has no stair over these lengths: no difference leaves its mean rate by more than "
                "{share} and by more than a block.",
                share=percent("rule.step_share_pct", STEP_SHARE, 0),
            )
        return
    name = committed.series.name
    doc.say(
        "The formula itself is not one rate over these lengths: {n} of {all} of its differences leave the mean of "
        "{mean} bytes per token by more than {share} and by more than a block.",
        n=count(f"{name}.stairs", len(found)),
        all=count(f"{name}.formula_intervals", known - 1),
        mean=count(f"{name}.formula_mean_bytes_per_token", found[0].mean_bytes_per_token),
        share=percent("rule.step_share_pct", STEP_SHARE, 0),
    )
    doc.bullets(_stair(name, stair, pages) for stair in found)


def _stair(name: str, stair: Stair, pages: Pages | None) -> Phrase:
    parts: list[Part] = [
        phrase(
            "{shorter} to {longer}: {rate} bytes per token",
            shorter=plain(f"{stair.shorter.name}.max_model_len", stair.shorter.at),
            longer=plain(f"{stair.longer.name}.max_model_len", stair.longer.at),
            rate=count(f"{stair.longer.name}.formula_bytes_per_token", stair.bytes_per_token),
        )
    ]
    if stair.ends is not None:
        parts.append(
            phrase("a sliding window stops growing at {end} tokens", end=plain(f"{name}.pages.kink", stair.ends))
        )
    elif pages is not None and any(stair.longer.at <= kink for kink in pages.kinks):
        parts.append(phrase("all layers still grow"))
    elif pages is not None and pages.kinks and all(stair.shorter.at >= kink for kink in pages.kinks):
        parts.append(phrase("windowed layers no longer grow"))
    if stair.rounded:
        block = pages.layout.block_size if pages else stair.longer.median("engine_block_size")
        states = pages is not None and pages.has_states
        parts.append(
            phrase(
                "counted in whole blocks of {block} tokens"
                + (", enlarged until an attention page is as large as a state" if states else ""),
                block=count(f"{name}.block_tokens", block),
            )
        )
    return join(parts)
