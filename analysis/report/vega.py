"""What all charts of the report have in common: Vega-Lite's language, the page's colours, legends as text.

Colours are the page's CSS variables, so that one chart serves light, dark and paper. Words of a run are only ever data;
nothing of them is written into an expression or a field's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from analysis.writing.document import Block

Spec: TypeAlias = dict[str, Any]
Rows: TypeAlias = list[dict[str, Any]]

COLOURS = tuple(f"var(--series-{number})" for number in range(1, 9))
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right", "triangle-left")
GLYPHS = ("●", "■", "▲", "◆", "▼", "✚", "▶", "◀")
"""The same shapes as text, for legends."""
HOLLOW = ("○", "□", "△", "◇", "▽", "✛", "▷", "◁")
AT_MOST = len(COLOURS)
"""Series in one chart: more get a further chart."""
CROSS = "M-.5,-.5L.5,.5M.5,-.5L-.5,.5"
INK, MUTED, BAD = "var(--ink)", "var(--muted)", "var(--bad)"
_FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
_CONFIG: Spec = {
    "background": None,
    "font": _FONT,
    "view": {"stroke": None},
    "axis": {
        "domainColor": MUTED,
        "gridColor": "var(--grid)",
        "tickColor": MUTED,
        "labelColor": INK,
        "titleColor": INK,
        "labelFontSize": 11,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "labelOverlap": True,
        "labelLimit": 150,
        "tickCount": 7,
    },
}


@dataclass(frozen=True, slots=True)
class Key:
    """One line of a legend: a glyph in a colour, and what it stands for, as words of a run."""

    glyph: str
    colour: str
    words: str


@dataclass(frozen=True, slots=True)
class Chart(Block):
    """One chart of the page. `spec` is Vega-Lite with its data in it."""

    what: str
    """For those who cannot see it."""
    spec: Spec
    legend: tuple[Key, ...] = ()
    wide: bool = False
    """Alone in its row on a wide screen."""


def spec(layers: Sequence[Spec], height: int = 260) -> Spec:
    """Return layers as one chart as wide as its place and so many pixels high, axes not counted."""
    layout = {"width": "container", "height": height, "autosize": {"type": "fit-x", "contains": "padding"}}
    return {**layout, "config": _CONFIG, "layer": list(layers)}


def layer(rows: Rows, mark: Spec, **encoding: Any) -> Spec:
    """Return one layer with its rows."""
    return {"data": {"values": rows}, "mark": mark, "encoding": encoding}


def colour(field: str = "series") -> Spec:
    """Return the colour of a series by its number."""
    scale = {"domain": list(range(AT_MOST)), "range": list(COLOURS)}
    return {"field": field, "type": "nominal", "scale": scale, "legend": None}


def shape(field: str = "series") -> Spec:
    """Return the shape of a series by its number."""
    scale = {"domain": list(range(AT_MOST)), "range": list(SHAPES)}
    return {"field": field, "type": "nominal", "scale": scale, "legend": None}


def number(field: str, title: str, **more: Any) -> Spec:
    """Return a quantitative axis."""
    return {"field": field, "type": "quantitative", "title": title, **more}


def tooltip(**fields: str) -> list[Spec]:
    """Return what is shown of a datum under the pointer: field → title."""
    return [{"field": field, "title": title} for field, title in fields.items()]


def key(index: int, words: str) -> Key:
    """Return the legend's line of a series."""
    return Key(GLYPHS[index % AT_MOST], COLOURS[index % AT_MOST], words)
