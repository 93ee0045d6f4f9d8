"""report.html: inert whatever a run says, whole whatever it lacks, bounded however long it was, drawn in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import vl_convert
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from analysis import AnalysisError, reduce
from analysis.report.html import digest, inline, script, script_json
from analysis.report.load_charts import frontier
from analysis.report.samples import BINS, Band, Clock, Place, telemetry
from analysis.report.startup_chart import MOST_STARTS, waterfall
from analysis.rows.tables import Tables
from analysis.writing.figures import clean, quote
from contract.rows import PointRow, ServerSample, SessionRow, StartPhase, TelemetryRow
from tests import synthetic_run as synthetic
from tests.page_reader import PageReader, charts, external, prose, read_page

HOSTILE = (
    "</script></style><img src=//evil.test/x onerror=alert(1)><!-- \u2028\"'`**b** [a](http://evil.test) \\ &lt; ${x}"
)
NUMBERS = st.floats(-1e6, 1e6, width=32)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"),
    "--host-resolver-rules=MAP * ~NOTFOUND",
)


def reduced(run: Path) -> str:
    """Reduce a run without its SVG files, which take the time; return the page."""
    with patch.multiple("analysis.artifacts", write_plots=Mock(return_value=[]), write_timeline=Mock(return_value=[])):
        reduce(run)
    return (run / "report.html").read_text()


def page_of(run: Path, rows: Iterable[PointRow], manifest: dict[str, Any] | None = None) -> str:
    synthetic.write_run(run, rows)
    if manifest is not None:
        (run / "manifest.json").write_text(json.dumps(manifest))
    return reduced(run)


def sampled(row: PointRow) -> PointRow:
    """Give a load row samples of two cards and of its server's pool over 20 s."""
    cards = [
        TelemetryRow(t / 10, f"GPU-{g}", (30 + g) << 30, float(t % 100), 300.0) for t in range(200) for g in (0, 1)
    ]
    return replace(row, telemetry=cards, server_samples=[ServerSample(t / 2, 8, 0, kv_usage=t / 80) for t in range(40)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = [sampled(row) if row.purpose == "concurrency" else row for row in synthetic.rows()]
    return page_of(
        tmp_path_factory.mktemp("whole"), rows, {"argv": ["python", "-m", "orchestrator", "+sweep=capacity"]}
    )


# --- inert ---


@given(st.text())
def test_words_of_a_run_are_words_of_the_page(words: str) -> None:
    reader = PageReader()
    reader.feed(inline(quote("q", words).text))
    reader.close()
    assert reader.tags == []
    assert "".join(text for _, text in reader.words) == clean(words)


def test_markdown_of_our_templates_is_markup() -> None:
    made = inline("*ready* is `mem_ready < 2**20`, **not** 2**20")
    assert made == "<em>ready</em> is <code>mem_ready &lt; 2**20</code>, <strong>not</strong> 2**20"


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_data_cannot_end_its_script(data: Any) -> None:
    made = script_json(data)
    assert made.isascii()
    assert not set(made) & set("<>&")
    assert json.loads(made) == data


def test_numbers_that_are_none_are_null() -> None:
    assert script_json([float("nan"), float("inf"), 123456.789]) == "[null,null,123460.0]"


def test_library_cannot_end_its_script() -> None:
    assert script('a = "</script>" + "<!--" + "<b>"') == 'a = "\\x3c/script>" + "\\x3c!--" + "<b>"'


def hostile_rows() -> list[PointRow]:
    shape = replace(synthetic.GPU, model=HOSTILE, device_name=HOSTILE)
    rows = [replace(row, vllm_version=HOSTILE, throttle_reasons=[HOSTILE]) for row in synthetic.rows(shape)]
    lost = {"concurrency-c4-r0", "committed-1024"}
    made = [synthetic.failed(row, HOSTILE, HOSTILE) if row.point_id in lost else row for row in rows]
    return [replace(row, log_tail=HOSTILE * 200) if row.point_id in lost else row for row in made]


def test_hostile_words_stay_words(tmp_path: Path, whole: str) -> None:
    manifest = {
        "argv": [HOSTILE, 3, None],
        "versions": {HOSTILE: HOSTILE},
        "platform": HOSTILE,
        "python": {"not": "a word"},
        "experiments": [{HOSTILE: "\ud800" + HOSTILE}],
    }
    page = page_of(tmp_path, hostile_rows(), manifest)
    reader, usual = read_page(page), read_page(whole)
    assert set(reader.tags) <= {*usual.tags, "details", "summary"}
    assert {name for _, name, _ in reader.attributes} == {name for _, name, _ in usual.attributes}
    assert external(page) == []
    assert page.count("<script") == len(charts(page)) + 1
    assert clean(HOSTILE) in reader.text()
    for spec in charts(page):
        vl_convert.vegalite_to_svg(spec)


@pytest.mark.parametrize("manifest", ["[]", "{", '{"argv": "x", "versions": [1], "experiments": 3}', "[" * 100_000])
def test_any_manifest_gives_a_page(tmp_path: Path, manifest: str) -> None:
    run = synthetic.write_run(tmp_path, synthetic.rows()[:2])
    (run / "manifest.json").write_text(manifest)
    assert "Where it comes from" in prose(reduced(run))


def test_page_asks_for_nothing_and_runs_one_script(whole: str) -> None:
    assert external(whole) == []
    (code,) = re.findall(r"<script>(.*?)</script>", whole, re.DOTALL)
    (policy,) = [value for tag, name, value in read_page(whole).attributes if tag == "meta" and name == "content"][:1]
    assert policy.startswith(f"default-src 'none'; script-src {digest(code)};")
    assert "unsafe-eval" not in policy


# --- complete ---


def of(*purposes: str) -> list[PointRow]:
    return [row for row in synthetic.rows() if row.purpose in purposes]


LACKS: dict[str, tuple[list[PointRow], list[str]]] = {
    "memory alone": (
        of("kv_scaling"),
        [
            "it holds no levels of a closed loop; +sweep=concurrency measures them",
            "no measured level of a closed loop has",
        ],
    ),
    "load alone": (of("concurrency"), ["no reading of memory at any length was measured; +sweep=kv measures them"]),
    "no samples": (
        [replace(row, telemetry=[], server_samples=[]) for row in of("concurrency")],
        ["it holds no samples of its cards", "it holds no samples of its servers' KV pools"],
    ),
    "no end": (of("kv_scaling"), ["no server has both a start and an end", "holds no readable manifest.json"]),
    "no TPOT": (
        [replace(row, p50_tpot_s=None) for row in of("concurrency")],
        ["no measured level of a closed loop has both tok_s and a TPOT"],
    ),
    "no phases": (of("kv_scaling"), ["no row of a server holds the phases of its start"]),
    "all failed": (
        [synthetic.failed(row, "start_failed") for row in synthetic.rows()],
        ["0 of 38 points measured", "None of these levels was measured", "Not measured", "start_failed x38"],
    ),
}


@pytest.mark.parametrize("case", LACKS)
def test_what_is_missing_is_named(tmp_path: Path, case: str) -> None:
    rows, expected = LACKS[case]
    words = " ".join(prose(page_of(tmp_path, rows)).split())
    for sentence in expected:
        assert sentence in words


def test_points_alone_give_a_page(tmp_path: Path) -> None:
    page_of(tmp_path / "run", synthetic.rows())
    (tmp_path / "bare").mkdir()
    shutil.copy(tmp_path / "run" / "points.parquet", tmp_path / "bare")
    assert "best throughput: 6,481 tok/s" in prose(reduced(tmp_path / "bare"))


def test_simulated_run_says_so_before_any_number(tmp_path: Path) -> None:
    shape = replace(synthetic.GPU, simulated=True, engine="sim", device="sim", device_name="SIM")
    page = page_of(tmp_path, synthetic.rows(shape))
    words = prose(page)
    assert words.index("comes from the simulator") < words.index("Answer")
    legends = re.findall(r'<ul class="legend">(.*?)</ul>', page)
    assert all("simulated" in legend for legend in legends[:4])


def test_page_carries_every_chart(whole: str) -> None:
    named = [value for _, name, value in read_page(whole).attributes if name == "aria-label"]
    for what in (
        *("tok/s against concurrency", "p95 latency against concurrency", "tok/s per GPU against tok/s per user"),
        *("memory against max_model_len", "utilisation (%) over time", "power (W) over time", "memory (GiB) over time"),
        "KV blocks in use (%) over time",
    ):
        assert what in named
    assert len(charts(whole)) == len(named)
    for spec in charts(whole):
        assert "<svg" in vl_convert.vegalite_to_svg(spec)


def layers_of(page: str, title: str) -> list[dict[str, Any]]:
    (spec,) = [s for s in charts(page) if s["layer"][0]["encoding"]["y"].get("title") == title][:1]
    return list(spec["layer"])


def test_levels_without_a_measurement_are_crossed_not_dropped(tmp_path: Path) -> None:
    rows = of("concurrency")
    rows[2] = synthetic.failed(rows[2], "out_of_memory")
    rows[5] = replace(rows[5], status="client_limited", failure_class="client_limited")
    page = page_of(tmp_path, rows)
    crossed = layers_of(page, "output tok/s")[-1]["data"]["values"]
    assert [(row["at"], row["why"]) for row in crossed] == [(4, "failed: out_of_memory"), (32, "client_limited")]
    assert crossed[0]["value"] == 0
    assert crossed[1]["value"] == pytest.approx(rows[5].tok_s, rel=1e-4)
    (limited,) = layers_of(page, "output tok/s per GPU")[-1]["data"]["values"]
    assert limited["concurrency"] == 32


def test_speed_of_a_user_and_of_a_gpu_are_what_the_definitions_say(tmp_path: Path) -> None:
    rows = [replace(row, p50_tpot_s=0.02, tok_s=600.0) for row in synthetic.rows(replace(synthetic.GPU, gpus=2))]
    page = page_of(tmp_path, [row for row in rows if row.purpose == "concurrency"])
    for row in layers_of(page, "output tok/s per GPU")[2]["data"]["values"]:
        assert (row["user"], row["gpu"]) == (50.0, 300.0)


POINTS = st.lists(st.fixed_dictionaries({"user": st.integers(0, 9), "gpu": st.integers(0, 9)}), min_size=1)


@given(POINTS)
def test_frontier_is_what_no_level_beats_in_both(rows: list[dict[str, Any]]) -> None:
    def beaten(row: dict[str, Any]) -> bool:
        return any(o["user"] >= row["user"] and o["gpu"] >= row["gpu"] and o != row for o in rows)

    kept = {(row["user"], row["gpu"]) for row in frontier(rows)}
    assert kept == {(row["user"], row["gpu"]) for row in rows if not beaten(row)}


def rates() -> list[PointRow]:
    made = []
    for rate in (1, 4, 8):
        row = synthetic.load_row(synthetic.GPU, "rate", rate, 0)
        row = replace(row, concurrency=None, arrivals="poisson, 30 s", request_rate=float(rate), sweep="rate")
        made.append(replace(row, sent_qps=0.9 * rate, ended_qps=0.7 * rate, keeps_up=rate < 8))
    return made


def test_rates_have_charts_that_ring_where_the_server_lags(tmp_path: Path) -> None:
    lost = synthetic.failed(replace(rates()[2], point_id="lost", request_rate=16.0), "engine_dead")
    page = page_of(tmp_path, [*rates(), lost])
    for title in ("p95 e2e (s)", "p95 TTFT (s)", "requests ended a second"):
        layers = layers_of(page, title)
        (ringed,) = [one for one in layers if one["mark"].get("size") == 260]
        assert [row["at"] for row in ringed["data"]["values"]] == [8]
        crossed = [row for one in layers for row in one["data"]["values"] if "why" in row]
        assert [(row["at"], row["why"]) for row in crossed] == [(16, "failed: engine_dead")]
    dashed = layers_of(page, "requests ended a second")[-1]
    assert [row["value"] for row in dashed["data"]["values"]] == pytest.approx([0.9, 3.6, 7.2])
    for spec in charts(page):
        vl_convert.vegalite_to_svg(spec)
    words = " ".join(prose(page).split())
    assert "open loop (12 + 64 tokens): Up to which rate" in words.split("Throughput and latency")[0], "answer first"
    assert "it holds no levels of a closed loop" in words


def test_cells_are_what_arithmetic_says_and_marks_what_was_measured(tmp_path: Path) -> None:
    family = synthetic.family("qwen2.5-1.5b", synthetic.GPU)
    quiet, over = synthetic.envelope_row(family, 1024, 8), synthetic.envelope_row(family, 1024, 9, preemptions=3)
    pruned = synthetic.failed(synthetic.envelope_row(family, 512, 1), "", "all fit: 8 x 1024 tokens did", "pruned")
    lost = synthetic.failed(synthetic.envelope_row(family, 512, 40), "engine_dead")
    rows = [quiet, over, replace(pruned, failure_class=None), lost]
    page = page_of(tmp_path, rows, {"sessions": synthetic.planned(rows, family.config)})
    field, *marks = layers_of(page, "requests at once")
    assert sorted((c["length"], c["level"], c["expected"]) for c in field["data"]["values"]) == [
        (512, 1, "all fit"), (512, 40, "prompts do not fit"), (1024, 8, "all fit"), (1024, 9, "preempts")
    ]  # fmt: skip
    found = {row["level"]: (mark["mark"]["shape"], row["why"]) for mark in marks for row in mark["data"]["values"]}
    assert found.keys() == {8, 9, 40}, "a pruned cell has no mark"
    assert (found[8][0], found[9][0]) == ("circle", "triangle-up")
    assert found[40][1] == "failed: engine_dead"
    for spec in charts(page):
        vl_convert.vegalite_to_svg(spec)


def started(number: int, *phases: tuple[str, float]) -> SessionRow:
    made, begin = [], 0.0
    for name, seconds in phases:
        made.append(StartPhase(name, begin, seconds))
        begin += seconds
    at = f"2026-01-02T03:{number:02}:00Z"
    return SessionRow(5, "run", f"s{number}", 1, "measured", False, at, phases=made, start="cold")


def test_a_start_is_its_phases_one_after_the_other() -> None:
    tables = Tables((), tuple(started(n, ("imports", 8.0), ("weights", 1.0 + n), ("graphs", 0.5)) for n in range(50)))
    made = waterfall(tables)
    assert made is not None
    assert made.left_out == 50 - MOST_STARTS
    bars, ends = made.chart.spec["layer"]
    assert len(ends["data"]["values"]) == MOST_STARTS
    last = [row for row in bars["data"]["values"] if row["row"] == bars["data"]["values"][-1]["row"]]
    assert [(row["phase"], row["from"], row["to"]) for row in last] == [
        ("imports", 0.0, 8.0), ("weights", 8.0, 58.0), ("graphs", 58.0, 58.5)
    ]  # fmt: skip
    assert "<svg" in vl_convert.vegalite_to_svg(made.chart.spec)
    assert [key.words for key in made.chart.legend] == ["imports", "weights", "graphs"]
    assert waterfall(Tables((), (started(0),))) is None


def test_what_a_session_waited_and_lost_before_its_launch_stands_before_its_start() -> None:
    """A fork that was killed after 900 s is in no phase of the server that was started in its place."""
    waited = replace(started(0, ("imports", 8.0)), warm_wait_s=16.1, fork_lost_s=900.0)
    others = [replace(started(n, ("imports", 9.0 + n)), warm_wait_s=0.01) for n in range(1, MOST_STARTS + 1)]
    made = waterfall(Tables((), (waited, *others)))
    assert made is not None
    bars, ends = made.chart.spec["layer"]
    first = [row for row in bars["data"]["values"] if row["row"] == bars["data"]["values"][0]["row"]]
    assert [(row["phase"], row["from"], row["to"]) for row in first] == [
        ("wait for the import", -916.1, -900.0), ("lost fork", -900.0, 0.0), ("imports", 0.0, 8.0)
    ]  # fmt: skip
    assert ends["data"]["values"][0]["words"] == "8.0 s"
    assert [key.words for key in made.chart.legend] == ["wait for the import", "lost fork", "imports"]
    assert made.left_out == 1, "the one that took 8 s from its launch is not among the shortest"
    assert {row["phase"] for row in bars["data"]["values"][3:]} == {"imports"}, "10 ms are no wait"


# --- bounded ---


def binned(run: Path, samples: list[tuple[float, str, float | None]]) -> dict[str, Any]:
    columns = list(zip(*samples, strict=True)) or [(), (), ()]
    ids = {name: ["s" if name == "session_id" else "p"] * len(samples) for name in ("session_id", "point_id")}
    values = pa.array(columns[2], pa.float64())
    table = pa.table(
        {
            **ids,
            "t_s": pa.array(columns[0], pa.float64()),
            "device_id": pa.array(columns[1], pa.string()),
            "power_w": values,
        }
    )
    pq.write_table(table, run / "telemetry.parquet")
    return dict(telemetry(run, Clock(0.0, {("s", "p"): Place(0.0, "n", "c")}, {}), ["power_w"]))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.floats(0, 40_000), st.sampled_from(["a", "b"]), st.none() | NUMBERS), max_size=60))
def test_bins_lose_no_peak_and_no_card(tmp_path: Path, samples: list[tuple[float, str, float | None]]) -> None:
    found = binned(tmp_path, samples)
    known = [(at, card, value) for at, card, value in samples if value is not None]
    assert bool(found) == bool(known)
    bands: tuple[Band, ...] = found["power_w"].bands if found else ()
    assert {band.label for band in bands} == {card for _, card, _ in known}
    for band in bands:
        values = [value for _, card, value in known if card == band.label]
        bins = [one for segment in band.segments for one in segment]
        assert len(bins) <= BINS + 1
        assert (min(one.low for one in bins), max(one.high for one in bins)) == (min(values), max(values))
        assert all(one.low <= one.mean + 1e-6 and one.mean <= one.high + 1e-6 for one in bins)
        starts = [one.start_s for one in bins]
        assert starts == sorted(set(starts))


def test_gap_in_the_samples_is_a_gap_in_the_band(tmp_path: Path) -> None:
    (band,) = binned(tmp_path, [(0.0, "a", 1.0), (1.0, "a", 2.0), (9.0, "a", 3.0)])["power_w"].bands
    assert [[one.mean for one in segment] for segment in band.segments] == [[1.0, 2.0], [3.0]]


def test_hours_on_many_cards_fit_a_page(tmp_path: Path) -> None:
    load = synthetic.load_row(synthetic.GPU, "concurrency", 8, 0)
    cards = [TelemetryRow(60.0 * t, f"GPU-{g}", 20 << 30, float(t % 100), 300.0) for t in range(600) for g in range(64)]
    page = page_of(tmp_path, [replace(load, telemetry=cards)])
    assert len(page) < 1_500_000
    assert "all 64 cards together" in page
    assert "in bins of 120 s" in prose(page)


def test_foreign_telemetry_is_one_clear_message(tmp_path: Path) -> None:
    page_of(tmp_path, synthetic.rows()[:1])
    shutil.rmtree(tmp_path / "shards")
    pq.write_table(pa.table({"other": [1]}), tmp_path / "server_samples.parquet")
    with pytest.raises(AnalysisError, match=r"server_samples\.parquet: not a table of server_samples"):
        reduced(tmp_path)


# --- drawn ---


def browse(page: Path, profile: Path) -> tuple[str, str, list[str]]:
    """Return the page once drawn, the browser's log, and the addresses that the page asked for.

    The browser's own record tells its requests (`not an origin`) from a page's.
    """
    record = profile / "requests.json"
    options = [f"--user-data-dir={profile / 'profile'}", f"--log-net-log={record}", "--virtual-time-budget=20000"]
    done = subprocess.run(
        [str(CHROMIUM), *QUIET, *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    events = [event.get("params", {}) for event in json.loads(record.read_text())["events"]]
    asked = [event["url"] for event in events if event.get("initiator", "not an origin") != "not an origin"]
    return done.stdout, done.stderr, asked


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("rows", [synthetic.rows, hostile_rows], ids=["usual", "hostile"])
def test_browser_draws_it_without_a_word_or_a_request(tmp_path: Path, rows: Callable[[], list[PointRow]]) -> None:
    page = page_of(tmp_path, [sampled(row) if row.purpose == "concurrency" else row for row in rows()])
    dom, log, asked = browse(tmp_path / "report.html", tmp_path)
    assert re.sub(r"<script.*?</script>", "", dom, flags=re.DOTALL).count("<svg") == len(charts(page))
    assert "CONSOLE" not in log
    assert asked == []
