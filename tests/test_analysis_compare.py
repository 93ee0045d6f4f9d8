"""compare and drift: what is held against what, how sure a difference is, and that CI is not woken by noise."""

from __future__ import annotations

import json
import math
import random
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis import AnalysisError, reduce
from analysis.__main__ import main
from analysis.comparing.compare import Comparison, against, compare
from analysis.comparing.difference_rows import what_differs
from analysis.comparing.differences import Difference, Verdict, differences
from analysis.comparing.drift import THRESHOLD, Drift, drift_of
from analysis.comparing.matching import Pair, matched, only_pairs
from analysis.comparing.runs import Run
from contract.rows import PointRow
from tests import synthetic_run as synthetic

LEVELS = (1, 4, 8, 16, 32)
METRICS = 4


@cache
def level_row(level: int, repeat: int) -> PointRow:
    row = synthetic.load_row(synthetic.GPU, "concurrency", level, repeat)
    return replace(row, requests=[], telemetry=[], server_samples=[])


def points(
    repeats: int = 3,
    seed: int = 0,
    noise: float | Mapping[int, float] = 0.02,
    factor: float = 1.0,
    **columns: object,
) -> list[PointRow]:
    """Return levels whose repeats scatter by `noise` (or each by its own), tok/s times `factor`, latencies over it."""
    chance = random.Random(seed)
    made = []
    for level in LEVELS:
        for repeat in range(repeats):
            row = level_row(level, repeat)
            sd = noise[level] if isinstance(noise, Mapping) else noise
            scatter = [math.exp(chance.gauss(0, sd)) for _ in range(METRICS)]
            made.append(
                replace(
                    row,
                    tok_s=100 * level**0.5 * factor * scatter[0],
                    p95_e2e_s=level**0.5 / factor * scatter[1],
                    p95_ttft_s=0.1 * level**0.5 / factor * scatter[2],
                    p95_tpot_s=0.01 * level**0.5 / factor * scatter[3],
                    **columns,
                )
            )
    return made


def run(rows: list[PointRow], name: str = "run", **manifest: object) -> Run:
    return Run(name, Path(name), synthetic.tables_of(rows), manifest)


def pairs(base: Run, other: Run, same_server: bool = True) -> list[Pair]:
    return matched(base, other, same_server).pairs


def found(base: list[PointRow], other: list[PointRow], together: bool = False) -> list[Difference]:
    return differences(pairs(run(base), run(other)), together)


def written(directory: Path, rows: list[PointRow], **manifest: object) -> Path:
    synthetic.write_tables(directory, rows)
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


# --- which are held against each other ---

ITEMS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)), max_size=8)
KEYS: list[Callable[[tuple[int, int, int]], Any]] = [lambda i: i, lambda i: i[:2], lambda i: i[:1]]


@given(ITEMS, ITEMS)
def test_an_item_is_in_one_pair_at_most_and_twins_find_each_other(base: list[Any], other: list[Any]) -> None:
    paired = list(only_pairs(base, other, KEYS))
    for side, items in enumerate((base, other)):
        mine = [pair[side] for pair in paired]
        assert all(mine.count(item) <= items.count(item) for item in mine)
    assert all(one[0] == another[0] for one, another in paired)
    for item in base:
        if base.count(item) == other.count(item) == 1:
            assert (item, item) in paired


@given(ITEMS, ITEMS, st.randoms())
def test_pairs_hang_on_neither_order_nor_side(base: list[Any], other: list[Any], chance: random.Random) -> None:
    paired = sorted(only_pairs(base, other, KEYS))
    assert sorted((one, another) for another, one in only_pairs(other, base, KEYS)) == paired
    chance.shuffle(base)
    assert sorted(only_pairs(base, other, KEYS)) == paired


def test_the_same_server_is_found_among_others_and_versions_may_differ() -> None:
    small, large = points(max_num_seqs=8), points(max_num_seqs=64)
    newer = [replace(row, vllm_version="0.26.0", device_name="NVIDIA H200") for row in [*large, *small]]
    matched = pairs(run([*small, *large]), run(newer), same_server=True)
    assert [(p.base.sample.max_num_seqs, p.other.sample.max_num_seqs) for p in matched] == [(8, 8), (64, 64)]
    assert all(not pair.reconfigured and len(pair.levels) == len(LEVELS) for pair in matched)


def test_another_server_is_compared_by_name_and_never_called_drift() -> None:
    base, other = run(points(max_num_seqs=8), "a"), run(points(max_num_seqs=64, model="other"), "b")
    (pair,) = pairs(base, other, same_server=False)
    assert pair.reconfigured == [("model", "phi-3-mini-4k", "other"), ("max_num_seqs", 8, 64)]
    with pytest.raises(AnalysisError, match="no point in common: model phi-3-mini-4k against other"):
        drift_of(base, other)


def test_what_was_not_set_is_called_so() -> None:
    base, other = run(points(max_num_seqs=None), "a"), run(points(max_num_seqs=32), "b")
    (differing,) = what_differs(base, other, pairs(base, other, same_server=False))
    assert (differing["what"], differing["base"], differing["other"]) == ("max_num_seqs", "not set", "32")
    with pytest.raises(AnalysisError, match="max_num_seqs not set against 32"):
        drift_of(base, other)


def test_memory_of_another_model_is_not_held_against_this_one() -> None:
    base, other = synthetic.rows()[:8], synthetic.rows(replace(synthetic.GPU, model="other"))[:8]
    assert len(pairs(run(base), run(base), same_server=False)) == 2
    with pytest.raises(AnalysisError, match="no point in common"):
        against(run(base), run(other))


def test_only_levels_that_both_measured_are_compared_and_the_others_are_named() -> None:
    lost = synthetic.changed(points(), lambda row: row.concurrency == 8, status="failed", failure_class="engine_dead")
    fewer = [row for row in lost if row.concurrency != 4]
    found = matched(run(points()), run(fewer), same_server=True)
    assert [reading.at for reading, _ in found.pairs[0].levels] == [1, 16, 32]
    assert [(m.at, m.failed, m.why) for m in found.missing] == [
        (4, False, "no row of it"),
        (8, True, "failed: engine_dead"),
    ]
    assert not matched(run(fewer), run(points()), same_server=True).missing, "what only the run has is no loss"


BECAME: dict[str, tuple[dict[str, object], bool]] = {
    "failed: engine_dead": ({"status": "failed", "failure_class": "engine_dead"}, True),
    "kv_too_small": ({"status": "kv_too_small", "failure_class": "kv_too_small"}, True),
    "failed: not_tried": ({"status": "failed", "failure_class": "not_tried"}, False),
    "failed: stopped": ({"status": "failed", "failure_class": "stopped"}, False),
    "client_limited: client_cores_few": ({"status": "client_limited", "failure_class": "client_cores_few"}, False),
    "over_budget": ({"status": "over_budget"}, False),
    "pruned": ({"status": "pruned"}, False),
}


@pytest.mark.parametrize("why", BECAME)
def test_what_was_tried_in_vain_is_drift_and_what_was_not_tried_is_named(why: str) -> None:
    columns, failed = BECAME[why]
    lost = synthetic.changed(points(seed=2), lambda row: (row.concurrency or 0) >= 16, **columns)
    made = drifted(points(seed=1), lost)
    assert made.worse == failed
    assert not made.drifted
    assert f"concurrency, 12 + 64 tokens, at concurrency 16, 32: {why}\n" in made.text()
    counted = f"which is drift: {2 if failed else 0}. Not measured for another reason: {0 if failed else 2}."
    assert counted in made.text()
    told = made.as_json()
    assert told["drifted"] == failed
    assert [(m["concurrency"], m["failed"], m["why"]) for m in told["missing"]] == [
        (16, failed, why),
        (32, failed, why),
    ]


def test_a_model_or_a_server_that_did_not_start_is_drift() -> None:
    """Its rows know neither card nor version, for it never came so far."""
    unknown = {"device_name": None, "vllm_version": None, "status": "failed", "failure_class": "start_failed"}
    ours, theirs = points(), [replace(row, model="other") for row in points()]
    dead = [replace(row, **unknown) for row in theirs]
    made = drifted([*ours, *theirs], [*ours, *dead])
    assert made.worse
    assert [(m.series.sample.model, m.why) for m in made.failed] == [("other", "failed: start_failed")] * len(LEVELS)
    gone = drifted([*ours, *theirs], ours)
    assert not gone.worse
    assert "new has no measurement of what base has: other" in gone.text()
    assert "at concurrency 1, 4, 8, 16, 32: no row of it" in gone.text()
    large = points(max_num_seqs=64)
    assert drifted([*points(max_num_seqs=8), *large], [*points(max_num_seqs=8), *dead]).failed == []
    assert drifted(large, [replace(row, **unknown) for row in large]).worse, "nothing at all was measured"


INCOMPARABLE = {
    "load": (points(prompt_tokens=512), {}, "prompt_tokens 12 against 512"),
    "level": (list(points(concurrency=3)), {}, "concurrency 1, 16, 32, 4 … against 3"),
    "simulated": (points(simulated=True), {}, "a is measured and b is simulated"),
    "workload version": (points(), {"workload_version": 1}, "a has workload version 2 and b 1"),
    "nothing begun": (points(status="failed", failure_class="not_tried"), {}, "one of them holds no measured point"),
}


@pytest.mark.parametrize("kind", INCOMPARABLE)
def test_runs_that_cannot_be_compared_are_one_clear_message(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, manifest, words = INCOMPARABLE[kind]
    a = written(tmp_path / "a", points(), workload_version=2)
    b = written(tmp_path / "b", rows, **({"workload_version": 2} | manifest))
    for command in ("compare", "drift"):
        assert main([command, str(a), str(b)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert words in captured.err


# --- how sure a difference is ---


T_20, T_4 = 2.085963, 2.776445


@pytest.mark.parametrize("noise", [0.02, {1: 0.01, 4: 0.01, 8: 0.01, 16: 0.01, 32: 0.08}])
def test_the_difference_is_of_geometric_means_with_the_wider_of_two_t_intervals(
    noise: float | dict[int, float],
) -> None:
    base, other = points(seed=1, noise=noise), points(seed=2, noise=noise, factor=1.1)
    own_is_wider = set()
    for difference in found(base, other):
        column = difference.metric.column
        logs = [
            [[math.log(getattr(row, column)) for row in rows if row.concurrency == level] for level in LEVELS]
            for rows in (base, other)
        ]
        squares = [[sum((v - sum(level) / 3) ** 2 for v in level) for level in one] for one in logs]
        at = LEVELS.index(int(difference.at))
        step = sum(logs[1][at]) / 3 - sum(logs[0][at]) / 3
        pool = T_20 * math.sqrt(sum(map(sum, squares)) / 20 * 2 / 3)
        own = T_4 * math.sqrt((squares[0][at] + squares[1][at]) / 4 * 2 / 3)
        own_is_wider.add(own > pool)
        assert difference.change == pytest.approx(math.exp(step) - 1)
        assert difference.low == pytest.approx(math.exp(step - max(pool, own)) - 1, rel=1e-4)
        assert difference.high == pytest.approx(math.exp(step + max(pool, own)) - 1, rel=1e-4)
    assert own_is_wider == {True, False}


@pytest.mark.parametrize("repeats", [(3, 3), (3, 1), (5, 3)])
def test_intervals_hold_the_truth_as_often_as_they_say(repeats: tuple[int, int]) -> None:
    """And more often where all levels scatter alike: which they do not say that they do."""
    held = total = 0
    for seed in range(120):
        base, other = points(repeats[0], seed, factor=1.0), points(repeats[1], 10_000 + seed, factor=1.05)
        for difference in found(base, other):
            truth = 0.05 if difference.metric.more_is_better else 1 / 1.05 - 1
            assert difference.low is not None
            assert difference.high is not None
            held, total = held + (difference.low <= truth <= difference.high), total + 1
    assert total == 120 * METRICS * len(LEVELS)
    assert 0.95 <= held / total <= 0.995


UNEQUAL = {
    "one level": {1: 0.01, 4: 0.01, 8: 0.01, 16: 0.01, 32: 0.08},
    "a little": {1: 0.01, 4: 0.02, 8: 0.01, 16: 0.01, 32: 0.01},
    "each its own": {1: 0.05, 4: 0.02, 8: 0.01, 16: 0.03, 32: 0.04},
}


@pytest.mark.parametrize(("kind", "repeats"), [*((kind, (3, 3)) for kind in UNEQUAL), ("one level", (3, 1))])
def test_equal_runs_whose_levels_scatter_unequally_are_no_more_often_different_than_promised(
    kind: str, repeats: tuple[int, int]
) -> None:
    noise, runs = UNEQUAL[kind], 150
    noisiest = max(noise, key=lambda level: noise[level])
    alone = together = 0
    for seed in range(runs):
        base, other = points(repeats[0], seed, noise), points(repeats[1], 20_000 + seed, noise)
        alone += sum(d.verdict is not Verdict.NOISE for d in found(base, other) if d.at == noisiest)
        together += any(d.verdict is not Verdict.NOISE for d in found(base, other, together=True))
    assert alone <= 0.07 * runs * METRICS  # 5 %, and chance
    assert together <= 0.09 * runs


def test_with_one_repeat_each_nothing_is_said() -> None:
    for difference in found(points(1), points(1, factor=2)):
        assert (difference.verdict, difference.why) == (Verdict.UNKNOWN, "one repeat")
        assert (difference.low, difference.high) == (None, None)


def capacity(seed: int, noise: float | Mapping[int, float] = 0.01, factor: float = 1.0) -> list[PointRow]:
    """What `+sweep=capacity` measures by default: batching levels with repeats, and a sweep without."""
    batching = [replace(row, purpose="batching") for row in points(3, seed, 0.01) if (row.concurrency or 0) < 32]
    return [*points(1, 500 + seed, noise, factor), *batching]


def test_levels_with_one_repeat_in_both_runs_are_named_and_never_drift() -> None:
    """The noise of other levels may be less than theirs."""
    noise = {1: 0.01, 4: 0.01, 8: 0.01, 16: 0.01, 32: 0.08}
    assert not any(drifted(capacity(seed, noise), capacity(10_000 + seed, noise)).drifted for seed in range(60))
    made = drifted(capacity(1), capacity(2, factor=0.5))
    assert not made.worse
    words = "one repeat in both runs; the noise is that of other levels"
    assert {(d.pair.family.purpose, d.verdict, d.why) for d in made.differences} == {
        ("batching", Verdict.NOISE, ""),
        ("concurrency", Verdict.UNKNOWN, words),
    }
    text = made.text()
    assert "By as much, yet within noise or not known: 20. Not known: 20." in text
    assert f"concurrency, 12 + 64 tokens, at concurrency 1, 4, 8, 16, 32: {words}\n" in text
    compared = {(d.verdict, d.why) for d in found(capacity(1), capacity(2, factor=0.5)) if d.at == 32}
    assert compared == {(Verdict.WORSE, words)}
    ours, theirs = run(capacity(1), "a"), run(capacity(2, factor=0.5), "b")
    assert f"yes, worse: {words}" in Comparison(ours, [against(ours, theirs)]).text()
    assert "one repeat" not in drifted(points(seed=1), points(1, seed=2)).text(), "one run's repeats tell"


def test_noise_of_batching_levels_serves_the_concurrency_sweep_of_the_same_server() -> None:
    batching = [replace(row, purpose="batching") for row in points(3)]
    faster = [*points(1, factor=2), *batching]
    verdicts = {(d.pair.family.purpose, d.verdict) for d in found([*points(1), *batching], faster)}
    assert verdicts == {("concurrency", Verdict.BETTER), ("batching", Verdict.NOISE)}


def test_better_is_more_throughput_and_less_latency() -> None:
    for difference in found(points(seed=1), points(seed=2, factor=1.5)):
        assert difference.verdict is Verdict.BETTER
        assert (difference.change > 0) == difference.metric.more_is_better
    assert {d.verdict for d in found(points(seed=1), points(seed=2, factor=0.6))} == {Verdict.WORSE}


def test_memory_is_told_apart_by_a_block_and_the_allocators_unit() -> None:
    base = synthetic.rows()[:4]
    unit = 16 * 393_216 + 2 * 2**20
    for more, verdict in ((0.9 * unit, Verdict.NOISE), (1.1 * unit, Verdict.WORSE), (-1.1 * unit, Verdict.BETTER)):
        other = [replace(row, mem_ready_bytes=row.mem_ready_bytes + int(more)) for row in base]
        ready = [d for d in found(base, other) if d.metric.column == "mem_ready_bytes"]
        assert [d.verdict for d in ready] == [verdict] * 4


def test_pool_of_the_cpu_backend_is_not_judged_at_a_utilization() -> None:
    base = synthetic.rows(synthetic.CPU)[:8]
    unknown = [d.pair.family.mode for d in found(base, base) if d.verdict is Verdict.UNKNOWN]
    assert set(unknown) == {"utilization"}


@pytest.mark.parametrize("shape", [synthetic.CPU, synthetic.GPU])
def test_memory_of_forked_servers_is_not_held_against_that_of_cold_ones_where_they_share_pages(
    shape: synthetic.Shape,
) -> None:
    cold = [replace(row, start="cold") for row in synthetic.rows(shape)[:4]]
    warm = [replace(row, start="warm", mem_ready_bytes=2 * (row.mem_ready_bytes or 0)) for row in cold]
    paired = pairs(run(cold), run(warm))
    ready = [d for d in differences(paired) if d.metric.column == "mem_ready_bytes"]
    assert {d.verdict for d in ready} == {Verdict.UNKNOWN if shape is synthetic.CPU else Verdict.WORSE}
    assert ("share other pages" in ready[0].why) == (shape is synthetic.CPU)
    assert ("start", "cold", "warm") in [
        (d["what"], d["base"], d["other"]) for d in what_differs(run(cold), run(warm), paired)
    ]
    both = matched(run(cold), run(warm), same_server=True)
    made = Drift(run(cold), run(warm), THRESHOLD, both, differences(both.pairs, together=True))
    assert made.worse == (shape is synthetic.GPU)


@pytest.mark.parametrize("shape", [synthetic.CPU, synthetic.GPU])
def test_load_on_forked_servers_of_cards_is_not_judged_against_that_of_cold_ones(shape: synthetic.Shape) -> None:
    cold = [replace(row, start="cold") for row in synthetic.rows(shape) if row.kind == "load"]
    warm = [replace(row, start="warm", tok_s=(row.tok_s or 0) / 2) for row in cold]
    for other, judged in ((warm, shape is synthetic.CPU), ([replace(row, start="cold") for row in warm], True)):
        made = [
            d for d in differences(pairs(run(cold), run(other))) if d.metric.column == "tok_s" and d.base_repeats > 1
        ]
        assert made
        assert {d.verdict for d in made} == {Verdict.WORSE if judged else Verdict.UNKNOWN}
    if shape is synthetic.GPU:
        with pytest.raises(AnalysisError, match=r"is not known: one side's servers were forked.*same server.start"):
            drift_of(run(cold), run(warm), THRESHOLD)


# --- drift ---


def drifted(base: list[PointRow], other: list[PointRow]) -> Drift:
    return drift_of(run(base, "base"), run(other, "new"))


def test_noise_alone_hardly_ever_is_drift_however_many_points_there_are() -> None:
    alarms = sum(
        any(
            d.verdict is not Verdict.NOISE
            for d in found(points(3, seed, 0.1), points(3, 9_000 + seed, 0.1), together=True)
        )
        for seed in range(200)
    )
    assert alarms <= 18  # 5 % of 200, and chance


def test_drift_needs_the_threshold_and_more_than_noise() -> None:
    assert drifted(points(seed=1), points(seed=2, factor=0.8)).drifted
    assert not drifted(points(seed=1), points(seed=2, factor=0.95)).drifted  # beyond noise, below the threshold
    assert not drifted(points(seed=1, noise=0.5), points(seed=2, noise=0.5, factor=0.8)).drifted
    assert not drifted(points(seed=1), points(seed=2, factor=1.5)).drifted  # better


def test_exit_codes_are_for_ci(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = written(tmp_path / "base", points(seed=1))
    same = written(tmp_path / "same", points(seed=2))
    slow = written(tmp_path / "slow", points(seed=3, factor=0.7, vllm_version="0.99"))
    once = written(tmp_path / "once", points(1))
    assert main(["drift", str(base), str(same)]) == 0
    assert capsys.readouterr().out.startswith("0 of 20 differences drifted")
    assert main(["drift", str(base), str(slow)]) == 1
    out = capsys.readouterr().out
    assert "slow differs from base: vLLM 0.25.1 → 0.99" in out
    assert out.startswith("20 of 20 differences drifted: worse by 10 % or more")
    assert main(["drift", str(base), str(slow), "--threshold", "0.5"]) == 0
    dead = synthetic.changed(points(seed=4), lambda row: row.concurrency == 32, status="failed")
    capsys.readouterr()
    assert main(["drift", str(base), str(written(tmp_path / "dead", dead))]) == 1
    assert capsys.readouterr().out.startswith("Levels of base that were tried and failed, which is drift: 1.")
    assert main(["drift", str(once), str(once)]) == 2
    assert "no level of both has a second repeat" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["drift", str(base), str(slow), "--threshold", "none"])
    assert stopped.value.code == 2


@pytest.mark.parametrize("status", ["running", "interrupted", "ended early", "complete"])
def test_a_run_that_was_cut_off_is_no_pass(status: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = written(tmp_path / "base", points(seed=1), status="complete")
    fewer = [row for row in points(seed=2) if (row.concurrency or 0) < 16]
    cut = written(tmp_path / "cut", fewer, status=status)
    whole = written(tmp_path / "whole", points(seed=2), status=status)
    slow = written(
        tmp_path / "slow", [row for row in points(seed=3, factor=0.7) if row.concurrency != 32], status=status
    )
    assert main(["drift", str(base), str(cut)]) == (0 if status == "complete" else 2)
    captured = capsys.readouterr()
    if status != "complete":
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert (
            f"cut is not whole: its manifest says {status}, and of 2 levels that base has it holds no row"
            in captured.err
        )
    assert main(["drift", str(base), str(whole)]) == 0, "all of its levels are there"
    assert main(["drift", str(base), str(slow)]) == 1, "what did drift is said"


def test_a_session_that_left_no_row_is_no_pass() -> None:
    both = [*points(seed=1, max_num_seqs=8), *points(seed=1, max_num_seqs=64)]
    half = run(points(seed=2, max_num_seqs=8), "half")
    assert not drift_of(run(both, "base"), half).worse
    lost = replace(half.tables.sessions[0], session_id="lost", status="failed")
    tables = replace(half.tables, sessions=(*half.tables.sessions, lost))
    with pytest.raises(
        AnalysisError, match="half is not whole: 1 of its sessions left no row, and of 5 levels that base"
    ):
        drift_of(run(both, "base"), replace(half, tables=tables))


def test_points_without_a_figure_are_one_clear_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory = [row for row in synthetic.rows() if row.kind == "memory"]
    unread = synthetic.changed(memory, lambda row: True, mem_ready_bytes=None, engine_kv_bytes=None)
    base, bare = written(tmp_path / "base", memory), written(tmp_path / "bare", unread)
    assert main(["drift", str(base), str(bare)]) == 2
    assert "have points in common, and no figure of them" in capsys.readouterr().err


def test_memory_alone_is_no_pass_where_load_could_not_be_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = [row for row in synthetic.rows() if row.kind == "memory"]
    more = synthetic.changed(memory, lambda row: True, mem_ready_bytes=70 * 2**30)
    only = written(tmp_path / "only", memory)
    once = written(tmp_path / "once", [*memory, *points(1)])
    grown = written(tmp_path / "grown", [*more, *points(1)])
    assert main(["drift", str(only), str(only)]) == 0
    assert main(["drift", str(once), str(once)]) == 2
    assert "any difference of load is more than noise is not known" in capsys.readouterr().err
    assert main(["drift", str(once), str(grown)]) == 1, "what did drift is said"


def test_a_loss_past_the_threshold_that_noise_hides_is_listed() -> None:
    made = drifted(points(seed=1, noise=0.3), points(seed=2, noise=0.3, factor=0.6))
    hidden = [d for d in made.differences if d.verdict is Verdict.NOISE and abs(d.change) >= THRESHOLD]
    assert len(hidden) > 5
    text = made.text()
    assert f"By as much, yet within noise or not known: {len(hidden)}." in text
    assert text.count("  no") >= len(hidden)


# --- the command line ---


def test_json_and_terminal_show_the_same_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [written(tmp_path / name, points(seed=i, factor=1 + i / 10)) for i, name in enumerate("abc")]
    assert main(["compare", *map(str, paths), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in told["runs"]] == ["a", "b", "c"]
    assert len(told["points"]) == 2 * METRICS * len(LEVELS)
    assert main(["compare", *map(str, paths)]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    for row in told["points"]:
        numbers = [f"{row[name]:+.1f}" for name in ("change_pct", "low_pct", "high_pct")]
        assert any(words[:1] == [row["other"]] and all(n in words for n in numbers) for words in shown), row
        assert row["other_repeats"] == 3


def test_simulated_runs_say_so_and_are_comparable_among_themselves(tmp_path: Path) -> None:
    shape = {"simulated": True, "engine": "sim"}
    paths = [written(tmp_path / name, points(seed=i, **shape)) for i, name in enumerate("ab")]
    comparison = compare(paths)
    assert "simulated" in comparison.text()
    assert all(row["simulated"] for row in comparison.as_json()["points"])


def test_compare_names_what_a_run_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fewer = [row for row in points(seed=1) if row.concurrency != 4]
    fewer = synthetic.changed(fewer, lambda row: row.concurrency == 8, status="failed", failure_class="engine_dead")
    memory = [row for row in synthetic.rows() if row.kind == "memory" and row.mode == "committed"]
    paths = [
        written(tmp_path / name, rows) for name, rows in (("a", [*memory, *points()]), ("b", fewer), ("c", points()))
    ]
    assert main(["compare", *map(str, paths)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "has no measurement of what a has" in line]
    assert [line.split()[0] for line in lines] == ["b", "b", "b", "c"]
    assert lines[0].endswith("memory, committed, at max_model_len 512, 1024, 2048, 4096: no row of it")
    assert lines[1].endswith("at concurrency 4: no row of it")
    assert lines[2].endswith("at concurrency 8: failed: engine_dead")
    assert main(["compare", *map(str, paths), "--json"]) == 0
    missing = json.loads(capsys.readouterr().out)["missing"]
    assert [(m["other"], m.get("concurrency"), m["failed"]) for m in missing[4:6]] == [("b", 4, False), ("b", 8, True)]
    assert len(missing) == 4 + 2 + 4


def test_plot_shows_every_run_once(tmp_path: Path) -> None:
    paths = [written(tmp_path / name, points(seed=i, model=f"model-{name}")) for i, name in enumerate("abc")]
    before = set(tmp_path.rglob("*"))
    assert main(["compare", *map(str, paths), "--plot", str(tmp_path / "all.svg")]) == 0
    words = [text for text in ET.parse(tmp_path / "all.svg").getroot().itertext() if "model-" in text]
    assert [word.split(",")[0] for word in words] == ["a: model-a", "b: model-b", "c: model-c"]
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "all.svg"}
    assert main(["compare", *map(str, paths), "--plot", str(tmp_path / "all.png")]) == 2


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [written(tmp_path / name / "run", points(seed=i)) for i, name in enumerate("ab")]
    assert {row["other"] for row in compare(paths).as_json()["points"]} == {str(paths[1])}


def test_run_that_was_never_analysed_is_told_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ready = written(tmp_path / "a", points())
    bare = synthetic.write_run(tmp_path / "b", points())
    assert main(["compare", str(ready), str(bare)]) == 2
    assert f"`python -m analysis {bare}` makes it" in capsys.readouterr().err


def test_a_run_named_like_a_command_is_reached_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    synthetic.write_run(tmp_path / "compare", synthetic.rows()[:2])
    monkeypatch.chdir(tmp_path)
    assert main(["./compare"]) == 0
    assert main(["--json", "./compare"]) == 0
    told = json.loads(capsys.readouterr().out.partition("\n{")[2].join(["{", ""]))
    assert "points.parquet" in told["files"]
    assert told["answer"]


def test_comparing_writes_nothing(tmp_path: Path) -> None:
    a, b = written(tmp_path / "a", points()), written(tmp_path / "b", points())
    reduce(a)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    compare([a, b]).text()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
