"""plots/*.svg: the curves of a run. Deterministic: the same rows give the same bytes.

Colours are Okabe and Ito's, which stay apart for colour-blind readers; shape and line style say the same again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from analysis.load.ladder import predicted
from analysis.load.load_curve import LoadCurve, knee_curves, load_curves
from analysis.load.rates import kept_up, rate_curves
from analysis.memory.account_plot import draw_account, has_account
from analysis.memory.envelope_plot import draw_envelope, size_words
from analysis.memory.kv_account import Accounts
from analysis.memory.kv_envelope import Envelope, envelopes
from analysis.memory.kv_fit import Committed, KvResult, kv_results
from analysis.memory.kv_pages import PageFunction, page_functions
from analysis.memory.pages_plot import draw_pages
from analysis.numbers.intervals import CONFIDENCE
from analysis.rows.caveats import lengths_words, title
from analysis.rows.series import Reading, Series
from analysis.rows.tables import RunPoint, Tables
from analysis.rows.targets import Targets
from analysis.writing.figures import GIB, clean
from analysis.writing.files import write_with

BLUE, ORANGE, GREEN, PURPLE, GREY, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8A8A8A", "#222222"
STYLE: Any = {
    "svg.hashsalt": "vllm-capacity",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.labelcolor": BLACK,
    "axes.grid": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 6,
}

Draw = Callable[[Any], None]


def write_plots(run_dir: Path, tables: Tables, targets: Targets) -> list[Path]:
    """Write every plot that the rows carry; return the paths."""
    drawings = [*_drawings(tables.points, Accounts(tables.sessions)), *_kv_drawings(tables, targets)]
    return draw_all(run_dir, drawings) if drawings else []


def draw_all(run_dir: Path, drawings: Iterable[tuple[str, Draw]]) -> list[Path]:
    """Draw figures and write them as plots/NAME.svg; return the paths."""
    return [draw_svg(run_dir / "plots" / f"{name}.svg", draw) for name, draw in drawings]


def draw_svg(path: Path, draw: Draw) -> Path:
    """Draw one figure in this style and write it; return the path."""
    import matplotlib

    with matplotlib.rc_context({"backend": "svg", **STYLE}):
        return _save(path, draw)


def _drawings(points: Sequence[RunPoint], accounts: Accounts) -> Iterator[tuple[str, Draw]]:
    results = [result for result in kv_results(points) if result.readings]
    for number, result in enumerate(results):
        yield result.file_stem("kv_memory", number), partial(_memory, result)
    for number, result in enumerate(result for result in results if any(s.measured for s in result.capacity)):
        yield result.file_stem("kv_capacity", number), partial(_capacity, result)
    for number, result in enumerate(result for result in results if has_account(result, accounts)):
        yield result.file_stem("memory_account", number), partial(_account, result, accounts)
    told = {curve.name for curve in knee_curves(points)}
    for purpose, stem in (("concurrency", "concurrency_sweep"), ("batching", "batching_levels")):
        for curve in load_curves(points, purpose):
            if curve.levels:
                yield curve.series.group.file(stem, ""), partial(_load, curve, curve.name in told)
    for curve in load_curves(points, "near_full_context"):
        if curve.levels:
            yield curve.series.group.file("near_full_context", ""), partial(_ladder, curve)
    for curve in rate_curves(points):
        if curve.levels:
            yield curve.series.group.file("rate_sweep", ""), partial(_rates, curve)


def _kv_drawings(tables: Tables, targets: Targets) -> Iterator[tuple[str, Draw]]:
    """What one sequence keeps, and how many a pool holds: what needs the models' configs or the target besides rows."""
    results = [result for result in kv_results(tables.points) if result.readings]
    with_pages = [(result, found) for result in results if (found := page_functions(result, tables.configs))]
    for number, (result, functions) in enumerate(with_pages):
        yield result.file_stem("kv_pages", number), partial(_pages, result, functions)
    with_pools = [(result, pools) for result in results if (pools := envelopes(result, tables.points, tables.configs))]
    for number, (result, pools) in enumerate(with_pools):
        for envelope in pools:
            stem = result.file_stem("kv_envelope", number)
            yield f"{stem}.{envelope.slug}" if envelope.slug else stem, partial(_envelope, result, envelope, targets)


def _save(path: Path, draw: Draw) -> Path:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    FigureCanvasSVG(figure)
    draw(figure)
    metadata = {"Date": None, "Creator": None}
    return write_with(path, lambda temporary: figure.savefig(temporary, format="svg", metadata=metadata))


def _title(figure: Any, what: str, point: RunPoint, label: str) -> None:
    set_title(figure, what, title(point, label))


def set_title(figure: Any, what: str, words: str) -> None:
    """Write above the first axes what is shown and, smaller, whose numbers they are."""
    import textwrap

    subtitle = textwrap.wrap(clean(words), 96)
    axes = figure.axes[0]
    axes.set_title(what, loc="left", pad=10 + 12 * len(subtitle), fontsize=13, fontweight="bold", color=BLACK)
    axes.annotate(
        "\n".join(subtitle),
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 7),
        textcoords="offset points",
        fontsize=9,
        color="#555555",
        annotation_clip=False,
    ).set_in_layout(False)


def _lengths_axis(axes: Any, lengths: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    _ticks(axes, lengths)
    axes.set_xlabel("max_model_len (tokens)")


def _ticks(axes: Any, places: Sequence[float]) -> None:
    from matplotlib.ticker import NullLocator

    shown = sorted(set(places))
    while len(shown) > 10:
        shown = shown[::2]
    axes.set_xticks(shown, [f"{place:.10g}" for place in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.05)


def _xy(readings: Sequence[Reading], column: str, unit: float = 1) -> tuple[list[float], list[float]]:
    known = [(r.at, value / unit) for r in readings if (value := r.median(column)) is not None]
    return [x for x, _ in known], [y for _, y in known]


def _memory(result: KvResult, figure: Any) -> None:
    axes = figure.add_subplot()
    for number, committed in enumerate(result.committed):
        _committed_lines(axes, committed, number)
    for series, colour in zip(result.capacity, [ORANGE, PURPLE, GREY] * len(result.capacity), strict=False):
        x, y = _xy(series.measured, "mem_ready_bytes", GIB)
        share = series.sample.gpu_memory_utilization or 0
        axes.plot(x, y, color=colour, marker="s", label=f"gpu_memory_utilization {share:g}, ready")
    lengths = [reading.at for reading in result.readings]
    axes.set_xlabel("max_model_len (tokens)")
    axes.set_ylabel("memory (GiB)")
    _ticks(axes, _apart(lengths))
    axes.set_ylim(bottom=0)
    axes.margins(y=0.12)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    _title(figure, "Memory against max_model_len", result.sample, result.group.label)


def _account(result: KvResult, accounts: Accounts, figure: Any) -> None:
    draw_account(result, accounts, figure)
    _title(figure, "What the memory is for", result.sample, result.group.label)


def _pages(result: KvResult, functions: Sequence[PageFunction], figure: Any) -> None:
    draw_pages(functions, figure)
    _title(figure, "What one sequence keeps of the KV pool", result.sample, result.group.label)


def _envelope(result: KvResult, envelope: Envelope, targets: Targets, figure: Any) -> None:
    draw_envelope(envelope, targets, figure)
    what = f"Headroom envelope of a pool of {size_words(envelope)}"
    _title(figure, what, envelope.sample, result.group.label)


def _apart(lengths: Sequence[float]) -> list[float]:
    """Return the lengths whose labels do not touch on a linear axis."""
    shown: list[float] = []
    for length in sorted(set(lengths), reverse=True):
        if not shown or shown[-1] - length >= 0.06 * max(lengths):
            shown.append(length)
    return shown


def _committed_lines(axes: Any, committed: Committed, number: int) -> None:
    readings = committed.series.measured
    who = "committed" if committed.sequences is None else f"pool of {committed.sequences} sequences"
    x, y = _xy(readings, "mem_ready_bytes", GIB)
    axes.plot(x, y, color=(BLUE, GREEN)[number % 2], marker="o", label=f"{who}, ready")
    loaded_x, loaded_y = _xy(readings, "mem_loaded_bytes", GIB)
    axes.plot(
        loaded_x, loaded_y, color=GREEN, marker="x", linestyle="none", markersize=8, mew=2, label=f"{who}, loaded"
    )
    per_sequence = {r.at: v for r in readings if (v := r.median("formula_bytes_per_sequence")) is not None}
    if x and committed.sequences and x[0] in per_sequence:
        formula = [
            y[0] + committed.sequences * (per_sequence[at] - per_sequence[x[0]]) / GIB for at in x if at in per_sequence
        ]
        along = [at for at in x if at in per_sequence]
        axes.plot(
            along, formula, color=BLACK, linestyle=(0, (4, 3)), linewidth=1.2, label="formula, from the shortest length"
        )


def _capacity(result: KvResult, figure: Any) -> None:
    from matplotlib.ticker import NullFormatter

    tokens, sequences = figure.subplots(1, 2)
    lengths = [reading.at for series in result.capacity for reading in series.measured]
    for series, colour in zip(result.capacity, [BLUE, ORANGE, GREEN] * len(result.capacity), strict=False):
        _capacity_lines(tokens, sequences, series, colour, named=len(result.capacity) == 1)
    for axes in (tokens, sequences):
        _lengths_axis(axes, lengths)
    tokens.set_ylabel("KV tokens the pool holds")
    tokens.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    tokens.set_ylim(0, 1.15 * tokens.get_ylim()[1])
    sequences.set_ylabel("sequences of max_model_len that fit")
    sequences.set_yscale("log")
    sequences.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    sequences.yaxis.set_minor_formatter(NullFormatter())
    sequences.margins(x=0.16)
    low, high = sequences.get_ylim()
    sequences.set_ylim(low * 0.8, high * 1.3)
    tokens.legend(loc="lower left", fontsize=9)
    _title(figure, "KV capacity at fixed utilization", result.sample, result.group.label)


def _capacity_lines(tokens: Any, sequences: Any, series: Series, colour: str, named: bool) -> None:
    share = series.sample.gpu_memory_utilization or 0
    tokens.plot(*_xy(series.measured, "engine_kv_tokens"), color=colour, marker="o", label=f"utilization {share:g}")
    x, y = _xy(series.measured, "engine_max_concurrency")
    sequences.plot(x, y, color=colour, marker="o")
    if not named:
        return
    for at, value in zip(x, y, strict=True):
        sequences.annotate(f"{value:,.4g}", (at, value), xytext=(6, 4), textcoords="offset points", fontsize=8.5)


def _load(curve: LoadCurve, tells: bool, figure: Any) -> None:
    """`tells`: whether the server's knee and blow-up are read from this curve; they are marked on no other."""
    top, bottom = _two_rows(figure)
    _level_line(top, curve, "tok_s", BLUE)
    top.set_ylabel("output tok/s")
    top.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    _level_line(bottom, curve, "p95_e2e_s", ORANGE)
    bottom.set_ylabel("p95 e2e (s)")
    if tells:
        _mark_levels(top, curve.knee.could_be, "throughput stops scaling, of these levels")
    if tells and curve.blow_up is not None and curve.blow_up.seen:
        _mark_levels(bottom, curve.blow_up.last_before, "last level before p95 outgrows tok/s")
    for axes, corner in ((top, "lower right"), (bottom, "upper left")):
        axes.legend(loc=corner, fontsize=8.5)
    _concurrency_axis(bottom, [reading.at for reading in curve.levels])
    what = f"Throughput and latency against concurrency ({lengths_words(curve.series.sample)})"
    _title(figure, what, curve.series.sample, curve.series.group.label)


def _rates(curve: LoadCurve, figure: Any) -> None:
    top, bottom = _two_rows(figure)
    _level_line(top, curve, "qps", BLUE)
    rates = [reading.at for reading in curve.levels]
    top.plot(rates, rates, color=GREY, linestyle=(0, (4, 3)), linewidth=1.2, label="as many as arrive")
    top.set_ylabel("answered requests/s")
    _level_line(bottom, curve, "p95_e2e_s", ORANGE)
    bottom.plot(*_xy(curve.levels, "p50_e2e_s"), color=PURPLE, marker="s", label="p50 e2e")
    bottom.set_ylabel("p95 e2e (s)")
    held = kept_up(curve)
    if held and held[-1].at != rates[-1]:
        _mark(bottom, held[-1].at, f"up to here the server kept up ({held[-1].at:g})")
    for axes in (top, bottom):
        axes.legend(loc="upper left", fontsize=8.5)
    bottom.set_xscale("log", base=2)
    _ticks(bottom, rates)
    bottom.set_xlabel("arrival rate (requests/s)")
    what = f"Latency against arrival rate ({lengths_words(curve.series.sample)})"
    _title(figure, what, curve.series.sample, curve.series.group.label)


def _two_rows(figure: Any) -> tuple[Any, Any]:
    figure.set_size_inches(7.2, 5.6)
    top, bottom = figure.subplots(2, 1, sharex=True)
    return top, bottom


def _level_line(axes: Any, curve: LoadCurve, column: str, colour: str) -> None:
    """Draw the medians as a line and, where there are several, every repeat as a dot."""
    axes.plot(*_xy(curve.levels, column), color=colour, marker="o", label="median")
    repeats = [(r.at, value) for r in curve.levels if len(r.measured) > 1 for value in r.values(column)]
    if repeats:
        axes.plot(*zip(*repeats, strict=True), color=colour, marker=".", linestyle="none", alpha=0.6, label="repeats")
    spans = [(r.at, interval) for r in curve.levels if (interval := curve.interval(r, column)) is not None]
    if spans:
        at, lows, highs = [x for x, _ in spans], [i.low for _, i in spans], [i.high for _, i in spans]
        words = f"{CONFIDENCE:.0%} interval of the mean"
        axes.vlines(at, lows, highs, color=colour, linewidth=5, alpha=0.25, label=words)
    axes.set_ylim(bottom=0)
    axes.margins(y=0.15)


def _mark_levels(axes: Any, levels: Sequence[float], words: str) -> None:
    """Mark the levels among which something lies: a line for one, a band for several; nothing for none."""
    if len(levels) == 1:
        _mark(axes, levels[0], f"{words} ({levels[0]})")
    elif levels:
        label = f"{words} (one of {', '.join(map(str, levels))})"
        axes.axvspan(levels[0], levels[-1], color=GREY, alpha=0.2, linewidth=0, label=label)


def _mark(axes: Any, at: float, words: str) -> None:
    """Draw a vertical line that the legend explains."""
    axes.axvline(at, color=GREY, linestyle=(0, (2, 2)), linewidth=1.2, label=words)


def _concurrency_axis(axes: Any, levels: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    _ticks(axes, levels)
    axes.set_xlabel("concurrency (requests in flight)")


def _ladder(curve: LoadCurve, figure: Any) -> None:
    top, bottom = _two_rows(figure)
    _level_line(top, curve, "p95_e2e_s", ORANGE)
    top.set_ylabel("p95 e2e (s)")
    for column, colour, marker, words in (
        ("running_max", BLUE, "o", "running at once (highest)"),
        ("waiting_max", PURPLE, "s", "waiting (highest)"),
        ("preemptions", BLACK, "x", "preemptions"),
    ):
        known = [(r.at, value) for r in curve.levels if (value := r.highest(column)) is not None]
        if known:
            bottom.plot(*zip(*known, strict=True), color=colour, marker=marker, label=words)
    bottom.set_ylabel("requests")
    bottom.set_ylim(bottom=0)
    bottom.margins(y=0.15)
    bottom.yaxis.get_major_locator().set_params(integer=True)
    limit = predicted(curve)
    if limit:
        for axes in (top, bottom):
            _mark(axes, limit, f"engine's KV concurrency ({limit:.4g})")
    bottom.legend(loc="upper left", fontsize=8.5)
    _concurrency_axis(bottom, [reading.at for reading in curve.levels])
    prompt, output = curve.series.sample.prompt_tokens, curve.series.sample.output_tokens
    length = curve.series.sample.max_model_len
    what = f"Near-full context ({prompt} + {output} of {length} tokens)"
    _title(figure, what, curve.series.sample, curve.series.group.label)
