"""What limits a level: each verdict from its own signs, and none from signs that the rows do not hold."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.advice.limits import limit_in_short, signs_of
from analysis.advice.rules import rules_of_thumb
from analysis.load.anchors import with_drift
from analysis.load.load_curve import load_curves
from analysis.load.signs import signs
from analysis.load.verdicts import NEAR_FULL, Limit, Signs, limit
from analysis.memory.kv_envelope import Outcome, envelopes, outcome_of
from analysis.memory.kv_fit import kv_results
from analysis.pages.batching import batching_page
from contract.rows import PointRow
from tests import synthetic_run as synthetic
from tests.test_analysis_load import with_curve

QUIET = Signs(32, preemptions=0, waiting=0, running=32, kv_usage=0.4, request_share=0.02, flat=False)


@pytest.mark.parametrize(
    ("seen", "verdict"),
    [
        ({}, Limit.NOTHING),
        ({"flat": True}, Limit.COMPUTE),
        ({"flat": None}, Limit.UNKNOWN),
        ({"preemptions": 1}, Limit.KV),
        ({"waiting": 3, "running": 29, "kv_usage": 0.96}, Limit.KV),
        ({"waiting": 3, "running": 29, "kv_usage": 0.8, "request_share": 0.25}, Limit.KV),
        ({"waiting": 3, "running": 29, "kv_usage": 0.8, "request_share": None}, Limit.NOTHING),
        ({"waiting": 30, "kv_usage": 0.99}, Limit.NOTHING),  # for a step: all 32 then ran
        ({"waiting": 30, "kv_usage": 0.99, "flat": True}, Limit.COMPUTE),
        ({"waiting": 16, "running": 16, "kv_usage": 0.99, "max_num_seqs": 16}, Limit.QUEUE),  # all that may ran
        ({"waiting": 17, "running": 15, "kv_usage": 0.99, "max_num_seqs": 16}, Limit.KV),
        ({"waiting": 3, "running": None, "kv_usage": 0.99, "flat": True}, Limit.UNKNOWN),
        ({"waiting": 3, "running": 29, "kv_usage": None, "flat": True}, Limit.UNKNOWN),
        ({"waiting": 0, "kv_usage": 0.99}, Limit.NOTHING),
        ({"waiting": 3, "kv_usage": 0.8, "flat": True}, Limit.COMPUTE),
        ({"waiting": 16, "running": 16, "max_num_seqs": 16}, Limit.QUEUE),
        ({"waiting": 0, "running": 16, "max_num_seqs": 16}, Limit.NOTHING),
        ({"waiting": 22, "running": 32, "max_num_seqs": 32}, Limit.NOTHING),  # a seat for each: they wait for steps
        ({"waiting": 22, "running": 32, "max_num_seqs": 32, "flat": True}, Limit.COMPUTE),
        ({"waiting": 16, "running": 16, "flat": True}, Limit.UNKNOWN),
        ({"waiting": 16, "running": 16, "max_num_seqs": 64, "flat": True}, Limit.COMPUTE),
        ({"waiting": 16, "running": 16, "max_num_seqs": 16, "preemptions": 2}, Limit.KV),
        ({"slowed_by_neighbour": True, "flat": True}, Limit.NEIGHBOUR),
        ({"slowed_by_neighbour": True, "preemptions": 2}, Limit.KV),
        ({"flat": True, "preemptions": None}, Limit.UNKNOWN),
        ({"flat": True, "waiting": None}, Limit.UNKNOWN),
        ({"measured": False}, Limit.NOT_MEASURED),
        ({"measured": False, "client_limited": True, "preemptions": 9}, Limit.CLIENT),
        ({"client_limited": True}, Limit.NOTHING),
    ],
)
def test_verdict_follows_its_signs(seen: dict[str, object], verdict: Limit) -> None:
    assert limit(replace(QUIET, **seen)) is verdict


SEEN = st.builds(
    Signs,
    concurrency=st.integers(1, 40),
    preemptions=st.sampled_from([None, 0, 1]),
    waiting=st.none() | st.integers(0, 40),
    running=st.none() | st.integers(0, 40),
    kv_usage=st.sampled_from([None, 0.4, 0.9, 0.96]),
    request_share=st.sampled_from([None, 0.05, 0.2]),
    max_num_seqs=st.none() | st.integers(1, 40),
    flat=st.none() | st.booleans(),
)


@given(SEEN)
def test_a_level_is_kv_bound_where_the_envelope_says_that_it_did_not_fit(seen: Signs) -> None:
    overflowed = outcome_of(seen) in (Outcome.PREEMPTED, Outcome.WAITED)
    assert (limit(seen) is Limit.KV) == overflowed


@given(SEEN)
def test_nobody_lacks_a_seat_where_there_is_one_for_each(seen: Signs) -> None:
    if limit(seen) is Limit.QUEUE:
        assert seen.max_num_seqs is not None
        assert seen.max_num_seqs < seen.concurrency


def sweep(flat_from: int = 64, repeats: int = 3) -> list[PointRow]:
    """Return a sweep whose tok/s is flat from a level on, repeats half a percent apart."""
    rows = []
    for level in (1, 2, 4, 8, 16, 32):
        for repeat in range(repeats):
            row, factor = synthetic.load_row(synthetic.GPU, "concurrency", level, repeat), 1.005 ** (repeat - 1)
            rows.append(
                replace(row, tok_s=100.0 * min(level, flat_from) * factor, p95_e2e_s=0.1 * max(level, flat_from))
            )
    return rows


def at(level: int, **columns: object) -> Callable[[list[PointRow]], list[PointRow]]:
    return lambda rows: synthetic.changed(rows, lambda row: row.concurrency == level, **columns)


def section(rows: list[PointRow]) -> str:
    made = batching_page(with_drift(synthetic.tables_of(rows)))
    assert made is not None
    return made.text().split("## What limits each level")[1].split("\n## ")[0]


def line(text: str, level: int) -> str:
    (found,) = [line for line in text.splitlines() if line.startswith(f"| {level} |")]
    return found


def test_rising_throughput_is_not_saturated() -> None:
    text = section(sweep())
    assert "| 32 | not saturated |" in line(text, 32)
    assert "not saturated by this load up to concurrency 32; `+sweep=concurrency` with higher levels" in text
    assert "at least 2,161 requests of this load held at once (arithmetic); measured knee: none yet." in text


def test_the_short_verdict_is_the_verdict_and_speaks_of_no_level_that_was_not_measured() -> None:
    def short(rows: list[PointRow]) -> str:
        (curve,) = load_curves(synthetic.tables_of(rows).points, "concurrency")
        return limit_in_short(curve, {}).text

    assert short(sweep()) == "not saturated up to concurrency 32"
    assert short(sweep(flat_from=8)) == "compute-bound from concurrency 8 on"
    lost = [synthetic.failed(row, "engine_dead") if row.concurrency == 32 else row for row in sweep()]
    assert short(lost) == "not saturated up to concurrency 16, higher levels not measured"
    assert short(sweep(repeats=1)) == "not known from this run"
    assert short([synthetic.failed(row, "engine_dead") for row in sweep()]) == "not known from this run"


def test_a_level_out_of_a_knees_band_is_not_saturated_whether_there_is_a_knee_or_not() -> None:
    """A doubling that gains 9 % is the rule's 10 % within noise, yet 16 is out of 5 % of the highest either way."""
    tok_s = {2: 312.6, 4: 460.8, 8: 601.0, 16: 710.7, 32: 775.0}
    text = section(with_curve(tok_s, dict.fromkeys(tok_s, 0.5), noise=0.013))
    assert "| 16 | not saturated |" in line(text, 16)
    assert "| 32 | not known |" in line(text, 32)


def test_levels_that_span_no_doubling_are_held_against_a_knees_band() -> None:
    tok_s = {10: 100.0, 12: 101.0, 15: 108.0}
    text = section(with_curve(tok_s, dict.fromkeys(tok_s, 0.5), noise=0.002))
    assert "| 12 | not saturated |" in line(text, 12)
    assert "| 15 | not known |" in line(text, 15)


@given(st.integers(0, 10_000))
def test_what_is_ruled_out_as_a_knee_is_not_saturated_where_the_knee_is_undecided(seed: int) -> None:
    """Several levels together may rule one out that none of them alone beats beyond noise."""
    chance, tok_s = random.Random(seed), {8: 100.0, 10: 102.0, 12: 106.0, 14: 110.0, 16: 111.0}
    rows = with_curve(tok_s, dict.fromkeys(tok_s, 0.5))
    rows = [replace(row, tok_s=(row.tok_s or 0) * math.exp(chance.gauss(0, 0.03))) for row in rows]
    (curve,) = load_curves(synthetic.tables_of(rows).points, "concurrency")
    if curve.knee.if_any:
        ruled_out = [reading for reading in curve.levels if reading.at < curve.knee.if_any[0]]
        assert all(signs(curve, reading, None).flat is False for reading in ruled_out)


def test_flat_throughput_with_nothing_waiting_is_compute_bound() -> None:
    text = section(sweep(flat_from=8))
    assert "| 4 | not saturated |" in line(text, 4)
    assert "| 8 | compute-bound |" in line(text, 8)
    assert "This server is **compute-bound** under this load from concurrency 8 on." in text
    assert "measured knee: above concurrency 4 and up to 8." in text


def test_computing_is_the_limit_of_the_levels_tested_where_a_higher_one_may_give_more() -> None:
    tok_s = {1: 100.0, 2: 200.0, 4: 380.0, 8: 405.0, 9: 406.0}
    rows = with_curve(tok_s, {1: 0.1, 2: 0.1, 4: 0.1, 8: 0.2, 9: 0.3})
    tested = (
        " (of the levels tested; whether a higher one gives more, `+sweep=concurrency` with higher levels in "
        "`sweep.concurrency`, or `+sweep=knee`, tells)."
    )
    text = section(rows)
    assert line(text, 9).startswith("| 9 | compute-bound |")
    assert "at the knee of the levels tested or past it; no preemption" in line(text, 9)
    assert "This server is **compute-bound** under this load from concurrency 8 on" + tested in text
    assert "measured knee: above concurrency 4 and up to 8" + tested in text
    tables = synthetic.tables_of(rows)
    (curve,) = load_curves(tables.points, "concurrency")
    assert limit_in_short(curve, {}).text == "compute-bound from concurrency 8 on, of the levels tested"
    beyond = "Beyond concurrency 8 more requests mostly cost latency, of the levels tested (prompts"
    assert beyond in " ".join(rule.text for rule in rules_of_thumb(tables))
    full = section(at(9, preemptions=5)(rows))
    assert "This server is **KV-bound** under this load from concurrency 9 on." in full


def test_a_power_cap_stands_beside_the_verdict() -> None:
    drawn = {"energy_j": 693.0, "duration_s": 1.0, "power_limit_w": 700.0}
    rows = at(32, throttle_reasons=["power cap"], **drawn)(sweep(flat_from=8))
    text = section(rows)
    capped = "clock held down at times: power cap"
    assert line(text, 32).endswith(f"no wait for KV, no full queue; {capped}; 99.0 % of the power limit drawn |")
    assert f"from concurrency 8 on. At concurrency 32: {capped}, 99.0 % of the power limit drawn." in text
    assert "power cap" not in line(text, 16)
    once = section([row for row in rows if row.repeat == 0])
    assert f"not KV; not the queue; {capped}; 99.0 % of the power limit drawn |" in line(once, 32)
    unread = {"energy_j": None, "power_w": None, "throttle_reasons": None}
    assert "of the power limit" not in section(synthetic.changed(rows, lambda row: True, **unread))
    simulated = synthetic.changed(rows, lambda row: True, simulated=True)
    assert "of the power limit drawn" not in section(simulated)


def test_full_pool_is_kv_bound_with_its_evidence() -> None:
    rows = at(32, preemptions=5, waiting_capacity_max=7, running_max=26, kv_usage_max=0.97)(sweep(flat_from=8))
    text = section(rows)
    evidence = "5 preemptions; at most 26 ran at once, up to 7 waited, and up to 97.0 % of the pool was in use"
    assert f"| 32 | KV-bound | 26 | 7 | 97.0 % | 5 | {evidence} |" in text
    assert "This server is **KV-bound** under this load from concurrency 32 on." in text


def test_requests_that_wait_for_a_step_and_then_all_run_in_a_full_pool_lack_no_kv() -> None:
    text = section(at(32, waiting_max=30, kv_usage_max=0.97)(sweep(flat_from=8)))
    assert "| 32 | compute-bound | 32 | 30 | 97.0 % | 0 | at the knee or past it; no preemption, no wait for KV" in text


def test_a_seat_for_each_request_is_no_full_queue() -> None:
    waited = at(32, waiting_max=22)(sweep(flat_from=8))
    text = section(synthetic.changed(waited, lambda row: True, max_num_seqs=32))
    assert "| 32 | compute-bound | 32 | 22 |" in text
    assert "queue-bound |" not in text


@pytest.mark.parametrize("name", ["tiny-sliding", "tiny-linear"])
def test_benchmark_and_notes_say_the_same_of_every_near_full_level(name: str) -> None:
    """Of windows a request takes less than the engine's count of it: what is one more request hangs on that."""
    shape = synthetic.family(name, synthetic.CPU)
    memory = [synthetic.utilization_row(shape, length) for length in shape.lengths]
    for usage in [n / 100 for n in range(80, 100)]:
        columns = {"waiting_max": 3, "running_max": 14, "kv_usage_max": usage, "preemptions": 0}
        ladder = [replace(synthetic.ladder_row(shape, 16), **columns)]
        tables = synthetic.tables_of([*memory, *ladder], shape.config)
        (curve,) = load_curves(tables.points, "near_full_context")
        ((_, seen),) = signs_of(curve, tables.configs)
        (result,) = kv_results(tables.points)
        (level,) = [level for pool in envelopes(result, tables.points, tables.configs) for level in pool.levels]
        assert (limit(seen) is Limit.KV) == (level.outcome is Outcome.WAITED)
        layout = shape.layout()
        assert layout is not None
        blocks = layout.num_blocks(curve.series.sample.engine_kv_bytes or 0) - 1
        one = layout.blocks_at_once(16, 4064) / 16 / blocks
        assert (limit(seen) is Limit.KV) == (usage >= NEAR_FULL or usage + one > 1)


def test_a_full_pool_in_which_all_that_may_ran_is_queue_bound_and_the_rule_says_so() -> None:
    rows = at(32, running_max=8, waiting_max=24, kv_usage_max=0.97)(sweep(flat_from=8))
    text = section(synthetic.changed(rows, lambda row: True, max_num_seqs=8))
    assert "| 32 | queue-bound | 8 | 24 | 97.0 % |" in text
    assert "so that never all that may (max_num_seqs) ran at once" in text
    assert "*queue-bound*: more were in flight than max_num_seqs, as many as that ran, and others waited." in text


def test_full_queue_needs_max_num_seqs() -> None:
    stuck = at(32, running_max=8, waiting_max=24)(sweep(flat_from=8))
    known = synthetic.changed(stuck, lambda row: True, max_num_seqs=8)
    assert "| 32 | queue-bound | 8 | 24 | 1.0 % | 0 | max_num_seqs is 8, and up to 24 waited |" in section(known)
    left = section(stuck)
    assert "| 32 | not known |" in left
    assert "requests were held back and max_num_seqs was left to vLLM: the queue or the computing" in left
    assert "What limits this server under this load is not known from this run" in left


@pytest.mark.parametrize(
    ("failure_class", "why", "tells"),
    [
        (
            "client_limited",
            "whether the host had more for it is not known",
            "the same sweep again tells whether it had.",
        ),
        (
            "client_cores_few",
            "the host had no cores for more of it",
            "a host with more free cores (or CPU quota) tells.",
        ),
        (
            "client_streams_few",
            "with a process for every few of its streams",
            "with nothing else busy on the host may tell.",
        ),
        ("client_sockets", "its host had no files or ports left", "a host with more of what its message names tells."),
        ("client_processes_fixed", "with as many processes as `load.processes` names", "`load.processes=auto` tells."),
        ("client_processes_few", "the host had cores for more processes", "which tries again, may tell."),
        ("of a later version", "whether the host had more for it is not known", "the same sweep again tells"),
    ],
)
def test_limited_client_is_no_verdict_on_the_server_and_says_what_would_tell(
    failure_class: str, why: str, tells: str
) -> None:
    rows = at(32, status="client_limited", failure_class=failure_class)(sweep())
    text = section(rows)
    assert "| 32 | client-bound |" in line(text, 32)
    assert why in line(text, 32)
    assert "From concurrency 32 on the load client was the limit: what limits the server there is not known" in text
    assert tells in text


def test_neighbour_is_blamed_only_where_a_repeat_ran_without_it() -> None:
    beside = ["other-session"]
    rows = synthetic.changed(sweep(), lambda r: (r.concurrency, r.repeat) == (16, 2), co_running_sessions=beside)
    slower = synthetic.changed(rows, lambda r: bool(r.co_running_sessions), tok_s=1300.0)
    assert "| 16 | neighbour-bound |" in line(section(slower), 16)
    assert re.search(
        r"tok_s -\d+\.\d % beside another session on the host against alone, beyond noise", section(slower)
    )
    assert "neighbour-bound |" not in section(rows)
    always = at(16, co_running_sessions=beside)(sweep())
    assert "Other sessions ran on the host at levels of which no repeat ran alone" in section(always)
    assert "neighbour-bound |" not in section(always)


def test_a_neighbour_that_costs_nothing_is_hardly_ever_blamed_at_any_of_six_levels() -> None:
    blamed, chance = 0, random.Random(4)
    rows = [replace(r, co_running_sessions=["other"] if (r.repeat or 0) < 2 else [], requests=[], telemetry=[])
            for r in sweep(repeats=4)]  # fmt: skip
    for _ in range(200):
        scattered = [replace(r, tok_s=100.0 * (r.concurrency or 0) * math.exp(chance.gauss(0, 0.02))) for r in rows]
        (curve,) = load_curves(synthetic.tables_of(scattered).points, "concurrency")
        blamed += any(signs(curve, reading, None).slowed_by_neighbour for reading in curve.levels)
    assert blamed <= 0.09 * 200  # 5 %, and chance; at 5 % a level it was 26 %


def test_neighbour_is_not_blamed_for_what_the_session_drifted_by() -> None:
    """The repeat beside another session came last, and the anchor had moved by as much meanwhile."""
    rows = synthetic.changed(
        sweep(), lambda r: (r.concurrency, r.repeat) == (16, 2), tok_s=1300.0, co_running_sessions=["other-session"],
        started_at="2099-01-01T00:00:00.000+00:00",
    )  # fmt: skip
    drifted = [
        replace(
            synthetic.load_row(synthetic.GPU, "anchor", 8, n), tok_s=tok_s, started_at=f"2026-01-02T03:{4 + n:02}:00Z"
        )
        for n, tok_s in enumerate((900.0, 600.0))
    ]
    steady = [replace(row, tok_s=900.0) for row in drifted]
    assert "| 16 | neighbour-bound |" in section([*rows, *steady])
    assert "neighbour-bound |" not in section([*rows, *drifted])


def test_one_repeat_gives_no_verdict_on_the_computing() -> None:
    text = section(sweep(flat_from=8, repeats=1))
    assert text.count("no repeats, so whether tok_s is flat is not known") == 7
    assert "As it stands, at concurrency 32: the last doubling changed tok_s by 0.0 %, not KV, not the queue, " in text
    full = section(at(32, running_max=20, waiting_max=12, kv_usage_max=None)(sweep(flat_from=8, repeats=1)))
    assert "not KV" not in line(full, 32)
    assert "not the queue" not in line(full, 32)
    assert "`+sweep=concurrency` with `sweep.repeats` of three or more tells" in text
    assert "compute-bound |" not in text


def test_near_full_levels_name_their_own_sweep() -> None:
    rows = [row for row in synthetic.rows() if row.purpose == "near_full_context" and (row.concurrency or 0) <= 8]
    assert "`+sweep=capacity` with `sweep.near_full_context.repeats` of three or more tells" in section(rows)


def test_all_failed_gives_no_verdict() -> None:
    text = section([synthetic.failed(row, "engine_dead") for row in sweep()])
    assert text.count("| not measured |") == 6
    assert "not known from this run: no level was measured" in text


def test_simulated_verdicts_say_so() -> None:
    rows = synthetic.changed(sweep(), lambda row: True, simulated=True, engine="sim", device="sim", device_name="SIM")
    made = batching_page(with_drift(synthetic.tables_of(rows)))
    assert made is not None
    synthetic.assert_every_table_row_says_simulated(made.text())


def test_run_without_load_names_the_sweep() -> None:
    rows = [row for row in synthetic.rows() if row.purpose == "comparison"]
    assert "it holds neither a sweep of levels nor near-full contexts; `+sweep=capacity` measures both." in section(
        rows
    )
