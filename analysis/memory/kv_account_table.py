"""The account of memory on the page: its parts, what they leave, when that came, what every difference is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from analysis.memory.kv_account import HEADS, MOMENTS, Account, Accounts
from analysis.memory.kv_fit import Interval, KvResult
from analysis.rows.cards import short_names
from analysis.rows.disturbances import process_words
from analysis.rows.series import Reading, Series
from analysis.rows.tables import RunPoint
from analysis.writing.document import Document, Part, Phrase, join, phrase
from analysis.writing.figures import count, gib, mib, percent, plain, quote, signed_mib

Cells = Callable[[Account], list[str | Part]]

HOW_READ = {
    "weights": "blocks of torch's allocator in the engine's workers, told apart by their addresses",
    "kv": "the same",
    "graphs": "the same: the private pools of CUDA graphs",
    "buffers": "the same: other live tensors",
    "cache": "the same: blocks that activations have left",
    "context": "NVML: by how much it rose for a probe process that made a bare context, before the server",
    "libraries": "NVML: by how much it rose beyond a bare context and what torch's allocator held when a probe process "
    "had torch make a tensor and multiply matrices, before the run's first server on the node; read on one card of a "
    "kind, taken for each",
    "residual": "memory of the cards (NVML, less what was there before the server) minus all of the above: what no "
    "probe and not torch's allocator tells. Kernels and libraries are in it, what the driver keeps of CUDA graphs, and "
    "what processes of others took of the cards since",
}
"""How each part was read, in the words of the page."""


def add_account(doc: Document, result: KvResult, accounts: Accounts, points: Sequence[RunPoint]) -> None:
    """Write the section for one model on one kind of card; `points` are all of the run."""
    doc.heading(3, "Where the memory goes")
    series_with = [series for series in result.series if list(_of(series, accounts))]
    if not series_with:
        doc.say(
            "Not known from this run: no row of a server holds an account of its memory (only one that comes up on "
            "GPUs and on a private socket, `server.transport=uds`, is asked for it)."
        )
        return
    found = [account for series in series_with for _, account in _of(series, accounts)]
    _how_read(doc, accounts, result.group.points[0].simulated)
    if any(account.moment == "peak" for account in found):
        doc.say("*Peak*: when all cards of the server together held most; its parts are read after the last point.")
    for series in series_with:
        _parts(doc, series, accounts)
    _residual(doc, found, accounts)
    _others(doc, series_with, accounts, points)
    for series in series_with:
        _by_card(doc, series, accounts)
    _when_it_came(doc, series_with, found, accounts)
    _cross_check(doc, found)
    for committed in result.committed:
        if len(list(_of(committed.series, accounts))) > 2:
            _differences(doc, committed.series, accounts)


def _of(series: Series, accounts: Accounts) -> Iterator[tuple[Reading, Account]]:
    for reading in series.measured:
        for moment in MOMENTS:
            account = accounts.at(reading, moment)
            if account is not None:
                yield reading, account


def _how_read(doc: Document, accounts: Accounts, simulated: bool) -> None:
    doc.say("How each part was read:")
    rows = [[HEADS[part], HOW_READ[part]] for part in (*accounts.parts, "residual")]
    doc.table(["what", "notes"], rows, simulated)


def _heads(accounts: Accounts) -> list[str]:
    return [HEADS[part] for part in (*accounts.parts, "residual")]


def _parts(doc: Document, series: Series, accounts: Accounts) -> None:
    _by_length(doc, series, accounts, ["memory", *_heads(accounts), "share"], _all_parts)


def _all_parts(account: Account) -> list[str | Part]:
    return [
        mib(f"{account.name}.used_mib", account.used, 1),
        *(mib(f"{account.name}.{part}_mib", value, 1) for part, value in account.parts.items()),
        _residual_of(account),
        _share(f"{account.name}.residual_pct", account),
    ]


def _residual_of(account: Account) -> Part:
    return signed_mib(f"{account.name}.residual_mib", account.residual)


def _share(name: str, account: Account) -> Part:
    return percent(name, abs(account.share), 2)


def _residual(doc: Document, found: list[Account], accounts: Accounts) -> None:
    most = max(found, key=lambda account: abs(account.residual))
    highest = max(found, key=lambda account: abs(account.share))
    doc.say(
        "**Residual**, what no probe and not torch's allocator tells: at most {residual} MiB, and at most {share} of "
        "the memory at a moment.",
        residual=_residual_of(most),
        share=_share(f"{highest.name}.residual_pct", highest),
    )
    if any(account.parts["context"] is None for account in found):
        doc.say("Where no probe told the CUDA context it is in the residual.")
    if "libraries" not in accounts.parts:
        doc.say(
            "No probe told what torch and cuBLAS take of a card, so that is in the residual, too: a newer run has a "
            "second probe that tells it."
        )
    elif any(account.parts["libraries"] is None for account in found):
        doc.say("Where no probe told what torch and cuBLAS take of a card that is in the residual.")


def _others(doc: Document, series_with: Sequence[Series], accounts: Accounts, points: Sequence[RunPoint]) -> None:
    """Needs a server with an account beside which a process of others was seen, at whatever moment or point."""
    readings = {reading.name: reading for series in series_with for reading, _ in _of(series, accounts)}
    met = [(reading, seen) for reading in readings.values() if (seen := accounts.others(reading, points))]
    if not met:
        return
    doc.say(
        "While these servers lived, others were on their cards: {met}. What those took since the server started is in "
        "the residual.",
        met=join(
            phrase(
                reading.measured[0].mode + ", max_model_len {length}: {who}",
                length=plain(f"{reading.name}.max_model_len", reading.at),
                who=process_words(f"{reading.name}.account", seen),
            )
            for reading, seen in met
        ),
    )


def _by_card(doc: Document, series: Series, accounts: Accounts) -> None:
    """Write the account of every card of servers that have several: a sum can hide one that holds more."""
    servers = [
        (reading, cards)
        for reading in series.measured
        for moment in MOMENTS
        if (cards := accounts.by_card(reading, moment))
    ]
    if not servers:
        return
    rows: list[list[str | Part]] = [
        [
            plain(f"{reading.name}.max_model_len", reading.at),
            account.moment,
            quote(f"{account.name}.card", names[card]),
            *_all_parts(account),
        ]
        for reading, cards in servers
        for names in [short_names(cards)]
        for card, account in cards.items()
    ]
    apart = max(max(used) - min(used) for _, cards in servers for used in [[each.used for each in cards.values()]])
    one_for_all = (
        " *Torch and cuBLAS* is what one card told, taken for each: where cards differ in it, that is in the residual."
    )
    doc.say(
        "The same card by card, each called by the beginning of its UUID."
        + (one_for_all if "libraries" in accounts.parts else "")
        + " {who}:",
        who=_who(series),
    )
    heads = ["max_model_len", "moment", "card", "memory", *_heads(accounts), "share"]
    doc.table(heads, rows, series.sample.simulated)
    doc.say(
        "Two cards of one server are never further apart than {apart} MiB of memory.",
        apart=mib(f"{series.name}.account.cards_apart_mib", apart, 1),
    )


def _when_it_came(doc: Document, series_with: Sequence[Series], found: list[Account], accounts: Accounts) -> None:
    """Divide the residual by the workers' own readings, which are of the counter that memory itself is read from."""
    if all(account.since is None for account in found):
        doc.say(
            "When the residual came is not known from this run: its workers did not read what lies outside torch's "
            "allocator, as those of a newer run on GPUs do."
        )
        _capture_by_the_log(doc, found)
        return
    doc.say(
        "When the residual came, by the workers' own readings: cudaMemGetInfo, less what torch's allocator held, at "
        "this moment and at the engine's first look at the card, before it loaded the model. These are differences of "
        "the counter that the memory is read from, too: they divide the residual and explain none of it. *With graph "
        "capture*: what the engine's log says went of the card meanwhile, to a hundredth of a GiB, less the graph "
        "pools; what the driver keeps of graphs is at most that. *Otherwise since*: the rest of what came since the "
        "first look, less torch and cuBLAS where a probe told of them. *Neither*: what is left."
    )
    heads = ["residual", "with graph capture", "otherwise since", "neither"]
    for series in series_with:
        _by_length(doc, series, accounts, heads, _came)
    if any(account.with_graphs is None for account in found):
        doc.say(
            "Where *with graph capture* is missing the log does not tell it (it has the figure of one worker, so of "
            "several cards it tells none): it is then in *otherwise since*."
        )
    several = any(accounts.by_card(reading, "ready") for series in series_with for reading in series.measured)
    _first_look(doc, found, several)


def _came(account: Account) -> list[str | Part]:
    return [
        _residual_of(account),
        signed_mib(f"{account.name}.with_graphs_mib", account.with_graphs),
        signed_mib(f"{account.name}.since_mib", account.since),
        signed_mib(f"{account.name}.neither_mib", account.neither),
    ]


def _first_look(doc: Document, found: list[Account], several: bool) -> None:
    """Needs a context that a probe told; at peak the two readings are of two moments, and this would not hold.

    Workers open their communicators before their first snapshot of memory: vLLM's `Worker.init_device`
    (vllm/v1/worker/gpu_worker.py, 0.25.1 and 0.32.0). `several`: some server had several cards.
    """
    communicators = (
        " The workers of a server of several cards open their communicators (NCCL) before that look: what those take "
        "is in *neither*."
    )
    checked = [
        account
        for account in found
        if account.moment == "ready" and account.neither is not None and account.parts["context"] is not None
    ]
    if checked:
        furthest = max(checked, key=lambda account: abs(account.neither or 0))
        doc.say(
            "When ready *neither* checks one thing only: that what the engine found on the card at its first look is "
            "what was there before the server and the probe's bare context ({difference} MiB where it is furthest from "
            "that). Whatever came later, a stranger's memory, too, cancels out of it and stands in the other columns."
            + (communicators if several else ""),
            difference=signed_mib(f"{furthest.name}.neither_mib", furthest.neither),
        )


def _capture_by_the_log(doc: Document, found: list[Account]) -> None:
    account = next((account for account in found if account.graph_capture), None)
    if account is not None:
        doc.say(
            "While it captured CUDA graphs the engine saw {capture} GiB go (its log): their pools, and what the driver "
            "took for them, which is in the residual.",
            capture=gib(f"{account.name}.graph_capture_gib", account.graph_capture),
        )


def _cross_check(doc: Document, found: list[Account]) -> None:
    ended = [account for account in found if account.end_difference is not None]
    if ended:
        furthest = max(ended, key=lambda account: abs(account.end_difference or 0))
        doc.say(
            "A cross-check of torch's part: at a server's end, when torch had freed everything, its CUDA graphs too, "
            "NVML still had what lay outside torch's allocator (the driver gives what it took for graphs back with the "
            "process); where the two differ most, {difference} MiB.",
            difference=signed_mib(f"{furthest.name}.end_difference_mib", furthest.end_difference),
        )


def _by_length(doc: Document, series: Series, accounts: Accounts, heads: list[str], cells: Cells) -> None:
    """A row for every length and moment: the `cells` of its account."""
    doc.say("{who}:", who=_who(series))
    rows: list[list[str | Part]] = [
        [plain(f"{reading.name}.max_model_len", reading.at), account.moment, *cells(account)]
        for reading, account in _of(series, accounts)
    ]
    doc.table(["max_model_len", "moment", *heads], rows, series.sample.simulated)


def _who(series: Series) -> Phrase:
    if series.sample.mode == "committed":
        return phrase("Pools of {n} sequences, MiB", n=count(f"{series.name}.sequences", series.sample.sequences))
    return phrase("Pools cut from a fixed gpu_memory_utilization, MiB")


def _differences(doc: Document, series: Series, accounts: Accounts) -> None:
    doc.say("What each difference between two lengths is made of, MiB when ready:")
    rows: list[list[str | Part]] = []
    for shorter, longer in pairwise(series.measured):
        interval = Interval(shorter, longer, series.sample.sequences, "mem_ready_bytes")
        moved = accounts.moved(interval)
        if moved:
            name = f"{longer.name}.ready.moved"
            cells = [signed_mib(f"{name}.{part}_mib", moved.get(part)) for part in (*accounts.parts, "residual")]
            total = signed_mib(f"{name}.used_mib", sum(moved.values()) - moved["before"])
            expected = mib(f"{longer.name}.delta_formula_mib", interval.expected_bytes, 1)
            rows.append([plain(f"{longer.name}.max_model_len", longer.at), total, expected, *cells])
    doc.table(["max_model_len", "difference", "formula", *_heads(accounts)], rows, series.sample.simulated)
