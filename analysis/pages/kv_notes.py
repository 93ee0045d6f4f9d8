"""kv_cache_scaling_notes.md: the tutorial's questions about the memory curve, answered from the data."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.advice.kv_headroom import add_decision, add_headroom
from analysis.advice.subject import subject_of, subjects
from analysis.advice.target_load import target_rows, target_sentences
from analysis.memory.kv_account import Accounts
from analysis.memory.kv_account_table import add_account
from analysis.memory.kv_estimates import add_estimates
from analysis.memory.kv_fit import (
    LINEAR_R_SQUARED,
    LINEAR_RESIDUAL,
    Committed,
    KvResult,
    is_one_curve,
    kv_results,
    pool_bytes,
)
from analysis.memory.kv_flat import add_compiled, add_flat, add_kv_tokens
from analysis.memory.kv_pages import pages_of
from analysis.memory.kv_pages_table import add_pages
from analysis.memory.kv_scaling import digits, interval_to, scaling_notes, series_notes
from analysis.memory.kv_steps import add_steps
from analysis.numbers.statistics import linear_fit
from analysis.pages.without_rows import page_without_rows
from analysis.rows.caveats import add_caveats, add_failures, identity
from analysis.rows.series import Reading, Series
from analysis.rows.tables import RunPoint, Tables
from analysis.rows.targets import NO_OBJECTIVES, Slo, Targets
from analysis.rows.watching import add_watching
from analysis.writing.document import Document, Part, Phrase, join, phrase
from analysis.writing.figures import Figure, count, decimal, gib, mib, percent, plain, quote
from contract.rows import MEASURED

FILE = "kv_cache_scaling_notes.md"
TITLE = "KV cache and max_model_len"
NO_ROWS = (
    "it holds no readings of memory, so there is no kv_cache_scaling.csv (memory against max_model_len) and no "
    "kv_capacity.csv (what the device's pool holds at each length); `+sweep=kv` measures both."
)
POOLS_KNOWN = (
    " Its servers told the size of their pools: `python -m analysis whatif RUN max_model_len=NUMBER "
    "concurrency=NUMBER` says what would fit into one."
)
NO_CURVE = (
    "not known. The servers of this series were started in different ways, or forks of one import ran at once. The CPU "
    "backend's memory is a sum of PSS, to which a page adds its part in each process that has it, so these readings "
    "are not to be held against each other. `server.start=cold` for the whole sweep avoids it."
)


def kv_page(tables: Tables, targets: Targets, slo: Slo = NO_OBJECTIVES) -> Document:
    """Return the page; of a run without memory rows one that says so."""
    rows = [point for point in tables.points if point.purpose == "kv_scaling"]
    if not rows:
        return page_without_rows(FILE, TITLE, tables, NO_ROWS + (POOLS_KNOWN if _pools_known(tables.points) else ""))
    doc = Document(FILE)
    doc.heading(1, TITLE)
    found, results = subjects(tables, slo, targets, None), kv_results(tables.points)
    under_load = [row for result in results for row in target_rows(subject_of(result, found))]
    add_caveats(doc, [*rows, *under_load], tables)
    doc.say(
        "MB in the column names of the CSV files is MiB, {unit} bytes, as nvidia-smi prints it. Memory is that of "
        "all cards of a server together. *Ready*: idle, before any request. *Loaded*: idle again after a warm-up load "
        "that fills a step, with what the allocator kept of its activations.",
        unit=plain("unit.mib_bytes", 2**20),
    )
    if any(point.mem_tree_bytes is not None for point in rows):
        doc.say(
            "*By process*, a cross-check: the highest that NVML gave for the server's own processes at one look, from "
            "the start of the warm-up load to its end. Where it is nearer to *ready* no look came after the load had "
            "taken its memory"
            + (", as in every row here, so it does not check *loaded*" if _never_loaded(rows) else "")
            + ". What the cards show beyond it NVML gives to no process, or it was there before."
        )
    accounts = Accounts(tables.sessions)
    for result in results:
        doc.heading(2, "{who}", who=identity(result.sample, result.name, result.group.label))
        add_decision(doc, result, tables, targets)
        if sentences := target_sentences(subject_of(result, found)):
            doc.say("{sentences}", sentences=join(sentences, " "))
        _committed_section(doc, result, accounts, tables)
        _flat_section(doc, result, accounts)
        add_account(doc, result, accounts, tables.points)
        add_estimates(doc, result, accounts, tables.configs)
        add_pages(doc, result, tables.configs)
        add_headroom(doc, result, tables, targets)
    add_watching(doc, rows, "memory")
    add_failures(doc, rows, tables)
    return doc


def _pools_known(points: Sequence[RunPoint]) -> bool:
    """Whether `whatif` has a pool and a formula to go by."""
    return any(p.status == MEASURED and p.engine_kv_bytes and p.formula_bytes_per_sequence for p in points)


def _never_loaded(rows: Sequence[RunPoint]) -> bool:
    """Whether every reading by process is nearer to *ready* than to *loaded*."""
    known = [(p.mem_tree_bytes, p.mem_ready_bytes, p.mem_loaded_bytes) for p in rows]
    return all(2 * tree < ready + loaded for tree, ready, loaded in known if tree and ready and loaded)


def _committed_section(doc: Document, result: KvResult, accounts: Accounts, tables: Tables) -> None:
    doc.heading(3, "Pool sized to the length: is memory roughly linear, and are there steps?")
    if not result.committed:
        doc.say(
            "Not known from this run: it holds no committed pools, of which kv_cache_scaling.csv is made; `+sweep=kv` "
            "measures them."
        )
    for committed in result.committed:
        if len(result.committed) > 1:
            name = committed.series.name
            doc.heading(4, "{who}", who=quote(f"{name}.label", committed.series.group.label))
        _committed_table(doc, committed)
        if not is_one_curve(committed.series):
            doc.say("Line, differences and steps: " + NO_CURVE)
            continue
        _linear(doc, committed)
        add_compiled(doc, committed.series, accounts)
        add_steps(doc, committed, accounts, pages_of(committed.series.sample, tables.configs))


def _committed_table(doc: Document, committed: Committed) -> None:
    if committed.sequences is not None:
        doc.say(
            "Every pool had room for {n} sequences of max_model_len tokens (`--kv-cache-memory-bytes`), so bytes per "
            "token are the difference divided by the further tokens times {n}. Without that divisor the tutorial's "
            "slope is the cost of one token of length for all {n} sequences together.",
            n=count(f"{committed.series.name}.sequences", committed.sequences),
        )
    if committed.series.sample.enforce_eager:
        doc.say(
            "These servers are eager (`--enforce-eager`), as this mode's are unless `server.enforce_eager=false` is "
            "asked for: without torch.compile and CUDA graphs they start sooner, and no memory of graphs is in these "
            "readings."
        )
    by_process = _knows_processes(committed.series)
    columns = ["difference MiB", "formula MiB", "bytes per token", "notes"]
    doc.table(
        [*_memory_heads(by_process), *columns],
        [_committed_row(committed, reading, by_process) for reading in committed.series.readings],
        committed.series.sample.simulated,
    )


def _knows_processes(series: Series) -> bool:
    return any(reading.median("mem_tree_bytes") is not None for reading in series.measured)


def _memory_heads(by_process: bool) -> list[str]:
    return ["max_model_len", "ready MiB", "loaded MiB", *(["by process MiB"] if by_process else [])]


def _memory_cells(reading: Reading, places: int, by_process: bool) -> list[str | Part]:
    cells: list[str | Part] = [
        plain(f"{reading.name}.max_model_len", reading.at),
        mib(f"{reading.name}.mem_ready_mib", reading.median("mem_ready_bytes"), places),
        mib(f"{reading.name}.mem_loaded_mib", reading.median("mem_loaded_bytes"), places),
    ]
    if by_process:
        cells.append(mib(f"{reading.name}.mem_tree_mib", reading.median("mem_tree_bytes"), places))
    return cells


def _committed_row(committed: Committed, reading: Reading, by_process: bool) -> list[str | Part]:
    interval = interval_to(committed, reading)
    places = digits(committed.series.sample)
    cells = _memory_cells(reading, places, by_process)
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
            "sequence; the line meets length zero at {intercept} MiB"
            + ("" if linear else ", which means nothing where memory is no line")
            + "{besides}. (Rule: R² at least {least}, residual at most {most} of the range.)",
            besides=_besides(committed, name, fit.intercept) if linear else phrase(""),
            r2=Figure(f"{name}.r_squared", fit.r_squared, f"{fit.r_squared:.6f}"),
            n=count(f"{name}.lengths", fit.points),
            residual=mib(f"{name}.max_residual_mib", fit.max_residual, 1),
            least=decimal("rule.linear_r_squared", LINEAR_R_SQUARED, 2),
            most=percent("rule.linear_residual_pct", LINEAR_RESIDUAL, 0),
            **numbers,
        )


def _besides(committed: Committed, name: str, intercept: float) -> Phrase:
    """Needs the engine's pools: blocks that do not grow with the length put their line above zero, too."""
    known = [(reading.at, pool) for reading in committed.series.measured if (pool := pool_bytes(reading)) is not None]
    pools = linear_fit([at for at, _ in known], [pool for _, pool in known])
    if pools is None:
        return phrase("")
    places = digits(committed.series.sample)
    return phrase(
        ", the pools' own line at {pools} MiB; the difference, {besides} MiB, is what the server holds besides the "
        "pool (weights, runtime, activations)",
        pools=mib(f"{name}.pools_intercept_mib", pools.intercept, places),
        besides=mib(f"{name}.besides_pool_mib", intercept - pools.intercept, places),
    )


def _flat_section(doc: Document, result: KvResult, accounts: Accounts) -> None:
    doc.heading(3, "Fixed gpu_memory_utilization: what max_model_len changes there")
    if not result.capacity:
        doc.say(
            "Not known from this run: it holds no utilization rows, of which kv_capacity.csv is made; `+sweep=kv` "
            "measures them (modes utilization)."
        )
    for series in result.capacity:
        _capacity_table(doc, series)
        add_kv_tokens(doc, series, accounts)
        if is_one_curve(series):
            add_flat(doc, series, accounts)
        else:
            doc.say("Whether memory is flat is " + NO_CURVE)


def _capacity_table(doc: Document, series: Series) -> None:
    share = quote(f"{series.name}.gpu_memory_utilization", f"{series.sample.gpu_memory_utilization or 0:g}")
    doc.say("gpu_memory_utilization {share}:", share=share)
    by_process = _knows_processes(series)
    columns = [
        *_memory_heads(by_process),
        "KV GiB",
        "KV tokens",
        "engine_max_concurrency",
        "formula_max_concurrency",
        "notes",
    ]
    doc.table(
        columns,
        [_capacity_row(series, reading, by_process) for reading in series.readings],
        series.sample.simulated,
    )


def _capacity_row(series: Series, reading: Reading, by_process: bool) -> list[str | Part]:
    notes = series_notes(series, reading)
    return [
        *_memory_cells(reading, digits(series.sample), by_process),
        gib(f"{reading.name}.pool_gib", pool_bytes(reading)),
        reading.figure(count, "engine_kv_tokens"),
        reading.figure(decimal, "engine_max_concurrency"),
        reading.figure(decimal, "formula_max_concurrency"),
        join(notes),
    ]
