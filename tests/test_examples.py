"""The kept runs: what stands in their pages is what the analysis of today says of their rows."""

import re
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest

import analysis
from analysis.rows.tables import read_tables
from contract.specs import PointKind

OUTPUTS = Path(__file__).parent.parent / "outputs"
RUNS = sorted(path for path in OUTPUTS.glob("example-*") if path.is_dir())
TEXT = (".md", ".csv")


def test_runs_are_kept() -> None:
    assert [run.name for run in RUNS] == ["example-cpu", "example-h100", "example-h200", "example-h200-slo"]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_kept_run_reduces_to_the_pages_that_are_kept_with_it(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / run.name)
    written = [Path(path) for path in analysis.reduce(copy) if Path(path).suffix in TEXT]
    assert written
    for path in written:
        kept = run / path.relative_to(copy)
        assert path.read_text() == kept.read_text(), f"python -m analysis outputs/{run.name} writes another {kept.name}"
    made = {path.relative_to(copy) for path in written}
    assert {path.relative_to(run) for path in run.rglob("*") if path.suffix in TEXT} - made == {Path("README.md")}


def test_client_and_server_count_the_same_tokens_in_the_kept_run_that_has_both_counts() -> None:
    """docs/definitions.md says so; rows of the two oldest runs are of before there was a column for it."""
    loads = {run.name: [p for p in read_tables(run).points if p.kind == PointKind.LOAD] for run in RUNS}
    counted = {name: {point.token_count_difference for point in points} for name, points in loads.items()}
    none, same = {None}, {0}
    assert counted == {"example-cpu": none, "example-h100": none, "example-h200": same, "example-h200-slo": same}


WITHOUT = {
    "requests.parquet": [
        ("operating_point.md", "| goodput_qps | not known from this run | requests.parquet holds no rows of these"),
        ("batching_benchmark.md", "goodput_qps is not known from this run: requests.parquet holds no rows of these"),
    ],
    "telemetry.parquet": [("report.html", "it holds no samples of its cards")],
    "server_samples.parquet": [("report.html", "it holds no samples of its servers' KV pools")],
    "sessions.parquet": [
        (
            "kv_cache_scaling_notes.md",
            "> **incomplete**: no sessions.parquet that can be read in this run: how its servers started",
        ),
        ("kv_cache_scaling_notes.md", "no row of a server holds an account of its memory"),
        ("report.html", "no server has both a start and an end in sessions.parquet"),
    ],
    "manifest.json": [
        (
            "operating_point.md",
            "> **incomplete**: no manifest.json that can be read in this run: its objectives, targets and price",
        ),
        ("kv_cache_scaling_notes.md", "> **incomplete**: no manifest.json"),
        ("batching_benchmark.md", "> **incomplete**: no manifest.json"),
        ("report.html", "no manifest.json"),
    ],
}
"""What a run of two cards says where a file of it was not sent along."""
RESTS_ON_ALL = {"sessions.parquet": "kv_cache_scaling_notes.md", "manifest.json": ""}
"""Files without which parts of pages fall away, as these say at their top: the pages (any) that may lack some."""


def parts(page: str) -> set[str]:
    """Return the headings of a page, and head and first cell of every row of its tables."""
    found, head = set(), ""
    for line in page.splitlines():
        head = line if line.startswith("|") and not head else head if line.startswith("|") else ""
        if line.startswith("|"):
            found.add(f"{head.split('|')[1]}: {line.split('|')[1]}")
        elif line.startswith("#"):
            found.add(line)
    return found


@pytest.mark.parametrize("file", WITHOUT)
def test_what_rests_on_a_file_that_was_not_sent_is_named_and_nothing_else_falls_away(file: str, tmp_path: Path) -> None:
    kept = OUTPUTS / "example-h200"
    run = shutil.copytree(kept, tmp_path / "run", ignore=shutil.ignore_patterns(file))
    with patch("analysis.artifacts.write_plots", return_value=[]):
        analysis.reduce(run)
    for page, words in WITHOUT[file]:
        assert words in re.sub(r"</?\w+>", "", (run / page).read_text().replace("&#x27;", "'"))
    for page in ("kv_cache_scaling_notes.md", "batching_benchmark.md", "operating_point.md"):
        if not page.endswith(RESTS_ON_ALL.get(file, "none")):
            assert parts((kept / page).read_text()) <= parts((run / page).read_text()), page
    assert file not in analysis.answer(kept)
    assert ("that can be read in this run" in analysis.answer(run)) == (file in RESTS_ON_ALL)
