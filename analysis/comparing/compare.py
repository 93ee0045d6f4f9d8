"""`python -m analysis compare A B …`: every point that the first run and another both hold, side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from analysis.comparing.difference_rows import (
    as_row,
    differing_words,
    load_words,
    missing_rows,
    missing_words,
    tables,
    what_differs,
)
from analysis.comparing.differences import Difference, differences
from analysis.comparing.matching import FAMILIES, Missing, Pair, matched, nothing_in_common
from analysis.comparing.runs import Run, open_runs
from analysis.numbers.intervals import CONFIDENCE, mean_log
from analysis.pages.plots import BLACK, BLUE, GREEN, ORANGE, PURPLE, draw_svg
from analysis.rows.caveats import title
from analysis.rows.series import Series
from analysis.writing.figures import MIB, clean

SHOWN_FIRST = ("concurrency", "batching", "rate", "near_full_context", "envelope", "comparison", "kv_scaling")
"""Of which purpose the plot is: the first that the runs have in common."""
PANELS = {"kv_scaling": {"mem_ready_bytes": "memory when ready (MiB)", "engine_kv_bytes": "KV pool of a GPU (MiB)"}}
LOAD_PANELS = {"tok_s": "tok/s", "p95_e2e_s": "p95 e2e (s)"}
LOOKS = [(colour, mark) for mark in "os^Dv" for colour in (BLUE, ORANGE, GREEN, PURPLE, BLACK)]


@dataclass(frozen=True, slots=True)
class Against:
    """One run held against the first."""

    run: Run
    pairs: list[Pair]
    missing: list[Missing]
    differences: list[Difference]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The first run, and every other one against it."""

    base: Run
    others: list[Against]

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            "runs": [_described(run) for run in (self.base, *(against.run for against in self.others))],
            "confidence": CONFIDENCE,
            "differs": [d for a in self.others for d in what_differs(self.base, a.run, a.pairs)],
            "points": [as_row(d, self.base, a.run) for a in self.others for d in a.differences],
            "missing": [row for a in self.others for row in missing_rows(a.missing, self.base, a.run)],
        }

    def text(self) -> str:
        """Return what the terminal shows: what differs, what is missing, then one table a series of the first run."""
        heads = [differing_words(what_differs(self.base, a.run, a.pairs), self.base, a.run) for a in self.others]
        heads += [line for a in self.others for line in missing_words(a.missing, self.base, a.run)]
        rows = [(d, as_row(d, self.base, a.run)) for a in self.others for d in a.differences]
        notes = (
            "Values are geometric means of the repeats (memory: medians). Differences are from "
            f"{self.base.name}, with the {100 * CONFIDENCE:g} % interval that the noise of the repeats leaves. "
            "Noise between two starts of a server is not in it."
        )
        return "\n\n".join(["\n".join(heads), tables(rows), notes])


def compare(directories: Sequence[Path]) -> Comparison:
    """Hold every run against the first. Raises `AnalysisError` where one cannot be."""
    base, *others = open_runs(directories)
    return Comparison(base, [against(base, run) for run in others])


def against(base: Run, run: Run) -> Against:
    """Hold one run against another. Raises `AnalysisError` where they have no point in common."""
    both = matched(base, run, same_server=False)
    if not both.pairs:
        raise nothing_in_common(base, run, same_server=False)
    return Against(run, both.pairs, both.missing, differences(both.pairs))


def draw(comparison: Comparison, path: Path) -> Path:
    """Write one plot of all runs as SVG, of the first purpose of `SHOWN_FIRST` that they share; return the path."""
    every = [pair for against in comparison.others for pair in against.pairs]
    purpose = next(p for p in SHOWN_FIRST if any(pair.family.purpose == p for pair in every))
    family = next(f for f in FAMILIES if f.purpose == purpose and any(pair.family is f for pair in every))
    lines: dict[tuple[str, str], tuple[str, Series]] = {}
    for against in comparison.others:
        for pair in against.pairs:
            if pair.family is family:
                for run, series in ((comparison.base, pair.base), (against.run, pair.other)):
                    lines[run.name, series.name] = (run.name, series)
    return draw_svg(path, partial(_draw, list(lines.values()), PANELS.get(purpose, LOAD_PANELS), family.axis))


def _draw(lines: Sequence[tuple[str, Series]], panels: dict[str, str], axis: str, figure: Any) -> None:
    figure.set_size_inches(7.2, 6.4)
    several = figure.subplots(len(panels), 1, sharex=True)
    for axes, (column, words) in zip(several, panels.items(), strict=True):
        for number, (run, series) in enumerate(lines):
            _line(axes, f"{run}: {_who(series)}", series, column, LOOKS[number % len(LOOKS)])
        axes.set_ylabel(words)
        axes.set_ylim(bottom=0)
        axes.margins(y=0.15)
    places = sorted({reading.at for _, series in lines for reading in series.measured})
    several[-1].set_xscale("log", base=2)
    several[-1].set_xticks(places, [f"{place:g}" for place in places])
    several[-1].minorticks_off()
    several[-1].set_xlabel(axis)
    figure.legend(*several[0].get_legend_handles_labels(), loc="outside lower center", ncols=1, fontsize=8.5)
    several[0].set_title(lines[0][1].sample.purpose, loc="left")


def _who(series: Series) -> str:
    return f"{title(series.sample, series.group.label)}; {load_words(series.sample)}"


def _line(axes: Any, label: str, series: Series, column: str, look: tuple[str, str]) -> None:
    unit = MIB if column.endswith("_bytes") else 1
    repeats = [(r.at, v / unit) for r in series.measured for v in r.values(column) if v > 0]
    means = {at: [v for x, v in repeats if x == at] for at, _ in repeats}
    xy = [(at, math.exp(mean_log(values))) for at, values in means.items()]
    if not xy:
        return
    axes.plot(*zip(*xy, strict=True), color=look[0], marker=look[1], label=clean(label))
    if len(repeats) > len(xy):
        axes.plot(*zip(*repeats, strict=True), ".", color=look[0], alpha=0.5)


def _described(run: Run) -> dict[str, Any]:
    points = run.tables.points
    return {
        "name": run.name,
        "directory": str(run.directory),
        "simulated": all(point.simulated for point in points),
        "workload_version": run.workload_version,
        "versions": run.versions(points),
    }
