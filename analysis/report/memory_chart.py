"""Chart of memory against max_model_len: pools sized to the length, the formula, pools at a fixed utilization."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from analysis.memory.kv_fit import Committed, KvResult
from analysis.report.vega import (
    BAD,
    COLOURS,
    CROSS,
    GLYPHS,
    HOLLOW,
    INK,
    SHAPES,
    Chart,
    Key,
    Rows,
    Spec,
    layer,
    number,
    spec,
    tooltip,
)
from analysis.rows.series import Reading, outcome
from analysis.writing.figures import GIB


@dataclass(frozen=True, slots=True)
class _Line:
    words: str
    points: list[tuple[float, float]]
    """Length, bytes."""
    dashed: bool = False
    hollow: bool = False
    """What lies on top of another line lets it be seen."""


def memory_chart(result: KvResult) -> Chart | None:
    """Return the chart of one model on one kind of card; None where no length was measured."""
    lines = [line for line in _lines(result) if line.points]
    lost = _lost(result)
    if not lines:
        return None
    x = number("at", "max_model_len (tokens)", scale={"zero": True}, axis={"format": ",d", "grid": False})
    y = number("gib", "memory (GiB)", scale={"zero": True})
    about = tooltip(who="", at="max_model_len", gib="GiB")
    layers, legend = [], []
    for index, line in enumerate(lines):
        glyphs = HOLLOW if line.hollow else GLYPHS
        hue = INK if line.dashed else COLOURS[index % len(COLOURS)]
        rows: Rows = [{"who": line.words, "at": at, "gib": size / GIB} for at, size in line.points]
        stroke = {"type": "line", "color": hue, "strokeWidth": 1.5, **({"strokeDash": [5, 4]} if line.dashed else {})}
        layers.append(layer(rows, stroke, x=x, y=y))
        if not line.dashed:
            layers.append(layer(rows, _mark(index, hue, line.hollow), x=x, y=y, tooltip=about))
        legend.append(Key("╌" if line.dashed else glyphs[index % len(SHAPES)], hue, line.words))
    if lost:
        mark = {"type": "point", "shape": CROSS, "size": 110, "strokeWidth": 2, "color": BAD, "filled": False}
        layers.append(layer(lost, mark, x=x, y=y, tooltip=tooltip(who="", at="max_model_len", why="not measured")))
        legend.append(Key("✕", BAD, "not measured (at the foot of the chart)"))
    return Chart("memory against max_model_len", spec(layers), tuple(legend))


def _mark(index: int, hue: str, hollow: bool) -> Spec:
    look = {"filled": False, "size": 150} if hollow else {"filled": True, "size": 50}
    return {"type": "point", "shape": SHAPES[index % len(SHAPES)], "color": hue, "opacity": 1, **look}


def _lines(result: KvResult) -> Iterator[_Line]:
    for committed in result.committed:
        who = "committed" if committed.sequences is None else f"pool of {committed.sequences:,} sequences"
        for column, word in (("mem_ready_bytes", "ready"), ("mem_loaded_bytes", "loaded")):
            points = _points(committed.series.measured, column)
            yield _Line(f"{who}, {word}", points, hollow=word == "loaded")
        yield _Line(f"{who}: by the formula, from the shortest length on", _formula(committed), dashed=True)
    for series in result.capacity:
        who = f"gpu_memory_utilization {series.sample.gpu_memory_utilization or 0:g}"
        yield _Line(f"{who}, ready", _points(series.measured, "mem_ready_bytes"))


def _points(readings: tuple[Reading, ...], column: str) -> list[tuple[float, float]]:
    return [(reading.at, value) for reading in readings if (value := reading.median(column)) is not None]


def _formula(committed: Committed) -> list[tuple[float, float]]:
    """Return the memory of the shortest length, and what the formula adds to it at the others."""
    ready = dict(_points(committed.series.measured, "mem_ready_bytes"))
    needs = dict(_points(committed.series.measured, "formula_bytes_per_sequence"))
    first = min(ready, default=None)
    if first is None or first not in needs or not committed.sequences or len(needs) < 2:
        return []
    return [(at, ready[first] + committed.sequences * (need - needs[first])) for at, need in sorted(needs.items())]


def _lost(result: KvResult) -> Rows:
    return [
        {"who": series.group.label, "at": reading.at, "gib": 0, "why": outcome(point)}
        for series in result.series
        for reading in series.readings
        for point in reading.unmeasured
    ]
