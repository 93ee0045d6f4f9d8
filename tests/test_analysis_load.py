"""Load tables: the tutorial's columns, medians over repeats, and knees that follow the data."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from analysis.advice.rules import rules_of_thumb
from analysis.load.knee_sentences import both_answers
from analysis.load.load_curve import knee_curves, load_curves
from analysis.load.load_tables import write_concurrency_sweep
from analysis.pages.batching import batching_page
from analysis.pages.kv_notes import kv_page
from analysis.rows.targets import Targets
from contract.rows import PointRow
from tests import synthetic_run as synthetic


def page(rows: Iterable[PointRow]) -> str:
    made = batching_page(synthetic.tables_of(rows))
    assert made is not None
    return made.text()


def sweep(tmp_path: Path, rows: Iterable[PointRow]) -> list[dict[str, str]]:
    points = synthetic.tables_of(rows).points
    paths = write_concurrency_sweep(tmp_path, load_curves(points, "concurrency"), knee_curves(points))
    return list(csv.DictReader(io.StringIO(paths[0].read_text())))


def with_curve(
    tok_s: dict[int, float], p95: dict[int, float], repeats: int = 3, noise: float = 0.005
) -> list[PointRow]:
    """Return sweep rows whose throughput and latency are given by level, repeats apart by the factor 1 + `noise`."""
    rows = []
    for level, value in tok_s.items():
        for repeat in range(repeats):
            row = synthetic.load_row(synthetic.GPU, "concurrency", level, repeat)
            factor = (1 + noise) ** (repeat - repeats // 2)
            rows.append(replace(row, tok_s=value * factor, p95_e2e_s=p95[level] / factor))
    return rows


H200_TOK_S = {1: 280.0, 8: 1950, 32: 5564, 128: 9827, 256: 11637, 512: 8768}
H200_P95 = {1: 0.238, 8: 0.288, 32: 0.402, 128: 0.883, 256: 1.412, 512: 3.872}


def test_sweep_csv_has_the_tutorials_columns(tmp_path: Path) -> None:
    rows = sweep(tmp_path, synthetic.rows())
    assert list(rows[0])[:6] == ["concurrency", "mean_e2e_s", "p95_e2e_s", "qps", "tok_s", "gpu_util_pct"]
    assert list(rows[0])[6:] == ["repeats", "tok_s_low", "tok_s_high", "p95_e2e_s_low", "p95_e2e_s_high", "knee"]
    assert [row["concurrency"] for row in rows] == ["1", "2", "4", "8", "16", "32"]
    assert rows[0]["gpu_util_pct"] == "93.1"


def test_a_sweep_that_its_knee_is_not_read_from_marks_none(tmp_path: Path) -> None:
    p95 = {1: 0.2, 4: 0.24, 8: 0.3, 16: 0.5, 32: 0.9}
    cut = with_curve({1: 300.0, 4: 1000.0, 8: 1020.0}, p95)
    high = with_curve({1: 300.0, 4: 1000.0, 8: 1900.0, 16: 3500.0, 32: 6000.0}, p95)
    few = [replace(row, purpose="batching", point_id=f"b-{row.point_id}") for row in high]
    assert [row["knee"] for row in sweep(tmp_path, cut)] == ["no", "could be", "no"]
    assert [row["knee"] for row in sweep(tmp_path, [*cut, *few])] == ["", "", ""]


def test_utilization_is_never_invented(tmp_path: Path) -> None:
    assert {row["gpu_util_pct"] for row in sweep(tmp_path, synthetic.rows(synthetic.CPU))} == {""}
    assert "Not observed: no GPU was used." in page(synthetic.rows(synthetic.CPU))


def test_simulated_stands_in_every_row_of_the_sweep(tmp_path: Path) -> None:
    shape = replace(synthetic.GPU, simulated=True, engine="sim", device="sim", device_name="simulated GPU")
    rows = synthetic.rows(shape)
    assert {row["gpu_util_pct"] for row in sweep(tmp_path, rows)} == {"simulated"}
    text = page(rows)
    synthetic.assert_every_table_row_says_simulated(text)
    assert "**simulated**" in text.split("##")[0]


def test_level_is_the_median_of_its_repeats(tmp_path: Path) -> None:
    rows = [
        replace(synthetic.load_row(synthetic.GPU, "concurrency", 4, r), tok_s=t)
        for r, t in enumerate((100.0, 900.0, 300.0))
    ]
    assert sweep(tmp_path, rows)[0]["tok_s"] == "300"
    assert "one repeat" not in page(rows)
    assert "median of 3, tok/s spread 266.7 %" in page(rows)


def test_one_repeat_is_called_one() -> None:
    rows = [row for row in synthetic.rows() if row.purpose == "batching" and row.repeat == 0]
    assert page(rows).count("| one repeat |") == 4


def test_failed_level_stays_in_table_and_csv(tmp_path: Path) -> None:
    rows = [
        synthetic.failed(r, "load_error_rate") if (r.purpose, r.concurrency) == ("concurrency", 16) else r
        for r in synthetic.rows()
    ]
    made = sweep(tmp_path, rows)
    assert made[4] == {
        "concurrency": "16",
        "mean_e2e_s": "",
        "p95_e2e_s": "",
        "qps": "",
        "tok_s": "",
        "gpu_util_pct": "",
        "repeats": "0",
        "tok_s_low": "",
        "tok_s_high": "",
        "p95_e2e_s_low": "",
        "p95_e2e_s_high": "",
        "knee": "",
    }
    assert "| 16 | – | – | – | – |  | 1 not measured (failed: load_error_rate)" in page(rows)


def test_all_failed_claims_nothing() -> None:
    text = page([synthetic.failed(row, "engine_dead") for row in synthetic.rows() if row.purpose != "kv_scaling"])
    assert text.count("ewer than two levels were measured") == 2
    assert "too few levels were measured for a rule" in text
    assert "sweet spot" not in text


def test_comparison_speaks_of_medians() -> None:
    rows = [row for row in synthetic.rows() if row.purpose == "comparison"]
    one = statistics.median(r.duration_s or 0 for r in rows if r.concurrency == 1)
    text = page(rows)
    assert f"took {one:#.4g} s one by one" in text
    assert "5.1x the output throughput" in text


def test_comparison_without_its_sequential_half_compares_nothing() -> None:
    rows = [
        synthetic.failed(r, "timeout") if r.concurrency == 1 else r
        for r in synthetic.rows()
        if r.purpose == "comparison"
    ]
    assert "nothing to compare" in page(rows)
    assert "one by one and" not in page(rows)


def test_knee_of_a_curve_that_saturates(tmp_path: Path) -> None:
    text = page(with_curve(H200_TOK_S, H200_P95))
    assert (
        "Where does throughput stop scaling? Above concurrency 128 and up to 256 (not tested: 129 to 255), of the "
        "levels tested 256: 11,637 tok/s"
    ) in text
    assert "the last doubling changed tok_s by -24.7 % (one-sided bounds -25.2 % and -24.1 %)" in text
    assert "Past concurrency 32: from 32 to 128 p95 went from 0.402 to 0.883 s (2.2x) while tok_s went 1.8x" in text
    assert "Of the levels tested concurrency 32 to 256 is the sweet spot" in text
    assert "Beyond concurrency 256 more requests mostly cost latency" in text
    assert "at 512 p95 changes by +174.2 % (+171.8 % to +176.7 %: more than noise), tok/s by -24.7 % (" in text
    assert "p95 2.2x the previous level" in text
    rows = sweep(tmp_path, with_curve(H200_TOK_S, H200_P95))
    assert [row["knee"] for row in rows] == ["no", "no", "no", "no", "could be", "no"]
    assert float(rows[4]["tok_s_low"]) < 11637 < float(rows[4]["tok_s_high"])


def test_one_repeat_leaves_knee_and_blow_up_unknown_and_names_the_sweep(tmp_path: Path) -> None:
    rows = with_curve(H200_TOK_S, H200_P95, repeats=1)
    text = page(rows)
    assert "Where does throughput stop scaling? Not known from this run: every level has one repeat" in text
    assert "the lowest level within 5 % of the highest is 256 (11,637 tok/s)" in text
    assert "Where does latency blow up? Not known from this run" in text
    assert "No interval: every level has one repeat" in text
    rising = page(with_curve({c: 100.0 * c for c in (1, 2, 4)}, dict.fromkeys((1, 2, 4), 0.5), repeats=1))
    assert "As it stands, the last doubling raised tok_s by 100.0 %." in rising
    assert "The sweet spot (prompts of 12 tokens, answers of 64, max_model_len 4096) is not known" in text
    assert text.count("`+sweep=concurrency` with `sweep.repeats` of three or more tells") >= 4
    assert "Beyond concurrency" not in text
    assert {(row["tok_s_low"], row["knee"]) for row in sweep(tmp_path, rows)} == {("", "")}


def test_repeats_of_the_same_load_in_another_table_serve_the_sweep(tmp_path: Path) -> None:
    text = page(synthetic.rows())
    assert "known from the same server's repeats of the same load in another table" in text
    assert "the last doubling still gained 27.3 % (one-sided bounds 24.0 % and 30.6 %), more than 10 %" in text
    other = synthetic.changed(synthetic.rows(), lambda row: row.purpose == "batching", prompt_tokens=2000)
    assert "No interval: every level has one repeat" in page(other).split("## Concurrency sweep")[1]


def test_a_level_that_stands_in_both_tables_is_said_to_differ_and_by_how_much() -> None:
    words = "at concurrency 8: p95 0.1578 s there and 0.1562 s here (medians); the means differ by -1.0 % ("
    assert words in page(synthetic.rows())
    slower = synthetic.changed(
        synthetic.rows(), lambda row: row.purpose == "concurrency" and row.concurrency == 4, p95_e2e_s=9.0
    )
    assert "The two differ most at concurrency 4: p95 " in page(slower)
    assert "s there and 9.000 s here (medians); " in page(slower)
    alone = [row for row in synthetic.rows() if row.purpose != "batching"]
    assert "stand in the other table" not in page(alone)


def test_more_noise_widens_the_knee_to_the_levels_it_allows() -> None:
    tok_s = {1: 100.0, 2: 200.0, 4: 380.0, 8: 398.0, 16: 402.0}
    p95 = dict(zip(tok_s, (1.0, 1.0, 1.05, 2.0, 4.0), strict=True))
    text = page(with_curve(tok_s, p95, noise=0.01))
    assert (
        "Above concurrency 2 and up to 8 (not tested: 3, 5 to 7), of the levels tested 4 or 8, which the noise does "
        "not tell apart: 380 tok/s at the lowest"
    ) in text
    assert "`+sweep=knee` narrows this as far as noise allows." in text
    steeper = tok_s | {8: 460.0, 16: 464.0}
    assert "of the levels tested 8: 460 tok/s" in page(with_curve(steeper, p95, noise=0.01))


def test_a_level_is_the_knee_only_where_the_next_lower_number_was_tested() -> None:
    tok_s = {c: 50.0 * min(c, 7) for c in (1, 2, 4, 6, 7, 8, 14)}
    searched = [replace(row, sweep="knee") for row in with_curve(tok_s, dict.fromkeys(tok_s, 1.0))]
    text = page(searched)
    assert "stop scaling? At concurrency 7: 350 tok/s" in text
    assert "measured knee: at concurrency 7." in text
    assert "narrows this" not in text
    fewer = page([row for row in searched if row.concurrency != 6])
    assert "stop scaling? Above concurrency 4 and up to 7 (not tested: 5 to 6), of the levels tested 7: 350" in fewer
    assert "`+sweep=knee` with more `sweep.repeats` narrows this." in fewer
    lowest = page([row for row in searched if row.concurrency in (7, 14)])
    assert "Up to concurrency 7 (not tested: 1 to 6), of the levels tested 7: 350 tok/s" in lowest
    assert "No lower level was measured, so it may begin below that." in lowest


def test_a_knee_of_levels_that_end_while_a_doubling_gains_more_than_its_band_asks_for_higher_ones() -> None:
    tok_s = {1: 100.0, 2: 200.0, 4: 380.0, 8: 405.0}
    rows = with_curve(tok_s, dict.fromkeys(tok_s, 0.5))
    words = (
        "Above concurrency 8 nothing was measured, and the last doubling still gained more than 5 %: a higher level "
        "may give more, and the knee lie higher; "
    )
    text = page(rows)
    assert "Above concurrency 4 and up to 8 (not tested: 5 to 7), of the levels tested 8: 405 tok/s" in text
    assert f"{words}`+sweep=concurrency` with higher levels in `sweep.concurrency`, or `+sweep=knee`, tells." in text
    searched = page([replace(row, sweep="knee") for row in rows])
    assert f"{words}`+sweep=knee` with a higher `sweep.concurrency.highest` tells." in searched
    flat = with_curve(tok_s | {16: 407.0}, dict.fromkeys((*tok_s, 16), 0.5))
    assert "nothing was measured" not in page(flat)
    for measured, short in (
        (rows, "8, of levels up to 8 (the last doubling gained 6.6 %, so higher ones may give more)"),
        (flat, "8"),
    ):
        curve = load_curves(synthetic.tables_of(measured).points, "concurrency")[0]
        assert f"stops scaling above concurrency 4 and up to {short}; p95 latency: " in both_answers(curve).text
    noisy = page(with_curve(tok_s | {8: 396.0}, dict.fromkeys(tok_s, 0.5), noise=0.02))
    assert "Above concurrency 8 nothing was measured, and the last doubling may have gained more than 5 %" in noisy
    assert "lie higher; `+sweep=concurrency` with more `sweep.repeats` tells, or one with higher levels." in noisy


@pytest.mark.parametrize("purpose", ["concurrency", "batching"])
@pytest.mark.parametrize("search", ["knee", "slo"])
@pytest.mark.parametrize(("last", "noise", "said"), [(396.0, 0.02, "may have gained"), (392.0, 0.08, "Undecided")])
def test_higher_levels_than_a_search_goes_to_are_asked_of_a_sweep_that_names_its_levels(
    purpose: str, search: str, last: float, noise: float, said: str
) -> None:
    """A doubling that gained at most 5 % as measured ends a search whatever its highest level may be."""
    tok_s = {1: 100.0, 2: 200.0, 4: 380.0, 8: last}
    rows = with_curve(tok_s, dict.fromkeys(tok_s, 0.5), noise=noise)
    text = page([replace(row, sweep=search, purpose=purpose) for row in rows])
    tells = f"`+sweep={search}` with more `sweep.repeats` tells, or `+sweep={purpose}` with higher levels in "
    assert said in text
    assert f"; {tells}`sweep.concurrency`." in text
    assert "or one with higher levels" not in text


def test_gain_at_the_rules_border_is_undecided() -> None:
    tok_s = {1: 100.0, 2: 200.0, 4: 400.0, 8: 440.0}
    text = page(with_curve(tok_s, dict.fromkeys(tok_s, 0.5)))
    assert "stop scaling? Undecided: the last doubling, up to concurrency 8, gained 10.0 %" in text
    assert (
        "which is 10 % within noise. Either there is no knee up to 8, or it lies above 4 and up to 8; "
        "`+sweep=concurrency` with higher levels in `sweep.concurrency`, or `+sweep=knee`, tells (more `sweep.repeats` "
        "only where they tell the last doubling's gain from the rule's)."
    ) in text
    assert "The sweet spot (prompts" in text
    assert "Beyond concurrency" not in text


def test_a_search_that_ended_at_its_highest_says_what_to_raise() -> None:
    tok_s = {1: 100.0, 2: 200.0, 4: 400.0, 8: 440.0}
    rows = [replace(row, sweep="knee") for row in with_curve(tok_s, dict.fromkeys(tok_s, 0.5))]
    text = page(rows)
    tells = "`+sweep=knee` with a higher `sweep.concurrency.highest` tells (more `sweep.repeats` only where"
    assert f"or it lies above 4 and up to 8; {tells}" in text
    assert f"(within noise of the knee); {tells}" in text


def test_a_doubling_that_hardly_gains_and_scatters_wants_repeats_first() -> None:
    tok_s = {1: 100.0, 2: 200.0, 4: 400.0, 8: 412.0}
    text = page(with_curve(tok_s, dict.fromkeys(tok_s, 0.5), noise=0.08))
    assert "Undecided: the last doubling, up to concurrency 8, gained 3.0 %" in text
    assert "Either there is no knee up to 8, or it lies above 2 and up to 8; " in text
    assert "`+sweep=concurrency` with more `sweep.repeats` tells, or one with higher levels." in text


def test_no_knee_in_range_is_an_answer() -> None:
    levels = (1, 2, 4, 8)
    text = page(with_curve({c: 100.0 * c for c in levels}, dict.fromkeys(levels, 0.5)))
    assert (
        "Not within the levels tested: up to concurrency 8 (800 tok/s) the last doubling still gained 100.0 %" in text
    )
    assert "Where does latency blow up? Not within the levels tested" in text
    assert "No knee up to concurrency 8" in text
    assert "Beyond concurrency" not in text


def test_knee_at_the_lowest_level_may_begin_below_it() -> None:
    tok_s = {16: 400.0, 32: 402.0, 64: 401.0}
    assert "No lower level was measured, so it may begin below that." in page(
        with_curve(tok_s, {16: 0.5, 32: 1.0, 64: 2.0})
    )


def test_levels_that_span_no_doubling_say_so() -> None:
    text = page(with_curve({16: 400.0, 24: 402.0}, {16: 0.5, 24: 0.8}))
    assert "stop scaling? Not known from this run: the levels do not span one doubling" in text


def test_sweet_spot_has_no_upper_end_while_throughput_rises() -> None:
    levels = (1, 2, 4, 8)
    tok_s, p95 = (100.0, 130.0, 200.0, 300.0), (0.5, 0.9, 1.3, 1.8)
    text = page(with_curve(dict(zip(levels, tok_s, strict=True)), dict(zip(levels, p95, strict=True))))
    assert "up to concurrency 8 (300 tok/s) the last doubling still gained 50.0 %" in text
    assert "Past concurrency 1: from 1 to 2 p95 went from 0.500 to 0.900 s" in text
    assert "The sweet spot begins at concurrency 1 (" in text
    assert "upper end was not found within the levels tested: throughput was still rising at 8, 300 tok/s" in text
    assert "1 to 8" not in text


def test_p95_that_falls_again_at_the_next_level_is_no_blow_up() -> None:
    tok_s = {c: 90.0 * c for c in (1, 2, 4, 8)}
    text = page(with_curve(tok_s, {1: 0.5, 2: 2.5, 4: 0.6, 8: 0.7}))
    assert "Where does latency blow up? Not within the levels tested" in text
    assert "No knee up to concurrency 8" in text
    assert "p95 5.0x the previous level" in text


def test_p95_that_jumps_at_the_last_level_is_not_confirmed() -> None:
    tok_s = {c: 90.0 * c for c in (1, 2, 4, 8)}
    text = page(with_curve(tok_s, {1: 0.5, 2: 0.5, 4: 0.6, 8: 2.7}))
    assert "from 4 to 8 p95 went from 0.600 to 2.70 s" in text
    assert "No higher level was measured that could confirm it." in text
    assert "could confirm it" not in page(with_curve(H200_TOK_S, H200_P95))


def test_p95_that_rises_within_noise_past_the_knee_is_no_rule() -> None:
    words = "Beyond concurrency 256 more requests mostly cost latency"
    flat = with_curve(H200_TOK_S, H200_P95 | {512: 1.45}, noise=0.04)
    assert KNEE in page(flat)
    assert words not in page(flat)
    waited = synthetic.changed(SATURATED, lambda row: row.concurrency == 512, waiting_max=88)
    assert ", and up to 88 waited in the server." in page(waited)
    assert "waited in the server" not in rules_text(synthetic.changed(SATURATED, lambda row: True, waiting_max=0))


def test_missing_level_moves_the_knee_to_what_was_measured() -> None:
    fewer = {c: t for c, t in H200_TOK_S.items() if c != 256}
    text = page(with_curve(fewer, H200_P95))
    assert "Above concurrency 32 and up to 128 (not tested: 33 to 127), of the levels tested 128: 9,827 tok/s" in text


SATURATED = with_curve(H200_TOK_S, H200_P95)
KNEE = "stop scaling? Above concurrency 128 and up to 256"
COMPUTE, BEYOND = "is **compute-bound**", "Beyond concurrency 256"


@pytest.mark.parametrize(
    ("rows", "stands", "stands_not"),
    [
        (
            SATURATED,
            [KNEE, COMPUTE, BEYOND, "measured knee: above concurrency 128 and up to 256"],
            ["not known from this run", "simulated"],
        ),
        (
            with_curve(H200_TOK_S | {512: 14_000.0}, H200_P95),
            ["Not within the levels tested: up to concurrency 512", "still gained 20.3 %", "measured knee: none yet"],
            [KNEE, COMPUTE, "Beyond concurrency"],
        ),
        (
            [row for row in SATURATED if row.concurrency != 256],
            [
                "stop scaling? Above concurrency 32 and up to 128",
                "from concurrency 128 on",
                "measured knee: above concurrency 32 and up to 128",
            ],
            ["| 256 |", KNEE, BEYOND],
        ),
        (
            [row for row in SATURATED if row.repeat == 0],
            ["stop scaling? Not known from this run", "measured knee: not known from this run"],
            [KNEE, COMPUTE, "Beyond concurrency", "is the sweet spot"],
        ),
        (
            [synthetic.failed(row, "engine_dead") for row in SATURATED],
            [
                "latency blows up is not known from this run",
                "no level was measured",
                "None: too few levels",
            ],
            [KNEE, COMPUTE, "sweet spot", "tok/s at"],
        ),
        (
            [synthetic.failed(row, "timeout") if row.concurrency == 512 else row for row in SATURATED],
            [
                "up to concurrency 256 (11,637 tok/s) the last doubling still gained 18.4 %",
                "Higher levels were tried and not measured",
                "`resume=RUN`, which tries again the higher levels that could not be measured, tells",
            ],
            [KNEE, COMPUTE, "Beyond concurrency"],
        ),
        (
            synthetic.changed(SATURATED, lambda row: row.concurrency == 512, preemptions=40),
            [KNEE, "is **KV-bound** under this load from concurrency 512 on", "40 preemptions"],
            [COMPUTE],
        ),
        (
            synthetic.changed(SATURATED, lambda row: True, simulated=True, engine="sim", device="sim"),
            [KNEE, "**simulated**: Every number"],
            ["vLLM 0."],
        ),
    ],
    ids=["as it is", "steeper", "missing level", "one repeat", "all failed", "last failed", "preempted", "simulated"],
)
def test_sentences_follow_the_data(rows: list[PointRow], stands: list[str], stands_not: list[str]) -> None:
    text = page(rows)
    about_curves = text.split("## Concurrency sweep")[1]
    about_curves = about_curves.split("## Near-full context")[0] + about_curves.split("## What limits each level")[1]
    assert [words for words in stands if words not in text] == []
    assert [words for words in stands_not if words in about_curves] == []


def test_odd_levels_are_noted() -> None:
    rows = synthetic.changed(
        synthetic.rows(),
        lambda r: r.purpose == "batching" and r.concurrency == 4,
        failed=1,
        prefix_hit_ratio=0.25,
        preemptions=7,
        achieved_concurrency=2.0,
    )
    text = page(rows)
    assert "of 120 requests failed" in text
    assert "prefix-cache hits up to 25.00 %" in text
    assert "7 preemptions" in text
    assert "2.00 in flight on average" in text


@pytest.mark.parametrize(("apart", "words"), [(12, "12 above"), (-1, "1 below")])
def test_a_server_that_counts_other_tokens_than_the_client_is_noted(apart: int, words: str) -> None:
    rows, said = synthetic.rows(), "the server's count of tokens is"
    one = synthetic.changed(rows, lambda row: row.point_id == "batching-c4-r1", token_count_difference=apart)
    assert f"{said} {words} the client's" in page(one)
    assert said not in page(rows)
    assert said not in page(synthetic.changed(rows, lambda row: True, token_count_difference=None))


def test_ladder_is_held_against_the_engines_concurrency() -> None:
    text = page(synthetic.rows())
    assert "By the engine's count there is room for 16.00 sequences of 4096 tokens." in text
    assert "were 16, at concurrency 16: the ladder went past the limit" in text
    assert "first seen waiting at concurrency 32 (up to 16)" in text
    low = [r for r in synthetic.rows() if r.purpose != "near_full_context" or (r.concurrency or 0) <= 8]
    assert "no level went past the limit" in page(low)
    assert "No level showed a waiting request." in page(low)


def under_use(rows: Iterable[PointRow]) -> str:
    return page(rows).split("## GPU utilization, power and what is left unused")[1].split("\n## ")[0]


def on_gpus(**columns: object) -> list[PointRow]:
    return synthetic.changed(synthetic.rows(), lambda row: row.kind == "load", **columns)


def test_busy_card_is_not_taken_for_a_used_one() -> None:
    text = under_use(synthetic.rows())
    assert "concurrency 1, NVML's utilization is 93.1 %, yet it reaches 10.7 % of the best throughput." in text
    assert "draws 55.3 % of the power limit; the best level, concurrency 32, draws 68.7 % of the power limit" in text
    assert "An output token costs 0.560 J at the lowest level and 0.0742 J at the best." in text
    assert "the tutorial's 25 % to 30 % is not what it shows here" in text
    assert "Over the measured windows" not in text
    assert "| 1 | 93.1 | 387 | 55.3 % | 690.9 | 10.7 % | 0.560 |" in text


def test_lowest_level_near_the_best_is_not_called_far_from_it() -> None:
    text = under_use(synthetic.rows(replace(synthetic.GPU, saturation=0.3)))
    assert "93.1 %, and it reaches 78.3 % of the best throughput already" in text
    assert "yet" not in text
    assert "does not show what is left unused" not in text


def test_card_without_a_kernel_most_of_the_time_is_called_so() -> None:
    text = under_use(synthetic.rows(replace(synthetic.GPU, gpu_util_pct=27.0)))
    assert "NVML's utilization is low, 27.1 %: most of the time no kernel ran. It reaches 10.7 %" in text
    assert "tutorial" not in text
    assert "yet" not in text
    busier = under_use(synthetic.rows(replace(synthetic.GPU, gpu_util_pct=50.0)))
    assert "no kernel ran" not in busier
    assert "50.1 %, yet it reaches" in busier


def test_tutorials_utilization_is_held_only_against_one_or_two_requests() -> None:
    rows = [row for row in synthetic.rows() if row.purpose == "concurrency"]
    assert "tutorial" in under_use([row for row in rows if (row.concurrency or 0) >= 2])
    text = under_use([row for row in rows if (row.concurrency or 0) >= 4])
    assert "yet it reaches 34.4 %" in text
    assert "so it does not show what is left unused" in text
    assert "tutorial" not in text


def test_utilization_without_power_says_no_more_than_its_range() -> None:
    text = under_use(on_gpus(power_w=None, energy_j=None))
    assert "NVML's utilization was between 93.1 and 97.0 %" in text
    assert "draws" not in text
    assert "yet" not in text
    assert "| 1 | 93.1 | – | – | 690.9 | 10.7 % | – |" in text


def test_power_without_a_limit_is_told_in_watts() -> None:
    text = under_use(on_gpus(power_limit_w=None))
    assert "It draws 387 W; the best level, concurrency 32, draws 481 W. An output token" in text
    assert "of the power limit" not in text.split("|")[-1]


def test_power_is_that_of_the_energy_counters_where_they_were_read() -> None:
    """NVML's watts trail: beside J a token they would say another power than the energy does."""
    counted = [replace(row, energy_j=700.0 * (row.duration_s or 0), power_w=300.0) for row in on_gpus()]
    for text, watts in ((under_use(counted), 700), (under_use(on_gpus(energy_j=None, power_w=300.0)), 300)):
        cells = [line.split("|") for line in text.splitlines() if line.startswith(("| 1 |", "| 32 |"))]
        assert [float(row[3]) for row in cells] == [watts, watts]
    for row in (line.split("|") for line in under_use(counted).splitlines() if line.startswith("| 1 |")):
        assert float(row[7]) * float(row[5].replace(",", "")) == pytest.approx(700, rel=0.01)


def test_a_p99_of_few_requests_is_left_out() -> None:
    few = "A p99 of fewer than 101 requests lies between the two highest, and is left out."
    assert few in page(on_gpus(completed=100))
    enough = on_gpus(completed=101)
    assert few not in page(enough)
    (row,) = [row for row in enough if row.purpose == "concurrency" and row.concurrency == 32]
    assert f"| {row.p99_e2e_s:.4g} |" in page(enough)
    assert f"| {row.p99_e2e_s:.4g} |" not in page(on_gpus(completed=100))


def test_noise_above_the_highest_level_with_repeats_is_said_to_be_that_of_the_others() -> None:
    assert "no level above 16 was repeated, and its noise is taken for the same." in page(synthetic.rows())
    everywhere = with_curve({1: 100.0, 8: 500.0, 32: 900.0}, {1: 0.2, 8: 0.3, 32: 0.5}, 3, 0.01)
    assert "was repeated, and its noise" not in page(everywhere)


def test_energy_that_was_not_told_is_not_compared() -> None:
    assert "An output token costs" not in under_use(on_gpus(energy_j=None))


def test_one_level_compares_nothing() -> None:
    text = under_use([row for row in synthetic.rows() if row.purpose == "concurrency" and row.concurrency == 8])
    assert "best throughput" not in text
    assert "between 94.0 and 94.0 %" in text


def test_energy_of_a_token_is_the_median_of_the_repeats_own() -> None:
    tokens = (400.0, 100.0, 900.0)
    made = [synthetic.load_row(synthetic.GPU, "batching", 4, repeat) for repeat in range(3)]
    joules = (400.0, 300.0, 4500.0)  # 1, 3 and 5 J a token; the median energy over the median tokens is 1
    rows = [
        replace(row, tok_s=t / 10, duration_s=10.0, energy_j=j) for row, t, j in zip(made, tokens, joules, strict=True)
    ]
    assert "| 3.00 |" in under_use(rows)


def test_cost_of_watching_is_told_where_it_is_known() -> None:
    assert "sampled 9.8 times a second (median of the windows; 9.6 in the lowest)" in under_use(synthetic.rows())
    assert "took at most 1.52 % of one core" in under_use(synthetic.rows())
    of_version_5 = under_use(on_gpus(sampling_cpu_share=None))
    assert "sampled 9.8 times a second" in of_version_5
    assert "of one core" not in of_version_5
    assert "times a second" not in under_use(on_gpus(telemetry_hz=None))


def test_under_use_is_told_of_real_cards_only() -> None:
    simulated = replace(synthetic.GPU, simulated=True, engine="sim", device="sim", device_name="simulated GPU")
    assert under_use(synthetic.rows(simulated)).strip() == "Not observed: the run is simulated, there was no GPU."
    assert under_use(synthetic.rows(synthetic.CPU)).strip() == "Not observed: no GPU was used."
    unseen = under_use(on_gpus(gpu_util_pct=None, power_w=None, energy_j=None))
    assert unseen.strip() == "Not observed: no measured window holds a figure of a GPU."


def test_others_on_the_card_and_a_clock_held_down_are_noted() -> None:
    others = ["pid 7 on GPU-0: 300 MiB", "pid 7 on GPU-0: 310 MiB", "pid 8 on GPU-0: unknown memory"]
    reasons = ["heat, by software", "power cap"]
    text = page(on_gpus(foreign_processes=others[:2]))
    assert "another process on the card: pid 7 on GPU-0: 300 MiB |" in text
    text = page(on_gpus(foreign_processes=others, throttle_reasons=reasons))
    assert "other processes on the card: pid 7 on GPU-0: 300 MiB and 1 more; clock held down at times: heat" in text
    assert "heat, by software and power cap |" in text


@pytest.mark.parametrize("processes", [None, []])
def test_card_to_itself_is_not_noted(processes: list[str] | None) -> None:
    rows = synthetic.changed(synthetic.rows(), lambda row: True, foreign_processes=processes, throttle_reasons=[])
    memory = kv_page(synthetic.tables_of(rows), Targets())
    assert memory is not None
    for text in (page(rows), memory.text()):
        assert "process on the card" not in text
        assert "held down" not in text


def test_others_on_the_card_are_noted_of_a_memory_reading() -> None:
    rows = synthetic.changed(
        synthetic.rows(), lambda row: row.point_id == "committed-1024", foreign_processes=["pid 7 on GPU-0: 300 MiB"]
    )
    memory = kv_page(synthetic.tables_of(rows), Targets())
    assert memory is not None
    lines = [line for line in memory.text().splitlines() if "another process on the card: pid 7" in line]
    assert [line[:8] for line in lines if line.startswith("|")] == ["| 1024 |"]


def test_missing_parts_name_their_sweep() -> None:
    text = page([row for row in synthetic.rows() if row.purpose == "concurrency"])
    assert text.count("`+sweep=batching`") == 2
    assert "`+sweep=capacity`" in text
    only_batching = page([row for row in synthetic.rows() if row.purpose == "batching"])
    assert "`+sweep=concurrency`" in only_batching
    assert "As far as the few levels above tell it:" in only_batching
    assert "up to concurrency 16 (5,042 tok/s) the last doubling still gained 42.8 %" in only_batching


def test_lengths_are_part_of_every_rule() -> None:
    rules = page(synthetic.rows()).split("## Rules of thumb")[1]
    bullets = [line for line in rules.splitlines() if line.startswith("- ")]
    assert 3 <= len(bullets) <= 5
    assert all("tokens" in line for line in bullets)


@pytest.mark.parametrize(
    ("other", "suffix"),
    [
        ({"prompt_tokens": 2000}, "prompt-2000"),
        ({"api": "chat"}, "chat"),
        ({"output_lengths": "uniform from 8 to 120"}, "uniform-from-8-to-120"),
        ({"shared_prefix": "2 shared prefixes of 8 tokens"}, "2-shared-prefixes-of-8-tokens"),
    ],
)
def test_servers_and_workloads_are_never_mixed(tmp_path: Path, other: dict[str, Any], suffix: str) -> None:
    longer = [replace(r, **other, point_id=f"l-{r.point_id}") for r in synthetic.rows() if r.purpose == "concurrency"]
    rows = synthetic.tables_of([*synthetic.rows(), *longer]).points
    curves = load_curves(rows, "concurrency")
    assert len(curves) == len(write_concurrency_sweep(tmp_path, curves, curves)) == len(list(tmp_path.iterdir())) == 2
    assert any(curve.series.group.slug == f"phi-3-mini-4k-{suffix}" for curve in curves)


def test_no_load_rows_no_numbers() -> None:
    made = batching_page(synthetic.tables_of(synthetic.rows()[:8]))
    assert made.figures == []
    assert "it holds no levels of a closed loop" in made.text()


def test_a_page_of_an_envelopes_cells_alone_does_not_deny_that_they_are_levels_of_a_closed_loop() -> None:
    cells = [replace(row, purpose="envelope") for row in with_curve({1: 300.0, 4: 900.0}, {1: 0.2, 4: 0.3})]
    words = "no levels of a closed loop but cells of an envelope, which are not warmed up, and say whether requests fit"
    assert words in batching_page(synthetic.tables_of(cells)).text()
    assert "envelope" not in batching_page(synthetic.tables_of([])).text()


def test_a_sweep_that_ends_below_the_batching_levels_says_why_its_knee_is_read_from_these() -> None:
    def page(sweep: list[PointRow]) -> str:
        few = [replace(row, purpose="batching", point_id=f"b-{row.point_id}") for row in rows]
        return batching_page(synthetic.tables_of([*few, *sweep])).text()

    rows = with_curve({1: 300.0, 4: 900.0, 16: 2000.0}, {1: 0.2, 4: 0.3, 16: 0.6})
    assert "The levels of the other table go higher, so the knee is read from that table, below." in page(rows[:6])
    assert "Too few of these levels were measured, so the knee is read from that table, below." in page(rows[:3])
    assert "so the knee is read from" not in page(rows)


def test_one_request_at_a_time_is_the_floor_only_where_the_rows_say_so() -> None:
    words = "No other level measured was quicker."
    rows = with_curve({1: 300.0, 2: 500.0}, {1: 0.20, 2: 0.24}, 1, 0.0)
    assert words in rules_text(rows)
    quicker = [replace(row, mean_e2e_s=0.01) if row.concurrency == 2 else row for row in rows]
    assert "One request at a time takes" in rules_text(quicker)
    assert words not in rules_text(quicker)
    assert words not in rules_text([row for row in rows if row.concurrency == 1])


def rules_text(rows: list[PointRow]) -> str:
    return " ".join(rule.text for rule in rules_of_thumb(synthetic.tables_of(rows)))


@pytest.mark.parametrize(
    ("shape", "start", "said"),
    [(synthetic.GPU, "warm", True), (synthetic.GPU, "cold", False), (synthetic.CPU, "warm", False)],
)
def test_load_on_forked_servers_of_cards_is_not_passed_off_as_that_of_cold_ones(
    shape: synthetic.Shape, start: str, said: bool
) -> None:
    tables = synthetic.tables_of(synthetic.rows(shape))
    tables = replace(tables, sessions=tuple(replace(session, start=start) for session in tables.sessions))
    assert ("**forked servers**" in batching_page(tables).text()) == said
    memory = tuple(point for point in tables.points if point.kind == "memory")
    assert "**forked servers**" not in kv_page(replace(tables, points=memory), Targets(16, 4096)).text()


def test_levels_that_a_cold_server_was_measured_at_are_not_those_of_the_fork_before_it() -> None:
    tables = synthetic.tables_of(replace(row, attempt=2) for row in synthetic.rows())
    dead = tuple(replace(session, attempt=1, start="warm") for session in tables.sessions)
    cold = tuple(replace(session, start="cold") for session in tables.sessions)
    assert "**forked servers**" not in batching_page(replace(tables, sessions=(*dead, *cold))).text()
