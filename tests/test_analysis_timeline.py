"""The timeline: bars that never overlap, phases that add up to their bar, cards by their names, a picture that says so.

The drawn run has two nodes, a server on two cards, one that failed, and one that never ended.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis import reduce
from analysis.errors import AnalysisError
from analysis.pages.timeline import Bar, bars_of, card_labels, lanes, read_utilization, utilization_lines
from analysis.rows.tables import Tables
from contract.rows import SessionRow, TelemetryRow, to_table
from tests import synthetic_run as synthetic

FIRST, SECOND = "GPU-1160ada8-aff3-94dd-9fe8-475f24c90713", "GPU-e62741b5-c1c7-aef9-3b9a-6fb57a8671c5"
SPANS = st.tuples(st.integers(0, 40), st.integers(0, 15)).map(lambda pair: (pair[0], pair[0] + pair[1]))
SECONDS = st.none() | st.floats(0, 1e5)


def session(**columns: object) -> SessionRow:
    row = replace(synthetic.rows()[0], started_at="2026-01-02T03:04:05Z")
    return replace(synthetic.session_of(row, "2026-01-02T03:05:05+00:00"), **columns)


@given(st.lists(SPANS, max_size=30))
def test_bars_in_a_lane_never_overlap_and_no_lane_is_wasted(spans: list[tuple[int, int]]) -> None:
    chosen = lanes(spans)
    for (one, lane), (other, its_lane) in combinations(zip(spans, chosen, strict=True), 2):
        overlap = min(one[1], other[1]) > max(one[0], other[0])
        assert not (overlap and lane == its_lane)
    at_once = [sum(start <= at < end for start, end in spans) for at, _ in spans]
    instants = len({span for span in spans if span[0] == span[1]})
    assert len(set(chosen)) <= max(at_once, default=0) + instants


@given(st.floats(0, 1e5), SECONDS, SECONDS, SECONDS)
def test_phases_add_up_to_the_bar(whole: float, ready: float | None, stop: float | None, back: float | None) -> None:
    bar = Bar(session(ready_s=ready, stop_s=stop, memory_back_s=back), 5.0, 5.0 + whole, "")
    phases = list(bar.phases.values())
    assert all(length >= 0 for _, length in phases)
    assert math.isclose(sum(length for _, length in phases), bar.end_s - bar.start_s, abs_tol=1e-9)
    assert phases[0][0] == bar.start_s
    for (start, length), (following, _) in pairwise(phases):
        assert math.isclose(start + length, following, abs_tol=1e-9)


def test_server_that_never_was_ready_only_started() -> None:
    bar = Bar(session(ready_s=None, stop_s=2.0, memory_back_s=None, status="failed"), 0.0, 60.0, "failed")
    assert bar.phases == {"starting": (0.0, 58.0), "measuring": (58.0, 0.0), "stopping": (58.0, 2.0)}


def test_cards_have_the_number_of_the_log_and_none_that_nobody_gave_them() -> None:
    both = session(device_ids=[SECOND, FIRST])
    assert list(card_labels([both]).values()) == ["GPU 1160ada8", "GPU e62741b5"]
    named = replace(both, visible_devices=["GPU-e62741b5", "GPU-1160ada8"])
    assert list(card_labels([named]).values()) == ["GPU 1160ada8", "GPU e62741b5"]
    numbered = replace(both, visible_devices=["2", "10"])
    assert list(card_labels([numbered, replace(both, device_ids=[FIRST])]).values()) == [
        "GPU 2 (e62741b5)",
        "GPU 10 (1160ada8)",
    ]
    assert list(card_labels([session(device_ids=["host"])]).values()) == ["host"]
    assert list(card_labels([session(device_ids=["SIM-3"], visible_devices=["3"])]).values()) == ["SIM-3"]
    assert list(card_labels([session(device_ids=[])]).values()) == ["no card"]
    elsewhere = session(device_ids=[FIRST], node="node-b")
    assert list(card_labels([elsewhere, both]).values()) == [
        "node-a GPU 1160ada8",
        "node-a GPU e62741b5",
        "node-b GPU 1160ada8",
    ]


def test_cards_whose_ids_begin_alike_are_told_apart_by_all_of_them() -> None:
    slices = ["MIG-GPU-1160ada8/7/0", "MIG-GPU-1160ada8/8/0"]
    assert list(card_labels([session(device_ids=slices)]).values()) == slices


def test_bars_say_what_they_are_and_need_two_moments() -> None:
    tables = synthetic.tables_of(synthetic.rows())
    sessions = [
        session(session_id="session-load", started_at="2026-01-02T03:04:15"),
        session(session_id="session-c512"),
        session(session_id="session-u4096", status="failed", started_at="2026-01-02T04:04:20.5+01:00"),
        session(session_id="session-u512", ended_at=None),
        session(session_id="session-u1024", started_at="yesterday"),
    ]
    origin, bars = bars_of(Tables(tables.points, tuple(sessions)))
    assert origin == 1767323045.0
    assert [(bar.start_s, bar.end_s, bar.words) for bar in bars] == [
        (0.0, 60.0, "512, committed"),
        (10.0, 60.0, "load"),
        (15.5, 60.0, "failed"),
    ]


def test_utilization_is_averaged_by_bin_and_broken_between_points() -> None:
    points = [
        replace(point, started_at=f"2026-01-02T03:04:{second}Z", node="node-a")
        for point, second in zip(synthetic.tables_of(synthetic.rows()).points[:2], ("15", "05"), strict=True)
    ]
    later, earlier = ((point.session_id, point.point_id, "GPU-0") for point in points)
    samples = [(*later, 0.0, 10.0), (*later, 0.5, 30.0), (*later, 1.5, 50.0), (*earlier, 0.0, 90.0)]
    samples.append(("another", "point", "GPU-0", 0.0, 1.0))
    (line,) = utilization_lines(samples, points, 1767323045.0, 1.0).values()
    assert [x for x, _ in line if not math.isnan(x)] == [0.0, 10.25, 11.5]
    assert [y for _, y in line if not math.isnan(y)] == [90.0, 20.0, 50.0]
    assert [math.isnan(y) for _, y in line] == [False, True, False, False, True]


def test_telemetry_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    assert read_utilization(tmp_path) == []
    pq.write_table(pa.table({"t_s": [1.0]}), tmp_path / "telemetry.parquet")
    with pytest.raises(AnalysisError, match=r"telemetry\.parquet: not a table of telemetry"):
        read_utilization(tmp_path)


def write_run(run: Path, shape: synthetic.Shape, telemetry: bool = True) -> Path:
    """Write four sessions of a point each, a minute apart: on one card, on another, on both (failed), never ended."""
    rows = synthetic.rows(shape)[:4]
    held = [["host"]] * 4 if shape.device == "cpu" else [[FIRST], [SECOND], [FIRST, SECOND], [FIRST]]
    for minute, (row, devices) in enumerate(zip(rows, held, strict=True)):
        samples = [TelemetryRow(t / 10, device, utilization_pct=60.0 + t) for t in range(20) for device in devices]
        row = replace(
            row, started_at=f"2026-01-02T03:{minute:02}:50Z", device_ids=devices, telemetry=samples if telemetry else []
        )
        synthetic.write_run(run, [row])
        ended = replace(
            synthetic.session_of(row, None if minute == 3 else f"2026-01-02T03:{minute:02}:58Z"),
            started_at=f"2026-01-02T03:{minute:02}:05Z",
            status="failed" if minute == 2 else "measured",
        )
        pq.write_table(to_table([ended], SessionRow), run / "shards" / row.session_id / "session.parquet")
    return run


def words_of(run: Path) -> str:
    return "\n".join(ET.parse(run / "plots/timeline.svg").getroot().itertext())


def test_timeline_shows_cards_phases_and_utilization_and_is_the_same_again(tmp_path: Path) -> None:
    run = write_run(tmp_path, synthetic.GPU)
    assert run / "plots/timeline.svg" in reduce(run)
    words = words_of(run)
    for expected in ("What ran when", "phi-3-mini-4k", "dummy weights", "GPU 1160ada8", "GPU e62741b5"):
        assert expected in words
    for expected in ("starting", "measuring", "stopping", "512, committed", "failed", "GPU utilisation (%)"):
        assert expected in words
    assert "read only" in words, "a card beside one that loads is not shown as idle"
    assert "simulated" not in words
    assert "4096" not in words  # never ended
    first = (run / "plots/timeline.svg").read_bytes()
    reduce(run)
    assert (run / "plots/timeline.svg").read_bytes() == first


def test_simulated_timeline_says_so(tmp_path: Path) -> None:
    shape = replace(synthetic.GPU, simulated=True, engine="sim", device="sim", device_name=None)
    reduce(write_run(tmp_path, shape))
    assert "simulated" in words_of(tmp_path)


def test_host_has_no_panel_of_utilization(tmp_path: Path) -> None:
    reduce(write_run(tmp_path, synthetic.CPU, telemetry=False))
    words = words_of(tmp_path)
    assert "host" in words
    assert "utilisation" not in words


def test_timeline_of_an_earlier_state_does_not_stay(tmp_path: Path) -> None:
    run = synthetic.write_run(tmp_path, synthetic.rows()[:2])
    (run / "plots").mkdir()
    (run / "plots/timeline.svg").write_text("old")
    reduce(run)
    assert not (run / "plots/timeline.svg").exists()
