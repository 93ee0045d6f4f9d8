"""The order in which a run's artifacts are made. `reduce` is the whole of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from analysis.errors import AnalysisError
from analysis.load.anchors import with_drift
from analysis.load.goodput import with_goodput
from analysis.load.load_curve import knee_curves, load_curves
from analysis.load.load_tables import write_concurrency_sweep
from analysis.load.rates import rate_curves
from analysis.memory.envelope_grid import envelope_grids
from analysis.memory.kv_fit import kv_results
from analysis.memory.kv_scaling import write_capacity, write_scaling
from analysis.pages.batching import batching_page
from analysis.pages.envelope_sweep import envelope_page, write_envelope
from analysis.pages.kv_notes import kv_page
from analysis.pages.operating_page import operating_page
from analysis.pages.plots import write_plots
from analysis.pages.rate_sweep import rate_page, write_rate_sweep
from analysis.pages.startup_plot import write_startup
from analysis.pages.timeline import bars_of, bin_seconds, read_utilization, write_timeline
from analysis.report.page import Page
from analysis.report.sections import report_page, title
from analysis.rows.shards import build_tables
from analysis.rows.tables import read_tables
from analysis.rows.targets import Targets, read_gpu_hour, read_slo, read_targets
from analysis.writing.document import Document
from analysis.writing.figures import write_figures
from analysis.writing.files import write_text

OWNED = (
    "kv_cache_scaling.csv",
    "kv_cache_scaling.*.csv",
    "kv_capacity.csv",
    "kv_capacity.*.csv",
    "kv_cache_scaling_notes.md",
    "concurrency_sweep.csv",
    "concurrency_sweep.*.csv",
    "batching_benchmark.md",
    "rate_sweep.csv",
    "rate_sweep.*.csv",
    "rate_sweep.md",
    "envelope_sweep.csv",
    "envelope_sweep.*.csv",
    "envelope_sweep.md",
    "operating_point.md",
    "report.html",
    "figures.csv",
    *(
        f"plots/{stem}{rest}.svg"
        for stem in (
            "kv_memory",
            "kv_capacity",
            "memory_account",
            "kv_pages",
            "kv_envelope",
            "concurrency_sweep",
            "batching_levels",
            "near_full_context",
            "rate_sweep",
        )
        for rest in ("", ".*")
    ),
    "plots/timeline.svg",
    "plots/startup.svg",
)
"""Names that belong to this module: one that an earlier, smaller or larger state of the run left behind is removed."""


def reduce(run_dir: Path, targets: Targets | None = None) -> list[Path]:
    """Write every artifact that the rows of `run_dir` carry and return the paths, tables first.

    The notes on KV, the page of load and the operating point are always among them: what the run lacks for one, it
    names. Works on a run that failed or was interrupted: what there is, is shown. `targets` default to the manifest's.
    Raises `AnalysisError` for a directory that cannot be analysed, and then has written nothing.
    """
    if (run_dir / "plots").is_symlink():
        raise AnalysisError(f"{run_dir / 'plots'}: is a link; plots are not written through links")
    written = build_tables(run_dir)
    slo, targets = read_slo(run_dir), targets or read_targets(run_dir)
    tables = with_drift(with_goodput(run_dir, read_tables(run_dir), slo))
    utilization = read_utilization(run_dir, bin_seconds(bars_of(tables)[1]))
    pages = [
        kv_page(tables, targets, slo),
        batching_page(tables, slo),
        rate_page(tables, slo),
        envelope_page(tables),
        operating_page(tables, slo, targets, read_gpu_hour(run_dir)),
    ]
    report = report_page(run_dir, tables)
    results = kv_results(tables.points)
    written += write_scaling(run_dir, results)
    written += write_capacity(run_dir, results)
    points = tables.points
    written += write_concurrency_sweep(run_dir, load_curves(points, "concurrency"), knee_curves(points))
    written += write_rate_sweep(run_dir, rate_curves(tables.points))
    written += write_envelope(run_dir, envelope_grids(tables))
    written += _write_pages(run_dir, [page for page in pages if page is not None], report, title(tables))
    written += write_plots(run_dir, tables, targets)
    written += write_timeline(run_dir, tables, utilization)
    written += write_startup(run_dir, tables)
    _remove_stale(run_dir, written)
    return written


def _write_pages(run_dir: Path, pages: Sequence[Document], report: Page, title: str) -> list[Path]:
    paths = [write_text(run_dir / page.file, page.text()) for page in pages]
    paths.append(write_text(run_dir / report.file, report.html(title)))
    return [*paths, write_figures(run_dir / "figures.csv", [(page.file, page.figures) for page in (*pages, report)])]


def _remove_stale(run_dir: Path, written: Iterable[Path]) -> None:
    kept = set(written)
    for pattern in OWNED:
        for path in run_dir.glob(pattern):
            if path not in kept:
                path.unlink()
