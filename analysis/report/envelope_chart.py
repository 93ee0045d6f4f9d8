"""Chart of an envelope sweep: what KV arithmetic expects of every cell, and on it what was measured."""

from __future__ import annotations

from analysis.memory.envelope_cells import Expected
from analysis.memory.envelope_grid import Cell, EnvelopeGrid
from analysis.memory.kv_envelope import Outcome
from analysis.report.vega import BAD, CROSS, INK, Chart, Key, Rows, Spec, layer, spec, tooltip
from analysis.rows.series import outcome
from contract.rows import MEASURED, PRUNED

EXPECTED = {
    Expected.FITS: "var(--fits)",
    Expected.OPEN: "var(--may-not-fit)",
    Expected.PREEMPTS: "var(--preempts)",
    Expected.WAITS: "var(--too-much)",
    Expected.UNKNOWN: "var(--grid)",
}
MARKS = {
    Outcome.QUIET: ("circle", "●"),
    Outcome.WAITED: ("square", "■"),
    Outcome.PREEMPTED: ("triangle-up", "▲"),
    Outcome.UNKNOWN: ("diamond", "◆"),
}
FAILED = "failed"
ROW_HEIGHT = 22


def envelope_chart(grid: EnvelopeGrid) -> Chart:
    """Return context length against concurrency: a field of the arithmetic a cell, a mark a cell that was measured."""
    cells = [_row(cell) for cell in grid.cells]
    levels = sorted({cell.concurrency for cell in grid.cells}, reverse=True)
    x: Spec = {
        "field": "length",
        "type": "ordinal",
        "title": "context of each request (tokens)",
        "axis": {"format": ",d"},
    }
    x["axis"]["labelAngle"] = 0
    y: Spec = {"field": "level", "type": "ordinal", "title": "requests at once", "sort": levels}
    about = tooltip(
        length="tokens", level="requests at once", expected="by arithmetic", measured="measured", why="why not measured"
    )
    hue: Spec = {"field": "expected", "type": "nominal", "legend": None}
    hue["scale"] = {"domain": [str(one) for one in EXPECTED], "range": list(EXPECTED.values())}
    layers = [layer(cells, {"type": "rect", "stroke": "var(--paper)"}, x=x, y=y, color=hue, tooltip=about)]
    legend = [
        Key("■", colour, f"by arithmetic: {one}") for one, colour in EXPECTED.items() if _any(cells, "expected", one)
    ]
    measured = "simulated" if grid.sample.simulated else "measured"
    for what, (shape, glyph) in MARKS.items():
        own = [row for row in cells if row["status"] == MEASURED and row["measured"] == str(what)]
        if own:
            mark = {"type": "point", "shape": shape, "size": 70, "filled": True, "opacity": 1, "color": INK}
            layers.append(layer(own, mark, x=x, y=y, tooltip=about))
            legend.append(Key(glyph, INK, f"{measured}: {what}"))
    lost = [row for row in cells if row["status"] == FAILED]
    if lost:
        cross = {"type": "point", "shape": CROSS, "size": 110, "strokeWidth": 2, "color": BAD, "filled": False}
        layers.append(layer(lost, cross, x=x, y=y, tooltip=about))
        legend.append(Key("✕", BAD, "no measurement: failed"))
    if any(row["status"] == PRUNED for row in cells):
        legend.append(Key(" ", INK, "without a mark: not measured, because the others or the arithmetic decide it"))
    return Chart("context length against requests at once", spec(layers, ROW_HEIGHT * len(levels)), tuple(legend))


def _row(cell: Cell) -> dict[str, object]:
    status = cell.point.status
    known = cell.point.failure_message if status == PRUNED else None if status == MEASURED else outcome(cell.point)
    return {
        "length": cell.length,
        "level": cell.concurrency,
        "expected": str(cell.expected),
        "measured": str(cell.measured) if status == MEASURED else None,
        "status": status if status in (MEASURED, PRUNED) else FAILED,
        "why": known,
    }


def _any(rows: Rows, column: str, value: object) -> bool:
    return any(row[column] == str(value) for row in rows)
