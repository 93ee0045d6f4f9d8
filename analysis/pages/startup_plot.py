"""plots/startup.svg: where the start of each server went, phase after phase, cold and warm, and what went before it.

Called by `artifacts.reduce`. A server whose log did not tell phases has no row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from analysis.pages.plots import draw_all, set_title
from analysis.pages.timeline import session_words, subtitle
from analysis.rows.tables import RunPoint, Tables
from analysis.writing.figures import clean
from contract.rows import SessionRow, StartPhase

WAIT, LOST = "wait for the import", "lost fork"
COLOURS = {
    WAIT: "#DDDDDD",
    LOST: "#AA4499",
    "fork": "#000000",
    "imports": "#8A8A8A",
    "arguments": "#F0E442",
    "engine": "#CC79A7",
    "worker": "#E69F00",
    "weights": "#0072B2",
    "compile": "#D55E00",
    "profile": "#56B4E9",
    "kv": "#009E73",
    "graphs": "#882255",
    "warm-up": "#332288",
    "listening": "#BBBBBB",
}
"""Phases in their order. Okabe and Ito's colours, which stay apart for colour-blind readers, and six more."""
HATCHES = {LOST: "++", "engine": "//", "compile": "xx", "graphs": "\\\\", "kv": ".."}

SHOWN_S = 0.05
"""Phases are told to a tenth: a shorter wait is none."""


def write_startup(run_dir: Path, tables: Tables) -> list[Path]:
    """Write plots/startup.svg unless no session has phases; return the paths."""
    told = told_starts(tables)
    return draw_all(run_dir, [("startup", partial(_draw, told, tables))]) if told else []


def told_starts(tables: Tables) -> list[SessionRow]:
    """Return the sessions whose phases are known, in the order of their starts."""
    told = (session for session in tables.sessions if session.phases)
    return sorted(told, key=lambda row: (row.started_at, row.session_id))


def bars(session: SessionRow) -> list[StartPhase]:
    """Return the phases of a start, and what the session had waited and lost before its launch, which is at 0."""
    lost_s = session.fork_lost_s or 0.0
    before = [(WAIT, session.warm_wait_s or 0.0, lost_s), (LOST, lost_s, 0.0)]
    shown = [StartPhase(name, -after_s - seconds, seconds) for name, seconds, after_s in before if seconds >= SHOWN_S]
    return [*shown, *session.phases]


def end_s(session: SessionRow) -> float:
    """Return when the last phase of a start ended, in seconds since its launch."""
    return session.phases[-1].begin_s + session.phases[-1].seconds


def _draw(sessions: Sequence[SessionRow], tables: Tables, figure: Any) -> None:
    figure.set_size_inches(9.6, 1.7 + 0.32 * len(sessions))
    axes = figure.subplots()
    for name, colour in COLOURS.items():
        spans = [(row, p.begin_s, p.seconds) for row, s in enumerate(sessions) for p in bars(s) if p.name == name]
        if spans:
            rows, begins, lengths = zip(*spans, strict=True)
            axes.barh(
                rows, lengths, 0.74, begins, label=name, color=colour, hatch=HATCHES.get(name, ""), edgecolor="white",
                linewidth=0,
            )  # fmt: skip
    for row, session in enumerate(sessions):
        end = end_s(session)
        axes.annotate(f"{end:.1f} s", (end, row), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
    points: dict[str, list[RunPoint]] = {}
    for point in tables.points:
        points.setdefault(point.session_id, []).append(point)
    axes.set_yticks(range(len(sessions)), [label(s, points.get(s.session_id, [])) for s in sessions], fontsize=9)
    axes.set_ylim(len(sessions) - 0.5, -0.5)
    axes.margins(x=0.08)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("seconds since the launch, to a tenth")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8.5)
    set_title(figure, "Where the start of each server went", subtitle(tables))


def label(session: SessionRow, points: Sequence[RunPoint]) -> str:
    """Return what a server was for and how it was started, in a few words."""
    return clean(", ".join(filter(None, (session_words(session, points), session.start))))
