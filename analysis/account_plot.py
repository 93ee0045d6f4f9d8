"""plots/memory_account.svg: what a server's memory is for at each length, stacked, against what its cards said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from analysis.figures import GIB
from analysis.kv_account import HEADS, Account, Accounts
from analysis.kv_fit import KvResult
from analysis.series import Series

COLOURS = {
    "kv": "#0072B2",
    "weights": "#8A8A8A",
    "graphs": "#CC79A7",
    "buffers": "#F0E442",
    "cache": "#56B4E9",
    "context": "#009E73",
    "outside": "#E69F00",
}
"""Okabe and Ito's, which stay apart for colour-blind readers."""
HATCHES = {"weights": "", "kv": "", "context": "--", "outside": "//", "graphs": "\\\\", "buffers": "..", "cache": "xx"}
ORDER = ("weights", "context", "outside", "graphs", "buffers", "cache", "kv")
"""What does not grow stands below what does."""


def has_account(result: KvResult, accounts: Accounts) -> bool:
    """Return whether any reading of the result has an account when ready."""
    return any(_bars(series, accounts) for series in _series(result))


def draw_account(result: KvResult, accounts: Accounts, figure: Any) -> None:
    """Draw a panel a series: one bar a length, its parts when ready, the cards' memory when ready and at peak."""
    drawn = [series for series in _series(result) if _bars(series, accounts)]
    panels = figure.subplots(1, len(drawn), sharey=True, squeeze=False)[0]
    for axes, series in zip(panels, drawn, strict=True):
        _panel(axes, series, accounts)
    panels[0].set_ylabel("memory (GiB)")
    panels[0].margins(y=0.08)
    named = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=4, fontsize=8.5)


def _series(result: KvResult) -> list[Series]:
    return [committed.series for committed in result.committed] + list(result.capacity)


def _bars(series: Series, accounts: Accounts) -> list[tuple[float, Account, Account | None]]:
    found = [(r.at, accounts.at(r, "ready"), accounts.at(r, "peak")) for r in series.measured]
    return [(at, ready, peak) for at, ready, peak in found if ready is not None]


def _panel(axes: Any, series: Series, accounts: Accounts) -> None:
    bars = _bars(series, accounts)
    places = list(range(len(bars)))
    bottom = [0.0] * len(bars)
    for part in ORDER:
        heights = [(ready.parts[part] or 0) / GIB for _, ready, _ in bars]
        if any(heights):
            axes.bar(
                places, heights, 0.62, bottom=bottom, label=HEADS[part], color=COLOURS[part], hatch=HATCHES[part],
                edgecolor="white", linewidth=0.6,
            )  # fmt: skip
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    _marks(axes, places, [ready for _, ready, _ in bars], "_", "memory of the cards, ready")
    peaks = [(place, peak) for place, (_, _, peak) in zip(places, bars, strict=True) if peak is not None]
    _marks(axes, [place for place, _ in peaks], [peak for _, peak in peaks], "^", "at peak")
    axes.set_xticks(places, [str(at) for at, _, _ in bars])
    axes.set_xlabel(f"max_model_len (tokens)\n{_what(series)}")
    axes.grid(axis="x", visible=False)


def _marks(axes: Any, places: Sequence[int], accounts: Sequence[Account], marker: str, words: str) -> None:
    size = 26 if marker == "_" else 5
    axes.plot(
        places, [account.used / GIB for account in accounts], linestyle="none", marker=marker, markersize=size,
        markeredgewidth=1.4, color="#222222", label=words, markerfacecolor="none",
    )  # fmt: skip


def _what(series: Series) -> str:
    sample = series.sample
    if sample.mode == "committed":
        return f"pool of {sample.sequences} sequences"
    return f"gpu_memory_utilization {sample.gpu_memory_utilization or 0:g}"
