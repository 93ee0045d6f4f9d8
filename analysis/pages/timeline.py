"""plots/timeline.svg: what ran on which card and when, and how busy the cards were while points were measured.

Called by `artifacts.reduce`. Wall clocks place the bars: between nodes they are as true as the nodes' clocks.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import groupby, pairwise, zip_longest
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from analysis.pages.plots import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, draw_all, set_title
from analysis.rows.batches import read_batches, totals_of
from analysis.rows.cards import short_names
from analysis.rows.caveats import marks, title
from analysis.rows.tables import RunPoint, Tables, moment
from analysis.writing.figures import clean
from contract.rows import MEASURED, RESULT_STATUSES, SessionRow

PHASES = {"starting": (GREY, "////"), "measuring": (BLUE, ""), "stopping": (ORANGE, "xxxx")}
LINES = [(colour, dash) for dash in ("-", "--", ":", "-.") for colour in (GREEN, PURPLE, BLACK, "#E69F00", "#56B4E9")]
BINS = 600
"""Utilisation is averaged over this part of the time axis: a line needs no more vertices than the plot has points."""
SAMPLE_S = 0.1
"""How often a card is sampled; a bin is no shorter."""

Card: TypeAlias = tuple[str, str]
"""Node and device id."""
Line: TypeAlias = list[tuple[float, float]]
Sample: TypeAlias = tuple[str, str, str, float, float]
"""Session, point, device, seconds since the point's start, utilisation in %."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One server's life, in seconds since the first server was started."""

    session: SessionRow
    start_s: float
    end_s: float
    words: str

    @property
    def phases(self) -> dict[str, tuple[float, float]]:
        """Start and length of each phase; together they are the bar. A server that never was ready only started."""
        whole = self.end_s - self.start_s
        stop = min(self.session.memory_back_s or self.session.stop_s or 0.0, whole)
        ready = min(math.inf if self.session.ready_s is None else self.session.ready_s, whole - stop)
        measuring = (self.start_s + ready, whole - stop - ready)
        return {"starting": (self.start_s, ready), "measuring": measuring, "stopping": (self.end_s - stop, stop)}


def bars_of(tables: Tables) -> tuple[float, list[Bar]]:
    """Return the first start (since the epoch) and a bar for every session that has a start and an end, in order."""
    spans = [(session, moment(session.started_at), moment(session.ended_at)) for session in tables.sessions]
    known = [(session, start, end) for session, start, end in spans if start is not None and end is not None]
    origin = min((start for _, start, _ in known), default=0.0)
    points: dict[str, list[RunPoint]] = {}
    for point in tables.points:
        points.setdefault(point.session_id, []).append(point)
    bars = [
        Bar(
            session,
            start - origin,
            max(start, end) - origin,
            session_words(session, points.get(session.session_id, [])),
        )
        for session, start, end in known
    ]
    return origin, sorted(bars, key=lambda bar: (bar.start_s, bar.session.session_id))


def session_words(session: SessionRow, points: Sequence[RunPoint]) -> str:
    """Return what a session was for, in a word or two."""
    if session.status != MEASURED:
        return clean(session.status)
    if any(point.kind == "load" for point in points):
        return "load"
    return clean(f"{points[0].max_model_len}, {points[0].mode}") if points else ""


def lanes(spans: Sequence[tuple[float, float]]) -> list[int]:
    """Return a lane for each span so that no two in a lane overlap, in as few lanes as that takes."""
    busy: list[tuple[float, int]] = []
    chosen = [0] * len(spans)
    for number in sorted(range(len(spans)), key=lambda i: spans[i]):
        start, end = spans[number]
        chosen[number] = heapq.heappop(busy)[1] if busy and busy[0][0] <= start else len(busy)
        heapq.heappush(busy, (end, chosen[number]))
    return chosen


def cards_of(session: SessionRow) -> list[Card]:
    """Return the cards that the session held; `no card` for one that failed before it had any."""
    return [(session.node or "", device) for device in session.device_ids or ["no card"]]


def card_labels(sessions: Iterable[SessionRow]) -> dict[Card, str]:
    """Return `GPU 0 (1160ada8)` for each card, in the order of the rows; its node before it where there are several.

    The number is the one CUDA_VISIBLE_DEVICES had, as in the log of the run. A card that had none there gets none:
    `GPU 1160ada8`.
    """
    numbers: dict[Card, str] = {}
    for session in sessions:
        cards = cards_of(session)
        for card, name in zip_longest(cards, (session.visible_devices or [])[: len(cards)]):
            numbers[card] = name if name and name.isdecimal() else numbers.get(card, "")
    several = len({node for node, _ in numbers if node}) > 1
    labels = {}
    for _, of_node in groupby(sorted(numbers), key=lambda card: card[0]):
        cards = sorted(of_node, key=lambda card: (int(numbers[card] or 0), card))
        names = short_names(device for _, device in cards)
        for card in cards:
            kind, _, uuid = (name := names[card[1]]).partition(" ")
            label = f"{kind} {numbers[card]} ({uuid})" if numbers[card] and uuid else name
            labels[card] = clean(f"{card[0]} {label}" if several else label)
    return labels


def bin_seconds(bars: Sequence[Bar]) -> float:
    """Return the seconds over which utilisation is averaged, for a picture of all the bars."""
    return max(_span(bars) / BINS, SAMPLE_S)


def _span(bars: Sequence[Bar]) -> float:
    return max(1.0, max((bar.end_s for bar in bars), default=0.0))


def read_utilization(run_dir: Path, bin_s: float = SAMPLE_S) -> list[Sample]:
    """Return telemetry.parquet (which may be missing) as one sample a card and bin of a point: the mean of the bin."""
    path = run_dir / "telemetry.parquet"
    if not path.is_file():
        return []
    ids, values = ["session_id", "point_id", "device_id"], ["t_s", "utilization_pct"]
    schema = pa.schema([*((name, pa.string()) for name in ids), *((name, pa.float64()) for name in values)])
    batches = (_with_bins(batch.drop_null(), bin_s) for batch in read_batches(path, schema))
    asked = [("t_s", "sum"), ("utilization_pct", "sum"), ("t_s", "count")]
    found = totals_of(batches, [*ids, "bin"], asked)
    return [(*key[:3], t_s / number, percent / number) for key, (t_s, percent, number) in sorted(found.items())]


def _with_bins(samples: pa.Table, bin_s: float) -> pa.Table:
    finite = samples.filter(
        pc.and_(pc.is_finite(samples.column("t_s")), pc.is_finite(samples.column("utilization_pct")))
    )
    bins = pc.floor(pc.divide(finite.column("t_s"), bin_s))
    return finite.append_column("bin", bins)


def utilization_lines(
    samples: Iterable[Sample], points: Iterable[RunPoint], origin: float, bin_s: float
) -> dict[Card, Line]:
    """Return each card's utilisation (mean of each bin) over seconds since `origin`, broken by NaN between points."""
    known = {(p.session_id, p.point_id): (p.node or "", moment(p.started_at)) for p in points}
    bins: dict[Card, dict[tuple[float, str, int], Line]] = {}
    for session_id, point_id, device_id, t_s, percent in samples:
        node, start = known.get((session_id, point_id), ("", None))
        if start is not None:
            of_card = bins.setdefault((node, device_id), {})
            of_card.setdefault((start, point_id, int(t_s // bin_s)), []).append((start - origin + t_s, percent))
    lines: dict[Card, Line] = {}
    for card, of_card in bins.items():
        for _, keys in groupby(sorted(of_card), key=lambda key: key[:2]):
            lines.setdefault(card, []).extend(_mean(of_card[key]) for key in keys)
            lines[card].append((math.nan, math.nan))
    return lines


def _mean(some: Line) -> tuple[float, float]:
    return sum(x for x, _ in some) / len(some), sum(y for _, y in some) / len(some)


def write_timeline(run_dir: Path, tables: Tables, samples: Sequence[Sample]) -> list[Path]:
    """Write plots/timeline.svg unless no session has a start and an end; return the paths."""
    origin, bars = bars_of(tables)
    return draw_all(run_dir, [("timeline", partial(_draw, bars, origin, tables, samples))]) if bars else []


def _draw(bars: Sequence[Bar], origin: float, tables: Tables, samples: Sequence[Sample], figure: Any) -> None:
    labels = card_labels(bar.session for bar in bars)
    bin_s = bin_seconds(bars)
    found = utilization_lines(samples, tables.points, origin, bin_s)
    lines = {label: found[card] for card, label in labels.items() if card in found}
    columns = max(1, 110 // (8 + max(map(len, labels.values()))))
    places, floors = rows_of(bars, list(labels))
    heights = [0.3 * floors[-1] + 0.1, *([1.7] if lines else [])]
    figure.set_size_inches(9.6, sum(heights) + 1.3 + (0.3 + 0.17 * math.ceil(len(lines) / columns) if lines else 0))
    panels = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    _chart(panels[0], places)
    panels[0].set_yticks([(low + high - 1) / 2 for low, high in pairwise(floors)], labels.values(), fontsize=9)
    panels[0].set_ylim(floors[-1] - 0.5, -0.5)
    for floor in floors[1:-1]:
        panels[0].axhline(floor - 0.5, color="#E3E3E3", linewidth=0.8)
    if lines:
        _utilization(panels[1], lines, columns)
        panels[1].set_ylabel(f"GPU utilisation (%),\nmean of {bin_s:.2g} s, read only\nwhile a point is measured")
    first = datetime.fromtimestamp(origin, UTC)
    panels[-1].set_xlim(0, _span(bars))
    panels[-1].set_xlabel(f"seconds since the first server was started ({first:%Y-%m-%d %H:%M:%S} UTC)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    set_title(figure, "What ran when", subtitle(tables))
    _fit_words(figure, panels[0], places)


def rows_of(bars: Sequence[Bar], cards: Sequence[Card]) -> tuple[list[tuple[Bar, int]], list[int]]:
    """Return a row for each bar of each card, and the row at which each card begins (and the last one ends)."""
    places: list[tuple[Bar, int]] = []
    floors = [0]
    for card in cards:
        here = [bar for bar in bars if card in cards_of(bar.session)]
        rows = lanes([(bar.start_s, bar.end_s) for bar in here])
        places += [(bar, floors[-1] + row) for bar, row in zip(here, rows, strict=True)]
        floors.append(floors[-1] + max(rows) + 1)
    return places, floors


def _chart(axes: Any, places: Sequence[tuple[Bar, int]]) -> None:
    for phase, (colour, hatch) in PHASES.items():
        spans = [(row, *bar.phases[phase]) for bar, row in places]
        _bars(axes, spans, label=phase, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
    lost = [(bar, row) for bar, row in places if bar.session.status not in RESULT_STATUSES]
    if lost:
        spans = [(row, bar.start_s, bar.end_s - bar.start_s) for bar, row in lost]
        _bars(axes, spans, label="failed (outlined)", facecolor="none", edgecolor=BLACK, linewidth=1.6)
    axes.grid(axis="y", visible=False)


def _bars(axes: Any, spans: Sequence[tuple[int, float, float]], **look: Any) -> None:
    rows, starts, lengths = zip(*spans, strict=True)
    axes.barh(rows, lengths, 0.8, starts, **look)


def _fit_words(figure: Any, axes: Any, places: Sequence[tuple[Bar, int]]) -> None:
    """Write into each bar what it is: in full, or up to the comma, or not at all where neither fits."""
    figure.draw_without_rendering()  # only now is known how wide a second is
    points_per_second = axes.transData.transform((1, 0))[0] - axes.transData.transform((0, 0))[0]
    look = {"fontsize": 8, "bbox": {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.2}}
    for bar, row in places:
        text = axes.text((bar.start_s + bar.end_s) / 2, row, "", ha="center", va="center", **look)
        text.set_in_layout(False)
        for words in (bar.words, bar.words.partition(",")[0], ""):
            text.set_text(words)
            if text.get_window_extent().width + 6 <= points_per_second * (bar.end_s - bar.start_s):
                break
        if not text.get_text():
            text.remove()


def _utilization(axes: Any, lines: dict[str, Line], columns: int) -> None:
    look = {"linewidth": 1.1, "marker": ".", "markersize": 3, "clip_on": False}
    for number, (label, line) in enumerate(lines.items()):
        colour, dash = LINES[number % len(LINES)]
        axes.plot(*zip(*line, strict=True), dash, color=colour, label=label, **look)
    axes.set_ylim(0, 100)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, fontsize=8, borderaxespad=0.2)


def subtitle(tables: Tables) -> str:
    """Return the title of the point with the most marks, standing for all models and cards of the run."""
    if not tables.points:
        return "no point has a row" + (", simulated" if any(s.simulated for s in tables.sessions) else "")
    models = {point.model for point in tables.points}
    names = sorted({point.device_name for point in tables.points if point.device_name})
    point = replace(max(tables.points, key=lambda p: len(marks(p))), gpus=1, device_name=", ".join(names) or None)
    return title(point, point.model if len(models) == 1 else f"{len(models)} models")
