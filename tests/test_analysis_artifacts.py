"""The whole of it: which files come out of which rows, the same bytes each time, the command line, the plots."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from analysis import answer, reduce
from analysis.__main__ import main
from analysis.rows.manifest import read_unfinished
from contract.rows import PointRow, SessionRow, to_table
from tests import synthetic_run as synthetic
from tests.test_analysis_load import with_curve

TABLES = ["points.parquet", "requests.parquet", "telemetry.parquet", "server_samples.parquet", "sessions.parquet"]
PAGES = {"kv_cache_scaling_notes.md", "batching_benchmark.md", "operating_point.md", "report.html", "figures.csv"}
MEMORY_PLOTS = ["kv_memory.svg", "kv_capacity.svg", "memory_account.svg", "kv_envelope.svg"]
PLOTS = [*MEMORY_PLOTS, "concurrency_sweep.svg", "batching_levels.svg", "near_full_context.svg"]
PLOTS += ["kv_envelope.pool-24-gib.svg"]


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = synthetic.write_run(tmp_path_factory.mktemp("gpu"), synthetic.rows())
    reduce(run)
    return run


def test_capacity_run_gives_every_artifact(gpu: Path) -> None:
    files = ["kv_cache_scaling.csv", "kv_capacity.csv", "concurrency_sweep.csv", "kv_cache_scaling_notes.md"]
    files += ["batching_benchmark.md", "operating_point.md", "report.html", "figures.csv"]
    for name in [*TABLES, *files, *(f"plots/{plot}" for plot in PLOTS)]:
        assert (gpu / name).stat().st_size > 0, name


def test_same_rows_give_the_same_bytes(gpu: Path) -> None:
    written = reduce(gpu)
    before = {path: path.read_bytes() for path in written}
    assert {path: path.read_bytes() for path in reduce(gpu)} == before


def test_kv_rows_alone_give_a_short_page_of_load(tmp_path: Path) -> None:
    run = synthetic.write_run(tmp_path, synthetic.rows()[:8])
    names = {path.name for path in reduce(run)}
    assert names >= PAGES
    assert not names & {"concurrency_sweep.csv", "concurrency_sweep.svg", "rate_sweep.md", "envelope_sweep.md"}
    page = (run / "batching_benchmark.md").read_text()
    assert "Not known from this run: it holds no levels of a closed loop" in page
    assert "`+sweep=capacity` measures both" in page
    assert len(page.splitlines()) < 6


def test_a_picture_marks_a_knee_only_where_the_pages_read_it_from(tmp_path: Path) -> None:
    p95 = {1: 0.2, 4: 0.24, 8: 0.3, 16: 0.6, 32: 0.9}
    rising = with_curve({1: 300.0, 4: 1000.0, 8: 1900.0, 16: 3500.0, 32: 6000.0}, p95)
    few = with_curve({1: 300.0, 4: 1000.0, 8: 2000.0, 16: 2010.0}, p95)
    flat = [replace(row, purpose="batching", point_id=f"b-{row.point_id}") for row in few]
    words = "throughput stops scaling"
    for name, rows, marked in (("both", [*rising, *flat], False), ("alone", flat, True)):
        run = synthetic.write_run(tmp_path / name, rows)
        reduce(run)
        plot = "".join(ET.parse(run / "plots/batching_levels.svg").getroot().itertext())
        assert (words in plot) == marked


def test_load_rows_alone_give_short_notes_on_kv(tmp_path: Path) -> None:
    rows = [r for r in synthetic.rows() if r.purpose == "concurrency"]
    run = synthetic.write_run(tmp_path, rows)
    names = {path.name for path in reduce(run)}
    assert names == {*TABLES, *PAGES, "concurrency_sweep.csv", "concurrency_sweep.svg"}
    page = (run / "kv_cache_scaling_notes.md").read_text()
    assert "Not known from this run: it holds no readings of memory, so there is no kv_cache_scaling.csv" in page
    assert "`+sweep=kv` measures both" in page
    assert len(page.splitlines()) < 8
    assert "analysis whatif RUN" in page
    assert main(["whatif", str(run), "max_model_len=8192", "concurrency=16"]) == 0, "as the page says"
    silent = synthetic.write_run(tmp_path / "silent", [replace(row, engine_kv_bytes=None) for row in rows])
    reduce(silent)
    assert "whatif" not in (silent / "kv_cache_scaling_notes.md").read_text()
    assert main(["whatif", str(silent), "max_model_len=8192", "concurrency=16"]) == 2


def test_run_without_a_point_has_its_pages_and_says_why_they_are_empty(tmp_path: Path) -> None:
    row = synthetic.rows()[0]
    shards = tmp_path / "shards" / row.session_id
    shards.mkdir(parents=True)
    session = replace(synthetic.session_of(row), status="failed")
    pq.write_table(to_table([session], SessionRow), shards / "session.parquet")
    assert {path.name for path in reduce(tmp_path)} >= PAGES
    for name in (name for name in PAGES if name.endswith(".md")):
        page = (tmp_path / name).read_text()
        assert "Not known from this run: it holds no " in page, name
        assert "`+sweep=" in page, name
        assert "Sessions that failed before any of their points had a row: 1." in page, name


def with_plan(run: Path, status: object, planned: Sequence[PointRow], searched_s: float = 0.0) -> Path:
    """Write a manifest that planned these points, and reduce the run."""
    sessions: dict[str, list[dict[str, str]]] = {}
    for row in planned:
        sessions.setdefault(row.session_id, []).append({"id": row.point_id})
    plan = [{"id": name, "points": points, "searched_estimate_s": searched_s} for name, points in sessions.items()]
    (run / "manifest.json").write_text(json.dumps({"status": status, "sessions": plan}))
    reduce(run)
    return run


@pytest.mark.parametrize("status", ["running", "interrupted", "ended early"])
def test_a_run_that_was_cut_off_says_so_on_every_page(status: str, tmp_path: Path) -> None:
    rows = synthetic.rows()
    fewer = [row for row in rows if row.concurrency != 32]
    run = with_plan(synthetic.write_run(tmp_path, fewer), status, rows)
    words = f"**not whole**: this run's manifest says `{status}`: "
    have = f"Of the points planned from the start {len(fewer)} of {len(rows)} have a row. "
    pages = [run / name for name in PAGES if name.endswith(".md")]
    for path in pages:
        assert words in path.read_text(), path
        assert have in path.read_text(), path
    report = (run / "report.html").read_text()
    assert f"{len(fewer)} of {len(rows)} points measured. It is not whole." in report
    assert have in report
    assert f"not whole: this run's manifest says `{status}`: " in answer(run)


def test_points_that_a_search_added_are_not_counted_as_planned(tmp_path: Path) -> None:
    rows = synthetic.rows()
    run = with_plan(synthetic.write_run(tmp_path, rows), "running", rows[:3], searched_s=9.5)
    assert "Of the points planned from the start 3 of 3 have a row; a search would have added further" in answer(run)
    assert f"{len(rows)} of {len(rows)} points measured. It is not whole." in (run / "report.html").read_text()


@pytest.mark.parametrize("status", ["complete", "failed points", "budget used up", None, 7, ["running"]])
def test_a_run_that_came_to_its_end_is_whole(status: object, tmp_path: Path) -> None:
    rows = synthetic.rows()
    run = with_plan(synthetic.write_run(tmp_path, rows[:8]), status, rows)
    assert "not whole" not in answer(run)
    assert "8 of 8 points measured." in (run / "report.html").read_text()
    assert not [name for name in PAGES if "not whole" in (run / name).read_text()]


@pytest.mark.parametrize("sessions", [None, 3, [4], [{"points": 5}], [{"id": "a", "points": [6, {}, {"id": 7}]}]])
def test_a_plan_that_cannot_be_read_counts_nothing(sessions: object, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"status": "running", "sessions": sessions}))
    found = read_unfinished(tmp_path)
    assert found is not None
    assert found.planned == frozenset()


def test_artifact_of_an_earlier_state_does_not_stay(tmp_path: Path) -> None:
    run = synthetic.write_run(tmp_path, synthetic.rows()[:8])
    for stale in ("concurrency_sweep.gone.csv", "rate_sweep.md", "batching_benchmark.md", "other.html"):
        (run / stale).write_text("old")
    reduce(run)
    assert not (run / "concurrency_sweep.gone.csv").exists()
    assert not (run / "rate_sweep.md").exists()
    assert (run / "batching_benchmark.md").read_text() != "old"
    assert (run / "other.html").read_text() == "old"


def test_run_where_everything_failed_is_reduced(tmp_path: Path) -> None:
    rows = [synthetic.failed(row, "start_failed") for row in synthetic.rows()]
    run = synthetic.write_run(tmp_path, rows)
    names = {path.name for path in reduce(run)}
    assert {"kv_cache_scaling.csv", "concurrency_sweep.csv", "batching_benchmark.md"} <= names
    assert not list(run.rglob("*.svg"))
    assert f"Not measured: {len(rows)} of {len(rows)} points (failed: start_failed x{len(rows)})" in answer(run)


def test_every_number_of_points_parquet_survives_an_interrupted_run(tmp_path: Path) -> None:
    run = synthetic.write_run(tmp_path, [synthetic.rows()[0]])
    assert reduce(run)
    assert "formula 393,216" in answer(run)


def test_plots_say_what_they_show(gpu: Path) -> None:
    for name in PLOTS:
        text = "".join(ET.parse(gpu / "plots" / name).getroot().itertext())
        for words in ("phi-3-mini-4k", "NVIDIA H100 80GB HBM3", "dummy weights"):
            assert words in text, (name, words)
        assert "simulated" not in text
        assert "mathdefault" not in text


def test_run_of_a_dummy_mixture_of_experts_disowns_its_speed_everywhere(tmp_path: Path) -> None:
    rows = [replace(r, moe=True) for r in synthetic.rows() if r.purpose == "concurrency"]
    run = synthetic.write_run(tmp_path, rows)
    reduce(run)
    marks = "dummy weights, MoE: routing and speed not representative"
    (plot,) = run.rglob("*.svg")
    assert marks in answer(run)
    assert marks in (run / "batching_benchmark.md").read_text()
    assert "".join(marks.split()) in "".join("".join(ET.parse(plot).getroot().itertext()).split())  # titles are wrapped
    assert (run / "concurrency_sweep.csv").read_text().splitlines()[0] == (
        "concurrency,mean_e2e_s,p95_e2e_s,qps,tok_s,gpu_util_pct,"
        "repeats,tok_s_low,tok_s_high,p95_e2e_s_low,p95_e2e_s_high,knee"
    )


def test_cut_models_on_different_pages_do_not_meet(tmp_path: Path) -> None:
    small = [r for r in synthetic.rows(replace(synthetic.GPU, model="small.cut")) if r.purpose == "kv_scaling"]
    twin = [r for r in synthetic.rows(replace(synthetic.GPU, model="Small-cut")) if r.purpose == "concurrency"]
    rows = [replace(r, model_cut="4 of 32 layers", session_id=f"s-{r.session_id}") for r in small]
    rows += [replace(r, model_cut="2 of 16 layers") for r in twin]
    run = synthetic.write_run(tmp_path, rows)
    reduce(run)
    assert "**cut model**: small.cut is smaller" in (run / "kv_cache_scaling_notes.md").read_text()
    assert "**cut model**: Small-cut is smaller" in (run / "batching_benchmark.md").read_text()
    figures = (run / "figures.csv").read_text()
    assert "cut.small-cut.model,Small-cut,Small-cut" in figures
    assert "cut.small-cut-2.model,small.cut,small.cut" in figures


def test_simulated_plots_say_so_and_names_cannot_break_them(tmp_path: Path) -> None:
    shape = replace(
        synthetic.GPU, model="a$b_{<x>}&\x07\n", simulated=True, engine="sim", device="sim", device_name=None
    )
    run = synthetic.write_run(tmp_path, synthetic.rows(shape))
    plots = [path for path in reduce(run) if path.suffix == ".svg"]
    assert len(plots) == len(PLOTS)
    for path in plots:
        assert "simulated" in "".join(ET.parse(path).getroot().itertext())


def test_answer_holds_the_main_results(gpu: Path) -> None:
    text = answer(gpu)
    assert "memory slope (ready) 393,216, memory slope (loaded) 393,216, formula 393,216, engine 393,216" in text
    assert "337.66 x 512, 168.83 x 1024, 84.41 x 2048, 42.21 x 4096 tokens" in text
    assert "6,481 tok/s at concurrency 32, p95 0.344 s (12 + 64 tokens)" in text
    assert "throughput (12 + 64 tokens) was still rising at the last level (by 27 % in the last doubling)" in text
    assert "p95 latency: outgrows it after 8 or 16; verdict: not saturated up to concurrency 32" in text
    assert text.splitlines()[-1] == f"Files: {gpu}"
    assert len(text.splitlines()) < 12


@pytest.mark.parametrize(
    ("shape", "purposes", "start", "told"),
    [
        (synthetic.GPU, ("kv_scaling", "batching"), "warm", True),
        (synthetic.GPU, ("kv_scaling", "batching"), "cold", False),
        (synthetic.GPU, ("kv_scaling",), "warm", False),
        (synthetic.CPU, ("kv_scaling", "batching"), "warm", False),
    ],
)
def test_answer_says_what_the_pages_do_of_load_on_forked_servers_of_cards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: synthetic.Shape, purposes: tuple[str, ...], start: str,
    told: bool,
) -> None:  # fmt: skip
    made = synthetic.session_of
    monkeypatch.setattr(synthetic, "session_of", lambda row: replace(made(row), start=start))
    run = synthetic.write_run(tmp_path, [row for row in synthetic.rows(shape) if row.purpose in purposes])
    reduce(run)
    lines = [line for line in answer(run).splitlines() if line.startswith("forked servers: load was sent to servers")]
    assert len(lines) == told
    page = (run / "batching_benchmark.md").read_text().replace("**", "")
    assert all(line in page for line in lines)


def test_answer_holds_every_load_with_its_lengths_and_names_no_other_s(tmp_path: Path) -> None:
    """Short requests and near-full contexts on one server: what holds for one must not be read of the other."""
    ladder = [
        replace(synthetic.ladder_row(synthetic.GPU, at), repeat=n, point_id=f"ladder-{at}-{n}", tok_s=500.0 + n,
                p95_e2e_s=0.4 * at + n / 1e3)
        for at in (1, 2, 4, 8) for n in range(3)
    ]  # fmt: skip
    rows = with_curve({1: 300.0, 2: 590.0, 4: 1150.0}, {1: 0.2, 2: 0.21, 4: 0.22}, 3, 0.005)
    run = synthetic.write_run(tmp_path, [*rows, *ladder])
    (run / "manifest.json").write_text(json.dumps({"slo": {"p95_e2e_s": 1.0}}))
    reduce(run)
    lines = answer(run).splitlines()
    short, long = "(12 + 64 tokens)", "(4000 + 64 tokens)"
    assert any(f"throughput {short} was still rising" in line and "not saturated up to" in line for line in lines)
    assert any(
        f"throughput {long} stops scaling at concurrency 1;" in line and "compute-bound from" in line for line in lines
    )
    assert any(line.startswith(f"  concurrency {short}: 4 held, and no level broke. ") for line in lines)
    assert any(line.startswith(f"  concurrency {long}: 2 held, 4 (2.0x) broke. ") for line in lines)
    assert sum("held" in line for line in lines) == 2
    section = (run / "batching_benchmark.md").read_text().split("## Which concurrency holds")[1].split("\n## ")[0]
    assert section.count("The border along concurrency: ") == section.count("### ") == 2
    assert section.count("Objectives, repeat by repeat") == 1
    assert "2 held, 4 (2.0x) broke" in section.split("prompts of 4,000 tokens")[1]


def test_command_line_rebuilds_and_lists(gpu: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(gpu)]) == 0
    out = capsys.readouterr().out
    assert "bytes per KV token" in out
    assert "  kv_cache_scaling.csv\n" in out
    assert "  plots/kv_memory.svg\n" in out


def test_command_line_says_in_one_line_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "no such run directory" in captured.err


def test_analysis_runs_alone() -> None:
    """Neither the driver nor the workers, nor Ray, are imported by it; matplotlib only when something is drawn."""
    code = "import analysis, analysis.__main__, sys; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"orchestrator", "workers", "ray", "torch", "vllm", "matplotlib", "pandas"} & set(done.stdout.split())
