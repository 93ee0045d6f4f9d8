"""plots/kv_envelope.svg: context length against requests at once.

Regions and contours are arithmetic, marks are levels of load that were measured. Both end where the model does.
"""

from __future__ import annotations

import math
from typing import Any

from analysis.memory.kv_envelope import HEADROOM, Envelope, Fit, Outcome
from analysis.memory.kv_envelope_table import LEVELS, in_mib
from analysis.rows.targets import Targets
from analysis.writing.figures import GIB, MIB

REGIONS = {Fit.FITS: "#D3E6F3", Fit.TIGHT: "#FBE3A6", Fit.PREEMPTS: "#F4CDBB", Fit.NEVER: "#DDDDDD"}
LOWEST = 0.8
"""Lower end of the axis of requests."""
CONTOURS = (0.1, 0.25, 0.5)
"""Shares of the pool drawn as thin lines below the border."""
MARKS: dict[Outcome, dict[str, Any]] = {
    Outcome.QUIET: {"marker": "o", "markerfacecolor": "white", "color": "#0072B2"},
    Outcome.WAITED: {"marker": "s", "markerfacecolor": "#E69F00", "color": "#222222"},
    Outcome.PREEMPTED: {"marker": "X", "markerfacecolor": "#D55E00", "color": "#222222", "markersize": 10},
    Outcome.UNKNOWN: {"marker": "D", "markerfacecolor": "none", "color": "#8A8A8A"},
}
LENGTHS = 160
"""Of the axis at which the border is computed."""


def draw_envelope(envelope: Envelope, targets: Targets, figure: Any) -> None:
    """Draw the regions of the arithmetic, contours of its need, the measured levels and the target."""
    axes = figure.add_subplot()
    every = _lengths(envelope, targets)
    limit = envelope.pages.limit if envelope.pages else None
    at = [tokens for tokens in every if limit is None or tokens <= limit]
    whole = [envelope.most(tokens) for tokens in at]
    top = _top(envelope, targets, whole)
    _regions(axes, envelope, at, top)
    _contours(axes, envelope, at, top)
    if at != every:
        look = {"facecolor": "white", "edgecolor": "#D0D0D0", "hatch": "///", "linewidth": 0}
        axes.axvspan(at[-1], every[-1], **look, label="longer than the model takes")
    _marks(axes, envelope, targets)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlim(every[0], every[-1])
    axes.set_ylim(LOWEST, top)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_xlabel("context held by each request (tokens, prompt and answer)")
    axes.set_ylabel("requests at once")
    axes.grid(visible=False)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8.5)


def size_words(envelope: Envelope) -> str:
    """Return the size of the pool for a title."""
    return f"{envelope.size_bytes / MIB:,.0f} MiB" if in_mib(envelope) else f"{envelope.size_bytes / GIB:,.2f} GiB"


def _lengths(envelope: Envelope, targets: Targets) -> list[int]:
    """Return lengths of the axis, close together on a log scale: a little past all that are known or asked for.

    Both sides of every step are among them where the steps are few enough to be seen, and the model's own limit.
    """
    known = [*dict(envelope.known), *(level.tokens for level in envelope.levels)]
    known += [targets.context_tokens] if targets.context_tokens else []
    limit = envelope.pages.limit if envelope.pages else None
    low, high = math.log2(0.8 * min(known)), math.log2(1.25 * max(known))
    found = {max(1, round(2 ** (low + (high - low) * i / LENGTHS))) for i in range(LENGTHS + 1)}
    block = envelope.pages.layout.block_size if envelope.pages else max(found)
    ends = range(block, max(found), block)
    if len(ends) <= LENGTHS:
        found |= {end + side for end in ends for side in (0, 1) if min(found) < end}
    if limit is not None and min(found) < limit < max(found):
        found.add(limit)
    return sorted(found)


def _top(envelope: Envelope, targets: Targets, whole: list[float]) -> float:
    """Return the upper end of the axis: past every mark and, where that is near, past the border at the longest."""
    shown = [*LEVELS, *(level.at_once for level in envelope.levels), targets.concurrency or 1]
    return 2.0 * max([*shown, min(4 * max(shown), whole[-1])])


def _regions(axes: Any, envelope: Envelope, at: list[int], top: float) -> None:
    """Below and above the border; where not one sequence fits, the whole height."""
    fits, whole = ([envelope.most(tokens, share) for tokens in at] for share in (HEADROOM, 1.0))
    borders = [[0.5] * len(at), fits, whole, [max(top, most) for most in whole]]
    words = [f"fits (up to {HEADROOM:.0%})", "tight", "waits or preempts"]
    for lower, upper, colour, word in zip(borders, borders[1:], REGIONS.values(), words, strict=False):
        axes.fill_between(at, lower, upper, color=colour, linewidth=0, label=f"arithmetic: {word}")
    never = [tokens for tokens, most in zip(at, whole, strict=True) if most < 1]
    if never:
        grey = REGIONS[Fit.NEVER]
        axes.axvspan(never[0], at[-1], color=grey, linewidth=0, label="arithmetic: not even one fits")


def _contours(axes: Any, envelope: Envelope, at: list[int], top: float) -> None:
    for share in (*CONTOURS, 1.0):
        line = [envelope.most(tokens, share) for tokens in at]
        border = share == 1
        axes.plot(
            at, line, color="#222222" if border else "#7A7A7A", linewidth=1.6 if border else 0.8,
            linestyle="-" if border else (0, (4, 3)), label="arithmetic: the whole pool" if border else None,
        )  # fmt: skip
        inside = [(tokens, most) for tokens, most in zip(at, line, strict=True) if LOWEST < most < top]
        if inside:
            leaves = inside[-1][0] == at[-1]  # to the right; else it meets the lower edge
            axes.annotate(
                f"{share:.0%}", inside[-1], xytext=(4, -3) if leaves else (-2, 8), textcoords="offset points",
                fontsize=8, color="#444444", ha="left" if leaves else "right", annotation_clip=False,
            )  # fmt: skip


def _marks(axes: Any, envelope: Envelope, targets: Targets) -> None:
    seen = "simulated" if envelope.sample.simulated else "measured"
    for outcome, style in MARKS.items():
        own = [level for level in envelope.levels if level.outcome is outcome]
        if own:
            axes.plot(
                [level.tokens for level in own], [level.at_once for level in own],
                **{"linestyle": "none", "markersize": 7, "markeredgewidth": 1.4, "zorder": 5, **style},
                label=f"{seen}: {outcome}",
            )  # fmt: skip
    if targets.concurrency and targets.context_tokens:
        axes.plot(
            [targets.context_tokens], [targets.concurrency], marker="*", markersize=17, linestyle="none",
            color="#222222", markerfacecolor="#F0E442", zorder=4, label="target",
        )  # fmt: skip
