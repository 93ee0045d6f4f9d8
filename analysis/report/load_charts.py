"""Charts of load levels: throughput and p95 against concurrency or arrival rate, and tok/s per GPU against tok/s per
user."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from analysis.load.checks import keeps_up
from analysis.load.load_curve import LoadCurve
from analysis.load.load_tables import lengths
from analysis.numbers.intervals import CONFIDENCE
from analysis.report.vega import (
    AT_MOST,
    BAD,
    CROSS,
    INK,
    MUTED,
    Chart,
    Key,
    Rows,
    Spec,
    colour,
    key,
    layer,
    number,
    shape,
    spec,
    tooltip,
)
from analysis.rows.caveats import title
from analysis.rows.series import Reading, outcome
from contract.rows import CLIENT_LIMITED

LOST = Key("✕", BAD, "no measurement: failed (at the foot of the chart) or client-limited (where its numbers lie)")
RINGED = Key("◯", INK, "ringed: could be the knee (tok/s), or the last level before p95 outgrows tok/s (p95)")
REPEATS = Key("·", INK, "single repeats; the line joins their medians")
LAGGING = Key("◯", INK, "ringed: the server does not keep up with this rate")
AS_SENT = Key("╌", MUTED, "the same requests, as many as were sent a second")
INTERVALS = Key("▮", MUTED, f"bars: {CONFIDENCE:.0%} interval of the mean")


def comparable(curves: Sequence[LoadCurve]) -> list[list[LoadCurve]]:
    """Return the curves in groups that may share axes: of the same lengths, as many as have colours of their own."""
    by_load: dict[tuple[str, bool], list[LoadCurve]] = {}
    for curve in curves:
        by_load.setdefault((lengths(curve).text, curve.series.sample.gpus > 0), []).append(curve)
    return [same[i : i + AT_MOST] for same in by_load.values() for i in range(0, len(same), AT_MOST)]


def concurrency_charts(curves: Sequence[LoadCurve]) -> list[Chart]:
    """Return tok/s and p95 against concurrency for curves that may share axes; nothing where no level has numbers."""
    if not any(curve.levels or _limited(curve) for curve in curves):
        return []
    known = [
        (RINGED, any(_knees(curve) or _bends(curve) for curve in curves)),
        (REPEATS, any(len(level.measured) > 1 for curve in curves for level in curve.levels)),
        (INTERVALS, any(curve.tok_s_noise is not None for curve in curves)),
        (LOST, bool(_unmeasured(curves, "tok_s"))),
    ]
    legend = (*_legend(curves), *(one for one, there in known if there))
    return [
        Chart("tok/s against concurrency", _against(curves, "tok_s", "output tok/s", CONCURRENCY, _knees), legend),
        Chart(
            "p95 latency against concurrency",
            _against(curves, "p95_e2e_s", "p95 e2e (s)", CONCURRENCY, _bends),
            legend,
        ),
    ]


def rate_charts(curves: Sequence[LoadCurve]) -> list[Chart]:
    """Return p95 of E2EL and TTFT, and requests ended a second, against the arrival rate, for curves that may share
    axes; nothing where no level has numbers."""
    if not any(curve.levels or _limited(curve) for curve in curves):
        return []
    known = [
        (LAGGING, any(_lagging(curve) for curve in curves)),
        (REPEATS, any(len(level.measured) > 1 for curve in curves for level in curve.levels)),
        (INTERVALS, any(curve.tok_s_noise is not None for curve in curves)),
        (LOST, bool(_unmeasured(curves, "p95_e2e_s"))),
    ]
    legend = (*_legend(curves), *(one for one, there in known if there))
    charts = [
        Chart(f"p95 {what} against arrival rate", _against(curves, column, words, RATE, _lagging), legend)
        for column, what, words in (("p95_e2e_s", "latency", "p95 e2e (s)"), ("p95_ttft_s", "TTFT", "p95 TTFT (s)"))
        if _has(curves, column)
    ]
    if _has(curves, "ended_qps"):
        by_series = {"field": "series", "type": "nominal"}
        ended = _against(curves, "ended_qps", "requests ended a second", RATE, _lagging)
        sent = [
            {"series": index, "at": reading.at, "value": reading.median("sent_qps")}
            for index, curve in enumerate(curves)
            for reading in curve.levels
            if reading.values("sent_qps")
        ]
        line = {"type": "line", "color": MUTED, "strokeDash": [5, 4], "strokeWidth": 1}
        axes = ended["layer"][0]["encoding"]
        ended["layer"].append(layer(sent, line, x=axes["x"], y=axes["y"] | {"field": "value"}, detail=by_series))
        charts.append(Chart("requests ended against arrival rate", ended, (*legend, AS_SENT)))
    return charts


def pareto_chart(curves: Sequence[LoadCurve]) -> Chart | None:
    """Return output tok/s per GPU (per server without one) against tok/s per user; None where no level has both."""
    rows = [row for index, curve in enumerate(curves) for row in _trade(index, curve)]
    measured = [row for row in rows if row["measured"]]
    if not measured:
        return None
    per = "GPU" if curves[0].series.sample.gpus else "server"
    x = number("user", "tok/s per user (1 / median TPOT)", scale={"zero": False, "nice": True})
    y = number("gpu", f"output tok/s per {per}", scale={"zero": True})
    about = tooltip(who="", concurrency="concurrency", user="tok/s per user", gpu=f"tok/s per {per}", status="status")
    by_level = {"field": "concurrency", "type": "quantitative"}
    halo = {"type": "point", "filled": True, "color": MUTED, "size": 420, "opacity": 0.3}
    layers = [
        layer(frontier(measured), halo, x=x, y=y),
        layer(measured, {"type": "line", "strokeWidth": 1.5}, x=x, y=y, color=colour(), order=by_level),
        layer(measured, _point(), x=x, y=y, color=colour(), shape=shape(), tooltip=about),
        layer(
            measured, {"type": "text", "dx": 9, "dy": -7, "align": "left", "fontSize": 11, "color": INK}, x=x, y=y,
            text=by_level,
        ),
    ]  # fmt: skip
    lost = [row for row in rows if not row["measured"]]
    legend = [*_legend(curves), Key("⬤", MUTED, "with a halo: no measured level of this chart is better in both")]
    legend.append(Key("#", INK, "numbers are concurrency"))
    if lost:
        layers.append(layer(lost, _cross(), x=x, y=y, tooltip=about))
        legend.append(Key("✕", BAD, "client-limited: no measurement of the server"))
    return Chart(f"tok/s per {per} against tok/s per user", spec(layers, 320), tuple(legend))


def _trade(index: int, curve: LoadCurve) -> Rows:
    """Needs a TPOT, which answers of one token have not; a level that failed has no place in this chart."""
    rows = []
    for reading in curve.series.readings:
        limited = [point for point in reading.unmeasured if point.status == CLIENT_LIMITED]
        for points, measured in ((reading.measured, True), (limited, False)):
            shown = Reading(reading.name, reading.at, tuple(points), ())
            tpot, tok_s = shown.median("p50_tpot_s"), shown.median("tok_s")
            if tpot and tok_s is not None and points:
                rows.append(
                    {
                        "series": index,
                        "who": curve.series.group.label,
                        "concurrency": reading.at,
                        "user": 1 / tpot,
                        "gpu": tok_s / max(points[0].gpus, 1),
                        "status": points[0].status,
                        "measured": measured,
                    }
                )
    return rows


def frontier(rows: Rows) -> Rows:
    """Return tok/s per user and per GPU of the rows that no other beats in both, the fastest for a user first."""
    found: Rows = []
    for row in sorted(rows, key=lambda row: (-row["user"], -row["gpu"])):
        if not found or row["gpu"] > found[-1]["gpu"]:
            found.append({"user": row["user"], "gpu": row["gpu"]})
    return found


@dataclass(frozen=True, slots=True)
class _Axis:
    """What levels are: their axis' title, the same in a tooltip, and how d3 writes them."""

    title: str
    short: str
    format: str


CONCURRENCY = _Axis("concurrency (requests in flight)", "concurrency", ",d")
RATE = _Axis("arrival rate (requests/s)", "requests/s", "~g")
Rings: TypeAlias = Callable[[LoadCurve], Sequence[float]]
"""Which levels of a curve are ringed."""


def _against(curves: Sequence[LoadCurve], column: str, words: str, axis: _Axis, rings: Rings) -> Spec:
    levels = sorted({reading.at for curve in curves for reading in curve.series.readings if reading.at > 0})
    x: Spec = number("at", axis.title)
    x["scale"] = {"type": "log", "base": 2, "domain": [levels[0] / 1.15, levels[-1] * 1.15], "nice": False}
    x["axis"] = {"values": levels, "format": axis.format, "grid": False}
    y = number("value", words, scale={"zero": True})
    about = tooltip(who="", at=axis.short, value=words, low="interval from", high="to", repeats="repeats")
    medians = [row for index, curve in enumerate(curves) for row in _medians(index, curve, column, rings(curve))]
    single = [row for index, curve in enumerate(curves) for row in _repeats(index, curve, column)]
    ringed = [row for row in medians if row["ring"]]
    lost = _unmeasured(curves, column)
    spans = [row for row in medians if row["low"] is not None]
    bar = {"type": "rule", "strokeWidth": 6, "opacity": 0.3}
    layers = [
        layer(spans, bar, x=x, y={**y, "field": "low"}, y2={"field": "high"}, color=colour()),
        layer(medians, {"type": "line", "strokeWidth": 1.8}, x=x, y=y, color=colour()),
        layer(single, {"type": "point", "filled": True, "size": 14, "opacity": 0.7}, x=x, y=y, color=colour()),
        layer(medians, _point(), x=x, y=y, color=colour(), shape=shape(), tooltip=about),
        layer(ringed, {"type": "point", "size": 260, "strokeWidth": 1.8}, x=x, y=y, color=colour()),
        layer(lost, _cross(), x=x, y=y, tooltip=tooltip(who="", at=axis.short, why="not measured")),
    ]
    return spec([one for one in layers if one["data"]["values"]])


def _medians(index: int, curve: LoadCurve, column: str, rings: Sequence[float]) -> Rows:
    rows = []
    for reading in curve.levels:
        if reading.median(column) is None:
            continue
        interval = curve.interval(reading, column)
        rows.append(
            {
                "series": index,
                "who": curve.series.group.label,
                "at": reading.at,
                "value": reading.median(column),
                "low": None if interval is None else interval.low,
                "high": None if interval is None else interval.high,
                "repeats": len(reading.measured),
                "ring": reading.at in rings,
            }
        )
    return rows


def _knees(curve: LoadCurve) -> Sequence[float]:
    return curve.knee.could_be


def _bends(curve: LoadCurve) -> Sequence[float]:
    blow_up = curve.blow_up
    return blow_up.last_before if blow_up is not None and blow_up.seen else ()


def _lagging(curve: LoadCurve) -> Sequence[float]:
    return [reading.at for reading in curve.levels if keeps_up(reading) is False]


def _has(curves: Sequence[LoadCurve], column: str) -> bool:
    return any(reading.values(column) for curve in curves for reading in curve.series.readings)


def _repeats(index: int, curve: LoadCurve, column: str) -> Rows:
    return [
        {"series": index, "at": reading.at, "value": value}
        for reading in curve.levels
        if len(reading.measured) > 1
        for value in reading.values(column)
    ]


def _limited(curve: LoadCurve) -> bool:
    every = [point for reading in curve.series.readings for point in reading.unmeasured]
    return any(point.status == CLIENT_LIMITED and point.tok_s for point in every)


def _unmeasured(curves: Sequence[LoadCurve], column: str) -> Rows:
    """A client-limited level stands where its numbers put it; one without numbers at the foot."""
    return [
        {
            "who": curve.series.group.label,
            "at": reading.at,
            "value": (getattr(point, column) or 0) if point.status == CLIENT_LIMITED else 0,
            "why": outcome(point),
        }
        for curve in curves
        for reading in curve.series.readings
        for point in reading.unmeasured
        if reading.at > 0
    ]


def _legend(curves: Sequence[LoadCurve]) -> tuple[Key, ...]:
    return tuple(key(index, title(curve.series.sample, curve.series.group.label)) for index, curve in enumerate(curves))


def _point() -> Spec:
    return {"type": "point", "filled": True, "size": 60, "opacity": 1}


def _cross() -> Spec:
    return {"type": "point", "shape": CROSS, "size": 110, "strokeWidth": 2, "color": BAD, "filled": False}
