"""The page function on the page: which layers keep what, where each stops growing, and the engine held against it."""

from __future__ import annotations

from collections.abc import Iterator

from analysis.memory.kv_estimates import AGREE_SHARE
from analysis.memory.kv_fit import KvResult
from analysis.memory.kv_pages import Configs, Held, PageFunction, page_functions
from analysis.writing.document import Document, Part, Phrase, phrase
from analysis.writing.figures import NOTHING, count, mib, percent, plain, signed_percent
from contract.kv import FULL, LINEAR_ATTENTION, MLA, SLIDING_WINDOW, LayerGroup

WORDS = {
    FULL: "full attention",
    SLIDING_WINDOW: "sliding window",
    MLA: "latent attention (MLA)",
    LINEAR_ATTENTION: "linear attention",
}
KEEPS = {
    FULL: "K and V of every token",
    SLIDING_WINDOW: "K and V of the window and of tokens in flight",
    MLA: "one latent vector of every token, on every rank",
    LINEAR_ATTENTION: "a state of constant size",
}


def add_pages(doc: Document, result: KvResult, configs: Configs) -> None:
    """Write the section for one model on one kind of card."""
    doc.heading(3, "What one sequence keeps, by group of layers")
    if not result.readings:
        doc.say("Not known from this run: no server was measured; `+sweep=kv` measures them.")
        return
    functions = page_functions(result, configs)
    if not functions:
        doc.say(
            "Not known from this run: its manifest holds no config of this model from which the formula gives the "
            "figures of the rows, or the formula does not cover the model's layers."
        )
        return
    doc.say(
        "Arithmetic from the model's config, over all ranks: vLLM hands out blocks, and every group of layers draws "
        "its own. What the engine says of a full-length sequence stands beside it."
    )
    for function in functions:
        if len(functions) > 1:
            doc.heading(4, "{who}", who=servers(function))
        _groups(doc, function)
        _lengths(doc, function)
        doc.bullets([*_growth(function), *_kinks(function), _agreement(function)])


def servers(function: PageFunction) -> Phrase:
    """Return which servers a page function holds for, where a run has several."""
    sample = function.sample
    if sample.max_num_batched_tokens is None:
        return phrase(mode_words(function))
    batched = plain(f"{function.name}.max_num_batched_tokens", sample.max_num_batched_tokens)
    return phrase(mode_words(function) + ", max_num_batched_tokens {batched}", batched=batched)


def mode_words(function: PageFunction) -> str:
    """Return how the pools of these servers were sized."""
    modes = {series.sample.mode for series in function.series}
    if modes == {"committed"}:
        return "Pools sized to the length"
    return "All servers" if len(modes) > 1 else "Pools at a fixed gpu_memory_utilization"


def _groups(doc: Document, function: PageFunction) -> None:
    layout = function.pages.layout
    rows: list[list[str | Part]] = []
    for group in layout.groups:
        name = f"{function.name}.{group.kind}"
        linear = group.kind == LINEAR_ATTENTION
        size = function.pages.ranks * (group.state_bytes if linear else group.bytes_per_token)
        until = layout.grows_until(group)
        rows.append(
            [
                WORDS[group.kind],
                count(f"{name}.layers", group.layers),
                phrase("{size}" + (" a sequence" if linear else " a token"), size=count(f"{name}.bytes", size)),
                _until(function, group, until),
                KEEPS[group.kind],
            ]
        )
    heads = ["what", "layers", "bytes of a layer", "grows until (tokens)", "notes"]
    doc.table(heads, rows, function.sample.simulated)


def _until(function: PageFunction, group: LayerGroup, until: int | None) -> Part:
    if group.kind == LINEAR_ATTENTION:
        return phrase("does not grow")
    return phrase("always grows") if until is None else plain(f"{function.name}.kink", until)


def _lengths(doc: Document, function: PageFunction) -> None:
    groups = function.pages.layout.groups
    heads = ["tokens", *(f"{WORDS[group.kind]}: blocks (MiB)" for group in groups)]
    heads += ["all MiB", "engine MiB", "difference", "notes"]
    rows = [_row(function, tokens) for tokens in shown_lengths(function)]
    doc.table(heads, rows, function.sample.simulated)


def shown_lengths(function: PageFunction) -> list[int]:
    """Return the lengths of the table: those measured, and both sides of the first step and of every kink."""
    pages = function.pages
    block = pages.layout.block_size
    sides = [tokens for end in (block, *pages.kinks) for tokens in (end, end + (1 if end == block else block))]
    known = {int(reading.at) for reading in function.readings}
    return sorted(known | {tokens for tokens in sides if pages.limit is None or tokens <= pages.limit})


def _row(function: PageFunction, tokens: int) -> list[str | Part]:
    pages = function.pages
    name = f"{function.name}.len{tokens}"
    cells: list[str | Part] = [plain(f"{name}.tokens", tokens)]
    for group in pages.layout.groups:
        blocks = count(f"{name}.{group.kind}_blocks", pages.layout.blocks_of(group, tokens))
        size = mib(f"{name}.{group.kind}_mib", pages.group_bytes(group, tokens), 2)
        cells.append(phrase("{blocks} ({size})", blocks=blocks, size=size))
    cells.append(mib(f"{name}.all_mib", pages.sequence_bytes(tokens), 2))
    held = max((held for held in function.held if held.reading.at == tokens), key=_apart, default=None)
    if held is None:
        cells += [phrase(NOTHING), phrase(NOTHING)]
    else:
        cells += [mib(f"{held.reading.name}.engine_sequence_mib", held.engine_bytes, 2), _difference(held)]
    return [*cells, _place(function, tokens)]


def _apart(held: Held) -> float:
    return abs(held.difference)


def _difference(held: Held) -> Part:
    return signed_percent(f"{held.reading.name}.engine_difference_pct", held.difference, 2)


def _place(function: PageFunction, tokens: int) -> str:
    block = function.pages.layout.block_size
    if tokens in function.pages.kinks:
        return "the window stops growing here"
    if tokens == block:
        return "one block of attention"
    if tokens == block + 1:
        return "one token more"
    return "measured" if any(reading.at == tokens for reading in function.readings) else "past the kink"


def _growth(function: PageFunction) -> Iterator[Phrase]:
    """What a block is, and what each kind of layers does with the length."""
    pages, name = function.pages, function.name
    layout = pages.layout
    yield phrase(
        "A block takes {size} bytes of the pool: layers a block: {layers}, each with a page of {tokens} tokens"
        + (
            ". It was enlarged until a page of attention is as large as a state, so attention grows in steps of so "
            "many tokens."
            if pages.has_states
            else "."
        ),
        size=count(f"{name}.block_bytes", pages.block_bytes),
        tokens=count(f"{name}.block_tokens", layout.block_size),
        layers=count(f"{name}.layers_per_block", layout.layers_per_block),
    )
    for group in layout.groups:
        if group.kind == SLIDING_WINDOW:
            yield phrase(
                "Sliding window: {window} tokens less one, and {flight} that may be in flight, make {until}; past them "
                "a longer sequence costs these layers nothing. They hold one block more, since a window need not start "
                "where a block does. While a request only decodes they keep {held} blocks of it at most.",
                held=count(f"{name}.window_blocks", layout.blocks_held(group, layout.grows_until(group))),
                window=count(f"{name}.window_tokens", group.window),
                flight=count(f"{name}.in_flight_tokens", layout.in_flight_tokens),
                until=plain(f"{name}.kink", layout.grows_until(group) or 0),
            )
        elif group.kind == LINEAR_ATTENTION:
            yield phrase(
                "Linear attention: {blocks} blocks from the first token on, whatever the length.",
                blocks=count(f"{name}.state_blocks", layout.blocks_of(group, 1)),
            )
    if pages.one_rate:
        yield phrase(
            "All layers keep all tokens, so a token costs the same at any length: {rate} bytes.",
            rate=count(f"{name}.bytes_per_token", pages.block_bytes / layout.block_size * _tables(function)),
        )


def _tables(function: PageFunction) -> int:
    """Blocks of a sequence of one block's tokens."""
    return function.pages.layout.blocks_per_sequence(function.pages.layout.block_size)


def _kinks(function: PageFunction) -> Iterator[Phrase]:
    """Whether lengths were measured on both sides of where a window stops growing."""
    pages, lengths = function.pages, [reading.at for reading in function.readings]
    ends = [end for group in pages.layout.groups if (end := pages.layout.grows_until(group))]
    for end in ends:
        kink = plain(f"{function.name}.kink", end)
        if end not in pages.kinks and pages.limit is not None:
            limit = plain(f"{function.name}.limit", pages.limit)
            yield phrase(
                "The end of growth at {kink} tokens bends nothing: the longest length that the model takes is {limit}.",
                kink=kink,
                limit=limit,
            )
        elif min(lengths) < end <= max(lengths) - pages.layout.block_size:
            yield phrase("Lengths were measured on both sides of the kink at {kink} tokens.", kink=kink)
        else:
            yield phrase(
                "No length was measured "
                + ("below" if min(lengths) >= end else "a block past")
                + " the kink at {kink} tokens; `+sweep=kv` with further `sweep.max_model_len` tells.",
                kink=kink,
            )


def _agreement(function: PageFunction) -> Phrase:
    held = function.held
    if not held:
        return phrase(
            "The engine's own figures are not known exactly enough to hold against this: it is arithmetic alone."
        )
    if function.sample.simulated:
        return phrase("The simulator takes its figures from this very formula, so that they agree shows nothing.")
    worst = max(held, key=_apart)
    agrees = _apart(worst) <= AGREE_SHARE
    return phrase(
        "Held against the KV concurrency that the engine gives for {n} servers, none of which was fitted: "
        + ("**agrees**" if agrees else "**departs**")
        + ", the largest difference is {difference}, at {tokens} tokens (rule: at most {rule}).",
        n=count(f"{function.name}.held", len(held)),
        difference=_difference(worst),
        tokens=plain(f"{worst.reading.name}.max_model_len", worst.reading.at),
        rule=percent("rule.estimates_agree_pct", AGREE_SHARE, 0),
    )
