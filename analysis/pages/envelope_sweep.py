"""envelope_sweep.md and its CSV: which (context length, concurrency) the KV pool holds, expected and measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from analysis.load.load_tables import csv_number
from analysis.memory.envelope_cells import Expected
from analysis.memory.envelope_grid import Cell, EnvelopeGrid, envelope_grids
from analysis.memory.kv_envelope import Outcome
from analysis.rows.caveats import add_caveats, add_failures, identity
from analysis.rows.series import outcome_figure
from analysis.rows.tables import Tables
from analysis.writing.document import Document, Part, Phrase, join, phrase
from analysis.writing.figures import NOTHING, Figure, count, percent, plain, quote
from analysis.writing.files import write_csv
from contract.rows import MEASURED, PRUNED

FILE = "envelope_sweep.md"
SIGNS = ("preemptions", "running_max", "waiting_max")
CSV_COLUMNS = (
    "context_tokens", "concurrency", "need_blocks", "prompts_blocks", "pool_blocks", "expected", "measured",
    "preemptions", "running_max", "waiting_max", "kv_usage_max", "notes",
)  # fmt: skip
UNDECIDED = {
    "unknown": "what KV arithmetic expects is not known (no config of the model that gives the rows' figures, or no "
    "count of blocks by the engine)",
    "blind": "the server's metrics are missing",
    "open": "arithmetic leaves it open",
}
"""Why a cell that was measured neither confirms nor refutes what was expected of it."""


def write_envelope(run_dir: Path, grids: Sequence[EnvelopeGrid]) -> list[Path]:
    """Write one file per server; the first owns the plain name."""
    return [
        write_csv(run_dir / grid.group.file("envelope_sweep", ".csv"), CSV_COLUMNS, [_csv_row(c) for c in grid.cells])
        for grid in grids
    ]


def _csv_row(cell: Cell) -> list[str]:
    point = cell.point
    measured = cell.measured if point.status == MEASURED else None
    usage = csv_number(point.kv_usage_max)
    values = (
        cell.length, cell.concurrency, cell.need_blocks, cell.prompts_blocks, cell.pool_blocks, cell.expected,
        measured, point.preemptions, point.running_max, point.waiting_max, usage, _notes(cell).plain,
    )  # fmt: skip
    return ["" if value is None else str(value) for value in values]


def envelope_page(tables: Tables) -> Document | None:
    """Return the page, or None for a run without a cell."""
    rows = [point for point in tables.points if point.purpose == "envelope"]
    if not rows:
        return None
    doc = Document(FILE)
    doc.heading(1, "KV envelope: which contexts fit at once")
    add_caveats(doc, rows, tables)
    doc.say(
        "In a cell so many requests run at once, each growing from its prompt to context_tokens. *Expected* is KV "
        "arithmetic alone, from the blocks that requests hold by the formula and those that the engine says it has, "
        "less the null block: *all fit*, all requests at their full length, whatever prompts are computed beside them; "
        "*may not all fit*, the same but for such prompts, whose tokens outside of windows need blocks, too; "
        "*preempts*, all prompts fit, but not what they grow to; *prompts do not fit*, not even all prompts at once, "
        "so that some requests wait. *Measured* is what the server's metrics showed: *preempted*; "
        "*waited for KV*, requests waiting beside a full pool, so that never all ran at once; or *no preemption*, "
        "neither of the two. A cell that was pruned was not measured; its notes say what decides it."
    )
    for grid in envelope_grids(tables):
        doc.heading(2, "{who}", who=identity(grid.sample, grid.name, grid.group.label))
        _pool(doc, grid)
        _grid_table(doc, grid)
        doc.bullets([summary(grid), *_disagreements(grid)])
        _cell_table(doc, grid)
    add_failures(doc, rows, tables)
    return doc


def summary(grid: EnvelopeGrid) -> Phrase:
    """Return in how many measured cells expectation and measurement agree, and why the other measured ones do not
    tell."""
    measured = [cell for cell in grid.cells if cell.point.status == MEASURED]
    judged = [cell for cell in measured if cell.agrees is not None]
    cells = count(f"{grid.name}.cells", len(grid.cells))
    pruned = count(f"{grid.name}.pruned", sum(cell.point.status == PRUNED for cell in grid.cells))
    if not measured:
        return phrase("Of {cells} cells none was measured, so the expected border is not confirmed.", cells=cells)
    if not judged:
        return phrase(
            "Of {cells} cells {measured} were measured and {pruned} pruned, but none confirms the expected border: "
            "{why}.",
            cells=cells,
            measured=count(f"{grid.name}.measured", len(measured)),
            pruned=pruned,
            why=join(_undecided(grid, measured, "of {n} ")),
        )
    agree = phrase(
        "Of {cells} cells {judged} were measured and {pruned} pruned; expected and measured agree on whether "
        "all requests fit in {agree} of those measured.",
        cells=cells,
        judged=count(f"{grid.name}.judged", len(judged)),
        pruned=pruned,
        agree=count(f"{grid.name}.agree", sum(bool(cell.agrees) for cell in judged)),
    )
    more = (phrase("{why}.", why=why) for why in _undecided(grid, measured, "Of {n} more that were measured "))
    return join([agree, *more], " ")


def _undecided(grid: EnvelopeGrid, measured: Sequence[Cell], head: str) -> Iterator[Phrase]:
    """Say why measured cells neither confirm nor refute what was expected of them; `head` holds how many, `{n}`."""
    for reason, cells in Counter(_reason(cell) for cell in measured if cell.agrees is None).items():
        yield phrase(head + UNDECIDED[reason], n=count(f"{grid.name}.{reason}", cells))


def _reason(cell: Cell) -> str:
    if cell.expected is Expected.UNKNOWN:
        return "unknown"
    return "blind" if cell.measured is Outcome.UNKNOWN else "open"


def _pool(doc: Document, grid: EnvelopeGrid) -> None:
    length = plain(f"{grid.name}.max_model_len", grid.sample.max_model_len)
    if grid.pool_blocks is None or grid.sample.engine_block_size is None:
        doc.say("max_model_len {length}. The engine did not tell its blocks: no server ran.", length=length)
        return
    doc.say(
        "max_model_len {length}; the pool has {blocks} blocks of {size} tokens for requests.",
        length=length,
        blocks=count(f"{grid.name}.pool_blocks", grid.pool_blocks),
        size=plain(f"{grid.name}.engine_block_size", grid.sample.engine_block_size),
    )


def _grid_table(doc: Document, grid: EnvelopeGrid) -> None:
    """Measured cells bold; what only arithmetic or other cells say is plain."""
    lengths = sorted({cell.length for cell in grid.cells})
    levels = sorted({cell.concurrency for cell in grid.cells})
    by_place = {(cell.length, cell.concurrency): cell for cell in grid.cells}
    doc.say("Context tokens (rows) at each concurrency (columns). **Bold**: measured; else expected.")
    rows = []
    for length in lengths:
        row: list[str | Part] = [plain(f"{grid.name}.len{length}", length)]
        row += [_word(by_place.get((length, level))) for level in levels]
        rows.append(row)
    header: list[str | Part] = ["tokens", *(plain(f"{grid.name}.c{level}", level) for level in levels)]
    doc.table(header, rows, grid.sample.simulated)


def _word(cell: Cell | None) -> str:
    if cell is None:
        return NOTHING
    return str(cell.expected) if cell.measured is Outcome.UNKNOWN else f"**{cell.measured}**"


def _cell_table(doc: Document, grid: EnvelopeGrid) -> None:
    doc.table(
        [
            "context_tokens", "concurrency", "blocks needed", "of the pool", "expected", "measured", *SIGNS,
            "kv_usage_max", "notes",
        ],
        [
            [
                plain(f"{cell.name}.context_tokens", cell.length),
                plain(f"{cell.name}.concurrency", cell.concurrency),
                count(f"{cell.name}.need_blocks", cell.need_blocks),
                percent(f"{cell.name}.need_pct", cell.need_share, 0),
                str(cell.expected),
                str(cell.measured) if cell.point.status == MEASURED else NOTHING,
                *(count(f"{cell.name}.{n}", getattr(cell.point, n)) for n in SIGNS),
                percent(f"{cell.name}.kv_usage_max_pct", cell.point.kv_usage_max),
                _notes(cell),
            ]
            for cell in grid.cells
        ],
        grid.sample.simulated,
    )  # fmt: skip


def _disagreements(grid: EnvelopeGrid) -> list[Phrase]:
    return [
        phrase(
            "{n} x {length} tokens: expected " + cell.expected + ", measured " + cell.measured + ".",
            n=plain(f"{cell.name}.concurrency", cell.concurrency),
            length=plain(f"{cell.name}.context_tokens", cell.length),
        )
        for cell in grid.cells
        if cell.agrees is False
    ]


def _notes(cell: Cell) -> Phrase:
    if cell.point.status == MEASURED:
        return phrase("" if cell.agrees is not False else "expected and measured disagree")
    if cell.point.status == PRUNED:
        reason: Figure = quote(f"{cell.name}.reason", cell.point.failure_message or "")
        return phrase("pruned: {reason}", reason=reason)
    return join([outcome_figure(cell.point)])
