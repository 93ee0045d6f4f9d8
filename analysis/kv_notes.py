"""kv_cache_scaling_notes.md: the tutorial's questions about the memory curve, answered from the data."""

from __future__ import annotations

from analysis.caveats import add_caveats, add_failures, identity
from analysis.document import Document, Part, Phrase, join, phrase
from analysis.figures import Figure, count, decimal, gib, mib, percent, plain, quote, signed_percent
from analysis.kv_account import Accounts, add_account
from analysis.kv_estimates import add_estimates
from analysis.kv_fit import (
    LINEAR_R_SQUARED,
    LINEAR_RESIDUAL,
    STEP_SHARE,
    Committed,
    Interval,
    KvResult,
    flat_share,
    kv_results,
    pool_bytes,
)
from analysis.kv_headroom import add_headroom
from analysis.kv_scaling import block_figures, digits, interval_to, reading_notes, scaling_notes
from analysis.series import Reading, Series
from analysis.tables import Tables
from analysis.targets import Targets

FILE = "kv_cache_scaling_notes.md"


def kv_page(tables: Tables, targets: Targets) -> Document | None:
    """Return the page, or None for a run without memory rows."""
    rows = [point for point in tables.points if point.purpose == "kv_scaling"]
    if not rows:
        return None
    doc = Document(FILE)
    doc.heading(1, "KV cache and max_model_len")
    add_caveats(doc, rows, tables)
    doc.say(
        "MB in the column names of the CSV files is MiB, {unit} bytes, as nvidia-smi prints it. Memory is that of "
        "all cards of a server together. *Ready*: idle, before any request. *Loaded*: idle again after a warm-up load "
        "that fills a step, when activation memory has been taken back.",
        unit=plain("unit.mib_bytes", 2**20),
    )
    accounts = Accounts(tables.sessions)
    for result in kv_results(tables.points):
        sample = result.readings[0].measured[0] if result.readings else result.group.points[0]
        doc.heading(2, "{who}", who=identity(sample, result.name, result.group.label))
        _committed_section(doc, result, accounts)
        _flat_section(doc, result)
        add_account(doc, result, accounts)
        add_estimates(doc, result, accounts)
        add_headroom(doc, result, tables.points, targets)
    add_failures(doc, rows, tables)
    return doc


def _committed_section(doc: Document, result: KvResult, accounts: Accounts) -> None:
    doc.heading(3, "Pool sized to the length: is memory roughly linear, and are there steps?")
    if not result.committed:
        doc.say("Not known from this run: it holds no committed pools; `+sweep=kv` measures them.")
    for committed in result.committed:
        if len(result.committed) > 1:
            name = committed.series.name
            doc.heading(4, "{who}", who=quote(f"{name}.label", committed.series.group.label))
        _committed_table(doc, committed)
        _linear(doc, committed)
        _steps(doc, committed, accounts)


def _committed_table(doc: Document, committed: Committed) -> None:
    if committed.sequences is not None:
        doc.say(
            "Every pool had room for {n} sequences of max_model_len tokens (`--kv-cache-memory-bytes`), so bytes per "
            "token are the difference divided by the further tokens times {n}. Without that divisor the tutorial's "
            "slope is the cost of one token of length for all {n} sequences together.",
            n=count(f"{committed.series.name}.sequences", committed.sequences),
        )
    columns = ["max_model_len", "ready MiB", "loaded MiB", "difference MiB", "formula MiB", "bytes per token", "notes"]
    doc.table(
        columns,
        [_committed_row(committed, reading) for reading in committed.series.readings],
        committed.series.sample.simulated,
    )


def _committed_row(committed: Committed, reading: Reading) -> list[str | Part]:
    interval = interval_to(committed, reading)
    places = digits(committed.series.sample)
    cells: list[str | Part] = [
        plain(f"{reading.name}.max_model_len", reading.at),
        mib(f"{reading.name}.mem_ready_mib", reading.median("mem_ready_bytes"), places),
        mib(f"{reading.name}.mem_loaded_mib", reading.median("mem_loaded_bytes"), places),
    ]
    if interval is None:
        cells += ["", "", ""]
    else:
        cells += [
            mib(f"{reading.name}.delta_ready_mib", interval.delta_bytes, places),
            mib(f"{reading.name}.delta_formula_mib", interval.expected_bytes, places),
            count(f"{reading.name}.bytes_per_token_ready", interval.bytes_per_token),
        ]
    return [*cells, scaling_notes(committed, reading)]


def _linear(doc: Document, committed: Committed) -> None:
    for column, word in (("mem_ready_bytes", "ready"), ("mem_loaded_bytes", "loaded")):
        fit, linear = committed.fit(column), committed.is_linear(column)
        name = f"{committed.series.name}.{word}"
        if fit is None:
            doc.say("Is it roughly linear (" + word + ")? Not known: fewer than two lengths hold this reading.")
            continue
        numbers: dict[str, Part] = {
            "slope": count(f"{name}.slope_bytes_per_token", committed.bytes_per_token(column)),
            "intercept": mib(f"{name}.intercept_mib", fit.intercept, digits(committed.series.sample)),
        }
        if linear is None:
            doc.say(
                "Is it roughly linear ("
                + word
                + ")? {n} lengths do not decide it. The line through them has {slope} bytes "
                "per token and sequence and meets length zero at {intercept} MiB.",
                n=count(f"{name}.lengths", fit.points),
                **numbers,
            )
            continue
        doc.say(
            "Is it roughly linear ("
            + word
            + ")? **"
            + ("Yes" if linear else "No")
            + "**: R² {r2} over {n} lengths, largest residual {residual} MiB. Slope {slope} bytes per token and "
            "sequence; the line meets length zero at {intercept} MiB, which is what the server holds besides the pool "
            "(weights, runtime, activations). (Rule: R² at least {least}, residual at most {most} of the range.)",
            r2=Figure(f"{name}.r_squared", fit.r_squared, f"{fit.r_squared:.6f}"),
            n=count(f"{name}.lengths", fit.points),
            residual=mib(f"{name}.max_residual_mib", fit.max_residual, 1),
            least=decimal("rule.linear_r_squared", LINEAR_R_SQUARED, 2),
            most=percent("rule.linear_residual_pct", LINEAR_RESIDUAL, 0),
            **numbers,
        )


def _steps(doc: Document, committed: Committed, accounts: Accounts) -> None:
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
        if steps:
            doc.say(
                "Are there steps ("
                + word
                + ")? **Yes**, {n} of {all} differences leave the formula's by more than {share} "
                "and by more than {grain} MiB, what memory can be told apart by:",
                grain=_grain(committed, intervals, word),
                n=count(f"{committed.series.name}.{word}.steps", len(steps)),
                all=count(f"{committed.series.name}.{word}.intervals", len(intervals)),
                share=percent("rule.step_share_pct", STEP_SHARE, 0),
            )
            doc.bullets(_step(interval, word, accounts) for interval in steps)
        else:
            doc.say(
                "Are there steps (" + word + ")? **None** beyond {share} of the expected difference or {grain} MiB, "
                "what memory can be told apart by; the largest departure is {largest} MiB.",
                grain=_grain(committed, intervals, word),
                share=percent("rule.step_share_pct", STEP_SHARE, 0),
                largest=mib(
                    f"{committed.series.name}.{word}.largest_departure_mib",
                    max((i.departure_bytes or 0.0 for i in intervals), key=abs),
                    1,
                ),
            )
    _granularity(doc, committed)


def _grain(committed: Committed, intervals: list[Interval], word: str) -> Figure:
    """A block, and the allocator's unit (GPUs) or the scatter of a process tree (CPU backend)."""
    return mib(f"{committed.series.name}.{word}.grain_mib", max(i.granularity_bytes for i in intervals), 1)


def _step(interval: Interval, word: str, accounts: Accounts) -> Phrase:
    departure, expected = interval.departure_bytes or 0.0, interval.expected_bytes or 0.0
    name = f"{interval.longer.name}.{word}"
    what = phrase(
        "{shorter} to {longer}: {delta} MiB where the formula has {expected} ({share})",
        shorter=plain(f"{interval.shorter.name}.max_model_len", interval.shorter.at),
        longer=plain(f"{interval.longer.name}.max_model_len", interval.longer.at),
        delta=mib(f"{name}.step_delta_mib", interval.delta_bytes, 1),
        expected=mib(f"{name}.step_expected_mib", expected, 1),
        share=signed_percent(f"{name}.step_departure_pct", departure / expected if expected else None),
    )
    causes = accounts.causes(interval, f"{name}.moved")
    return what if causes is None else join([what, phrase("by the account: {causes}", causes=causes)])


def _granularity(doc: Document, committed: Committed) -> None:
    block = next((b for reading in committed.series.measured if (b := block_figures(reading))), None)
    if block is None:
        return
    doc.say(
        "vLLM reserves KV in blocks of {block}; stairs as fine as that cannot show between lengths this far apart. On "
        "GPUs a difference can also depart because KV tensors land in segments that the profiling forward pass left in "
        "torch's cache: a smaller max_num_batched_tokens or more sequences remove that.",
        block=block,
    )


def _flat_section(doc: Document, result: KvResult) -> None:
    doc.heading(3, "Fixed gpu_memory_utilization: what max_model_len changes there")
    if not result.capacity:
        doc.say("Not known from this run: it holds no utilization rows; `+sweep=kv` measures them (modes utilization).")
    for series in result.capacity:
        _capacity_table(doc, series)
        _flat(doc, series)


def _capacity_table(doc: Document, series: Series) -> None:
    share = quote(f"{series.name}.gpu_memory_utilization", f"{series.sample.gpu_memory_utilization or 0:g}")
    doc.say("gpu_memory_utilization {share}:", share=share)
    columns = [
        "max_model_len",
        "ready MiB",
        "loaded MiB",
        "KV GiB",
        "KV tokens",
        "engine_max_concurrency",
        "formula_max_concurrency",
        "notes",
    ]
    doc.table(
        columns, [_capacity_row(reading, digits(series.sample)) for reading in series.readings], series.sample.simulated
    )


def _capacity_row(reading: Reading, places: int) -> list[str | Part]:
    notes = reading_notes(reading)
    return [
        plain(f"{reading.name}.max_model_len", reading.at),
        mib(f"{reading.name}.mem_ready_mib", reading.median("mem_ready_bytes"), places),
        mib(f"{reading.name}.mem_loaded_mib", reading.median("mem_loaded_bytes"), places),
        gib(f"{reading.name}.pool_gib", pool_bytes(reading)),
        reading.figure(count, "engine_kv_tokens"),
        reading.figure(decimal, "engine_max_concurrency"),
        reading.figure(decimal, "formula_max_concurrency"),
        join(notes),
    ]


def _flat(doc: Document, series: Series) -> None:
    known = [value for reading in series.measured if (value := reading.median("mem_ready_bytes")) is not None]
    if len(known) < 2:
        doc.say("Whether memory is flat is not known: fewer than two lengths were measured.")
        return
    low, high = min(known), max(known)
    places = digits(series.sample)
    share = flat_share(series.sample)
    flat = high - low <= share * high
    doc.say(
        ("Memory is **flat**" if flat else "Memory is **not flat**")
        + ": from {low} to {high} MiB, a range of {span} MiB over {n} lengths (rule: at most {share}). "
        + (
            "Today's vLLM takes the share of the card that it is given and cuts the pool from what weights and "
            "activations leave, whatever max_model_len is; a slope fitted here would be about zero bytes per token and "
            "would say nothing about KV. "
            if flat
            else "vLLM sizes this pool from the memory it finds, not from max_model_len, so the difference comes from "
            "elsewhere and is not a cost per token. "
        )
        + "Read the capacity instead: max_model_len divides the same pool into fewer, longer sequences.",
        low=mib(f"{series.name}.mem_ready_lowest_mib", low, places),
        high=mib(f"{series.name}.mem_ready_highest_mib", high, places),
        span=mib(f"{series.name}.mem_ready_range_mib", high - low, max(places, 1)),
        n=count(f"{series.name}.lengths", len(known)),
        share=percent("rule.flat_share_pct", share, 0),
    )
