"""plots/kv_pages.svg: bytes of one sequence against its length, per group of layers and in all, as the stairs they are.

The stairs are arithmetic; on them lie what the engine says of a full-length sequence and what memory says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from analysis.memory.kv_pages import PageFunction
from analysis.memory.kv_pages_table import WORDS, mode_words
from analysis.writing.figures import MIB
from contract.kv import FULL, LINEAR_ATTENTION, MLA, SLIDING_WINDOW

COLOURS = {FULL: "#0072B2", SLIDING_WINDOW: "#D55E00", MLA: "#009E73", LINEAR_ATTENTION: "#CC79A7"}
"""Okabe and Ito's, which stay apart for colour-blind readers."""
DASHES: dict[str, Any] = {
    FULL: (0, (6, 2)),
    SLIDING_WINDOW: (0, (3, 2)),
    MLA: (0, (6, 2)),
    LINEAR_ATTENTION: (0, (1, 1)),
}
MOST_STEPS = 400
"""Of a line: finer steps are narrower than the line is wide."""
PAST = 1.1
"""The axis reaches to this factor past the longest length or the last kink."""


def draw_pages(functions: Sequence[PageFunction], figure: Any) -> None:
    """Draw a panel for each page function."""
    panels = figure.subplots(1, len(functions), sharey=True, squeeze=False)[0]
    for axes, function in zip(panels, functions, strict=True):
        _panel(axes, function, alone=len(functions) == 1)
    panels[0].set_ylabel("KV of one sequence (MiB)")
    panels[0].margins(y=0.1)
    panels[0].set_ylim(bottom=0)
    named = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3, fontsize=8.5)


def _panel(axes: Any, function: PageFunction, alone: bool) -> None:
    pages = function.pages
    top = int(PAST * max([*(reading.at for reading in function.readings), *pages.kinks]))
    end = top if pages.limit is None else min(top, pages.limit)
    groups = pages.layout.groups
    for group in groups if len(groups) > 1 else ():
        x, y = stairs(end, pages.layout.block_size, partial(pages.group_bytes, group))
        axes.plot(x, y, color=COLOURS[group.kind], linestyle=DASHES[group.kind], label=WORDS[group.kind])
    x, y = stairs(end, pages.layout.block_size, pages.sequence_bytes)
    axes.plot(x, y, color="#222222", label="all layers" if len(groups) > 1 else WORDS[groups[0].kind])
    for kink in pages.kinks:
        axes.axvline(kink, color="#8A8A8A", linestyle=(0, (2, 2)), linewidth=1.2, label="the window stops growing")
    memory = list(function.memory())
    if memory:
        axes.plot(
            [at for at, _ in memory], [size / MIB for _, size in memory], linestyle="none", marker="o", markersize=9,
            markerfacecolor="none", markeredgewidth=1.4, color="#009E73",
            label="memory when ready, from the shortest length",
        )  # fmt: skip
    said = "simulator" if function.sample.simulated else "engine"
    held = [(one.reading.at, one.engine_bytes / MIB) for one in function.held]
    if held:
        axes.plot(
            *zip(*held, strict=True), linestyle="none", marker="x", markersize=7, markeredgewidth=1.8, color="#D55E00",
            label=f"{said}: pool / its KV concurrency",
        )  # fmt: skip
    axes.set_xlim(0, end * 1.02)
    axes.xaxis.get_major_locator().set_params(nbins=6 if alone else 4, integer=True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("tokens of the sequence" + ("" if alone else f"\n{_servers(function)}"))


def stairs(end: int, block: int, size: Callable[[int], int]) -> tuple[list[int], list[float]]:
    """Return the corners of a line of stairs up to `end` tokens, in MiB: a step lies where a block is full.

    Of more than `MOST_STEPS` steps, a point at the end of every k-th.
    """
    every = -(-end // block) // MOST_STEPS + 1
    ends = [*range(block * every, end, block * every), end]
    if every > 1:
        return ends, [size(tokens) / MIB for tokens in ends]
    heights = [size(tokens) / MIB for tokens in ends]
    corners = [corner for start, last in pairwise([0, *ends]) for corner in (start, last)]
    return corners, [height for height in heights for _ in range(2)]


def _servers(function: PageFunction) -> str:
    batched = function.sample.max_num_batched_tokens
    words = mode_words(function).lower().replace("gpu_memory_utilization", "utilization")
    return words if batched is None else f"{words},\nmax_num_batched_tokens {batched}"
