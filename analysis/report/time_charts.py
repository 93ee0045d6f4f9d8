"""Charts over the run's time: samples of cards and of KV pools as bands, and the servers on their cards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from analysis.pages.timeline import PHASES, Bar, bars_of, card_labels, rows_of
from analysis.report.samples import Bands, vertices
from analysis.report.vega import AT_MOST, COLOURS, Chart, Key, Rows, Spec, colour, layer, number, spec, tooltip
from analysis.rows.tables import Tables
from analysis.writing.figures import clean
from contract.rows import RESULT_STATUSES

MOST_BARS = 1_000
"""Servers in the chart: of more, those that lived longest."""
PHASE_COLOURS = {"starting": "var(--starting)", "measuring": "var(--measuring)", "stopping": "var(--stopping)"}


@dataclass(frozen=True, slots=True)
class TimeAxis:
    """The run's time, and what it is counted in."""

    seconds: float
    words: str
    span_s: float

    def axis(self, field: str) -> Spec:
        """Return the axis of time, the same for all charts of the run."""
        scale = {"domain": [0, self.span_s / self.seconds], "nice": False, "zero": False}
        title = f"{self.words} since the first server was started"
        return number(field, title, axis={"grid": False}, scale=scale)


def axis_for(span_s: float) -> TimeAxis:
    """Return an axis on which a span is a number of two or three digits."""
    if span_s > 4 * 3600:
        return TimeAxis(3600.0, "hours", span_s)
    return TimeAxis(60.0, "minutes", span_s) if span_s > 300 else TimeAxis(1.0, "seconds", max(span_s, 1.0))


def band_chart(bands: Bands, what: str, unit: float, time: TimeAxis, top: float | None = None) -> Chart:
    """Return lowest to highest as a band and the mean as a line, a colour a card; `unit` divides the values."""
    rows: Rows = []
    legend = []
    for index, band in enumerate(bands.bands):
        for corner in vertices(band, bands.bin_s, unit):
            series = {"series": index % AT_MOST, "part": f"{index}.{corner['part']}"}
            rows.append({**corner, **series, "at": corner["at"] / time.seconds})
        words = f"all {bands.together} cards together" if bands.together else band.label
        legend.append(Key("■", COLOURS[index % AT_MOST], words))
    x = time.axis("at")
    y = number("low", what, scale={"zero": True} if top is None else {"domain": [0, top]})
    part: Spec = {"field": "part", "type": "nominal"}
    area = {"type": "area", "interpolate": "step-after", "opacity": 0.3, "line": False}
    mean = {"type": "line", "interpolate": "step-after", "strokeWidth": 1.4, "strokeCap": "square"}
    layers = [
        layer(rows, area, x=x, y=y, y2={"field": "high"}, color=colour(), detail=part),
        layer(rows, mean, x=x, y={**y, "field": "mean"}, color=colour(), detail=part),
    ]
    return Chart(f"{what} over time", spec(layers, 180), tuple(legend))


@dataclass(frozen=True, slots=True)
class Gantt:
    """The chart of servers, and how many of them it had no room for."""

    chart: Chart
    left_out: int


def gantt(tables: Tables, time: TimeAxis) -> Gantt | None:
    """Return a bar a server on each of its cards, in its phases; None where no server has a start and an end."""
    _, bars = bars_of(tables)
    shown = sorted(bars, key=lambda bar: bar.start_s - bar.end_s)[:MOST_BARS]
    if not shown:
        return None
    kept = sorted(shown, key=lambda bar: (bar.start_s, bar.session.session_id))
    return Gantt(_gantt_chart(kept, time), len(bars) - len(kept))


def _gantt_chart(bars: Sequence[Bar], time: TimeAxis) -> Chart:
    labels = card_labels(bar.session for bar in bars)
    places, floors = rows_of(bars, list(labels))
    names = _row_names(list(labels.values()), floors)
    phases: Rows = []
    whole: Rows = []
    for bar, row in sorted(places, key=lambda place: place[1]):  # rows of the chart stand in the order of their data
        about = {"row": names[row], "what": bar.words, "session": clean(bar.session.session_id)}
        about["status"] = clean(bar.session.status)
        for phase, (start, length) in bar.phases.items():
            span = {"from": start / time.seconds, "to": (start + length) / time.seconds}
            phases.append({**about, "phase": phase, **span})
        lost = bar.session.status not in RESULT_STATUSES
        whole.append({**about, "from": bar.start_s / time.seconds, "to": bar.end_s / time.seconds, "lost": lost})
    x = time.axis("from")
    y: Spec = {"field": "row", "type": "nominal", "title": None, "sort": None, "scale": {"paddingInner": 0.25}}
    scale = {"domain": list(PHASES), "range": [PHASE_COLOURS[phase] for phase in PHASES]}
    hue = {"field": "phase", "type": "nominal", "scale": scale, "legend": None}
    shown = tooltip(what="server", phase="phase", session="session", status="status", **{"from": "from", "to": "to"})
    ends: Spec = {"x": x, "x2": {"field": "to"}, "y": y}
    layers = [
        layer(phases, {"type": "bar"}, **ends, color=hue, tooltip=shown),
    ]
    lost_bars = [row for row in whole if row["lost"]]
    legend = [Key("■", PHASE_COLOURS[phase], phase) for phase in PHASES]
    if lost_bars:
        outline = {"type": "bar", "filled": False, "stroke": "var(--bad)", "strokeWidth": 2}
        layers.append(layer(lost_bars, outline, **ends))
        legend.append(Key("▢", "var(--bad)", "outlined: failed"))
    width = "scale('x', datum.to) - scale('x', datum.from)"
    words = {
        "type": "text", "align": "left", "dx": 4, "fontSize": 10, "color": "var(--on-bar)",
        "limit": {"expr": f"{width} - 6"}, "opacity": {"expr": f"{width} > 34 ? 1 : 0"},
    }  # fmt: skip
    layers.append(layer(whole, words, x=x, y=y, text={"field": "what"}))
    return Chart("servers on their cards over time", spec(layers, 26 * len(names)), tuple(legend), wide=True)


def _row_names(labels: Sequence[str], floors: Sequence[int]) -> list[str]:
    """Return a name for every row: a card's label, numbered from its second row on."""
    names = []
    for label, first, end in zip(labels, floors, floors[1:], strict=False):
        names += [label if row == first else f"{label} ({row - first + 1})" for row in range(first, end)]
    return names
