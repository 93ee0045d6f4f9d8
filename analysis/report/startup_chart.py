"""Waterfall of the servers' starts: where each went, phase after phase, cold and warm."""

from __future__ import annotations

from dataclasses import dataclass

from analysis.pages.startup_plot import COLOURS, bars, end_s, label, told_starts
from analysis.report.vega import INK, Chart, Key, Rows, Spec, layer, number, spec, tooltip
from analysis.rows.tables import Tables

MOST_STARTS = 40
"""Servers in the chart: of more, those whose start took longest."""
ROW_HEIGHT = 22


@dataclass(frozen=True, slots=True)
class Waterfall:
    """The chart of starts, and how many of them it had no room for."""

    chart: Chart
    left_out: int


def waterfall(tables: Tables) -> Waterfall | None:
    """Return a bar a server, in the phases of its start; None where no server's log told them."""
    told = told_starts(tables)
    if not told:
        return None
    longest = sorted(told, key=lambda session: bars(session)[0].begin_s - end_s(session))[:MOST_STARTS]
    shown = [session for session in told if session in longest]
    points = {session.session_id: [p for p in tables.points if p.session_id == session.session_id] for session in shown}
    rows: Rows = []
    ends: Rows = []
    for number_, session in enumerate(shown, 1):
        name = f"{number_}. {label(session, points[session.session_id])}"
        for phase in bars(session):
            span = {"from": phase.begin_s, "to": phase.begin_s + phase.seconds, "seconds": phase.seconds}
            rows.append({"row": name, "phase": phase.name, **span})
        ends.append({"row": name, "from": end_s(session), "words": f"{end_s(session):.1f} s"})
    found = {row["phase"] for row in rows}
    known = {phase: colour for phase, colour in ({**COLOURS, "fork": INK}).items() if phase in found}
    x = number("from", "seconds since the launch, to a tenth", axis={"grid": False}, scale={"zero": True})
    y: Spec = {"field": "row", "type": "nominal", "title": None, "sort": None, "scale": {"paddingInner": 0.25}}
    hue: Spec = {"field": "phase", "type": "nominal", "legend": None}
    hue["scale"] = {"domain": list(known), "range": list(known.values())}
    about = tooltip(row="server", phase="phase", seconds="seconds", **{"from": "from", "to": "to"})
    bar = {"type": "bar", "stroke": "var(--muted)", "strokeWidth": 0.5}
    text = {"type": "text", "align": "left", "dx": 4, "fontSize": 10, "color": INK}
    layers = [
        layer(rows, bar, x=x, x2={"field": "to"}, y=y, color=hue, tooltip=about),
        layer(ends, text, x=x, y=y, text={"field": "words", "type": "nominal"}),
    ]
    legend = tuple(Key("■", colour, phase) for phase, colour in known.items())
    chart = Chart("where the start of each server went", spec(layers, ROW_HEIGHT * len(shown)), legend, wide=True)
    return Waterfall(chart, len(told) - len(shown))
