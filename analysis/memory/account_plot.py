"""plots/memory_account.svg: what a server's memory is for at each length, stacked, against what its cards said.

What no probe and not torch's allocator tells is drawn as the residual. Weights and pool dwarf the rest, which is drawn
below once more without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from analysis.memory.kv_account import HEADS, Account, Accounts
from analysis.memory.kv_fit import KvResult
from analysis.rows.series import Series
from analysis.writing.figures import GIB

SIZE_INCHES = (7.2, 7.2)
COLOURS = {
    "kv": "#0072B2",
    "weights": "#8A8A8A",
    "graphs": "#CC79A7",
    "buffers": "#F0E442",
    "cache": "#56B4E9",
    "context": "#009E73",
    "libraries": "#B7E1CD",
    "residual": "#E69F00",
}
"""Okabe and Ito's, which stay apart for colour-blind readers."""
HATCHES = {
    "weights": "", "kv": "", "context": "--", "libraries": "++", "residual": "//",
    "graphs": "\\\\", "buffers": "..", "cache": "xx",
}  # fmt: skip
DWARFED = ("context", "libraries", "graphs", "buffers", "cache")
ORDER = ("weights", *DWARFED, "kv")
"""What does not grow stands below what does; the residual, which is what is left, above all."""


def has_account(result: KvResult, accounts: Accounts) -> bool:
    """Return whether any reading of the result has an account when ready."""
    return any(_bars(series, accounts) for series in result.series)


def draw_account(result: KvResult, accounts: Accounts, figure: Any) -> None:
    """Draw two panels a series: one bar a length, its parts when ready, the cards' memory when ready and at peak."""
    drawn = [(series, bars) for series in result.series if (bars := _bars(series, accounts))]
    figure.set_size_inches(SIZE_INCHES)
    whole, rest = figure.subplots(2, len(drawn), sharex="col", sharey="row", squeeze=False)
    for column, (series, bars) in enumerate(drawn):
        _panel(whole[column], bars, ORDER)
        _panel(rest[column], bars, DWARFED)
        rest[column].set_xlabel(f"max_model_len (tokens)\n{_what(series)}")
    whole[0].set_ylabel("memory (GiB)")
    rest[0].set_ylabel("without weights and KV pool (GiB)")
    for axes in (whole[0], rest[0]):
        axes.margins(y=0.08)
    named = {label: handle for axes in whole for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=4, fontsize=8.5)


def _bars(series: Series, accounts: Accounts) -> list[tuple[float, Account, Account | None]]:
    found = [(r.at, accounts.at(r, "ready"), accounts.at(r, "peak")) for r in series.measured]
    return [(at, ready, peak) for at, ready, peak in found if ready is not None]


def _panel(axes: Any, bars: Sequence[tuple[float, Account, Account | None]], parts: Sequence[str]) -> None:
    places = list(range(len(bars)))
    bottom = [0.0] * len(bars)
    for part in (*parts, "residual"):
        heights = [_size(ready, part) / GIB for _, ready, _ in bars]
        if any(heights):
            axes.bar(
                places, heights, 0.62, bottom=bottom, label=HEADS[part], color=COLOURS[part], hatch=HATCHES[part],
                edgecolor="white", linewidth=0.6,
            )  # fmt: skip
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    _marks(axes, [(place, ready) for place, (_, ready, _) in enumerate(bars)], parts, "_", "memory of the cards, ready")
    peaks = [(place, peak) for place, (_, _, peak) in enumerate(bars) if peak is not None]
    _marks(axes, peaks, parts, "^", "at peak")
    axes.set_xticks(places, [str(at) for at, _, _ in bars])
    axes.grid(axis="x", visible=False)


def _size(account: Account, part: str) -> int:
    return account.residual if part == "residual" else account.parts.get(part) or 0


def _marks(axes: Any, accounts: Sequence[tuple[int, Account]], parts: Sequence[str], marker: str, words: str) -> None:
    """Mark what the cards said, less the parts that are not drawn."""
    left = [
        (account.used - sum(value or 0 for part, value in account.parts.items() if part not in parts)) / GIB
        for _, account in accounts
    ]
    axes.plot(
        [place for place, _ in accounts], left, linestyle="none", marker=marker, markersize=26 if marker == "_" else 5,
        markeredgewidth=1.4, color="#222222", label=words, markerfacecolor="none",
    )  # fmt: skip


def _what(series: Series) -> str:
    sample = series.sample
    if sample.mode == "committed":
        return f"pool of {sample.sequences} sequences"
    return f"gpu_memory_utilization {sample.gpu_memory_utilization or 0:g}"
