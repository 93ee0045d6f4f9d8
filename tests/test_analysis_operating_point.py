"""The operating point: what is chosen, what is left open, and sentences that follow the data when it is perturbed."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import runpy
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import answer, reduce
from analysis.advice.alerts import alerts
from analysis.advice.operating_point import Basis, Choice, Standing, choices
from analysis.load import latency_buckets
from analysis.load.load_curve import load_curves
from analysis.load.objective_sentences import border_words
from analysis.load.token_cost import joules_per_output_token, price_per_million
from analysis.memory.kv_room import KvRoom, kv_room, request_bytes
from analysis.pages.operating_page import operating_page
from analysis.rows.targets import Slo, Targets, read_gpu_hour
from analysis.writing.figures import NOTHING
from contract.kv import kv_layout
from contract.rows import PointRow
from tests import synthetic_run as synthetic
from tests.test_analysis_load import with_curve

CONF = Path(__file__).parent.parent / "conf"
TOK_S = {1: 300.0, 4: 1000.0, 8: 1800.0, 16: 2500.0, 32: 2600.0}
P95 = {1: 0.20, 4: 0.24, 8: 0.30, 16: 0.45, 32: 0.90}
TARGETS = Targets(16, 4096)


def sweep(noise: float = 0.005, repeats: int = 3, **p95: float) -> list[PointRow]:
    """A sweep of known tok/s and p95; `c8=0.4` gives a level another p95."""
    return with_curve(TOK_S, P95 | {int(level[1:]): value for level, value in p95.items()}, repeats, noise)


def choice(rows: Iterable[PointRow], slo: Slo, gpu_hour: float | None = None) -> Choice:
    return choices(synthetic.tables_of(rows), slo, gpu_hour)[0]


def page(rows: Iterable[PointRow], slo: Slo | None = None, gpu_hour: float | None = None) -> str:
    made = operating_page(synthetic.tables_of(rows), slo or Slo(), TARGETS, gpu_hour)
    assert made is not None
    return made.text()


def at(made: Choice) -> float | None:
    return None if made.point is None else made.point.reading.at


def test_highest_throughput_that_meets_every_objective_is_chosen() -> None:
    made = choice(sweep(), Slo(p95_e2e_s=0.5))
    assert (made.basis, at(made)) == (Basis.OBJECTIVES, 16)
    assert [c.reading.at for c in made.having(Standing.MISSES)] == [32]
    ttft = [replace(r, p95_ttft_s=0.05 if (r.concurrency or 0) < 16 else 0.5) for r in sweep()]
    assert at(choice(ttft, Slo(p95_e2e_s=0.5, p95_ttft_s=0.1))) == 8
    assert at(choice(ttft, Slo(p95_ttft_s=0.1))) == 8


def test_a_level_whose_interval_straddles_the_objective_is_undecided_and_not_chosen() -> None:
    made = choice(sweep(noise=0.05), Slo(p95_e2e_s=0.46))
    assert [c.reading.at for c in made.having(Standing.UNDECIDED)] == [16]
    assert at(made) == 8
    text = page(sweep(noise=0.05), Slo(p95_e2e_s=0.46))
    assert "**Concurrency 8**" in text
    assert "The next higher, concurrency 16, is undecided" in text


def steady(rows: Iterable[PointRow], p95: dict[int, float], **columns: object) -> list[PointRow]:
    """The rows with steady parts of a known p95 by level, scattered as the whole runs are; else as the whole run's."""
    made = []
    for row in rows:
        factor = (row.p95_e2e_s or 0) / P95[row.concurrency or 0]
        own = p95.get(row.concurrency or 0, P95[row.concurrency or 0])
        made.append(replace(row, steady_p95_e2e_s=own * factor, **columns))
    return made


OTHER_SIDE = "By the steady parts alone, which begin after it, "


@pytest.mark.parametrize(
    ("p95", "says"),
    [
        ({32: 0.40}, "concurrency 32 would meet every objective."),
        ({16: 0.40, 32: 0.49}, "concurrency 32 would meet every objective."),
        ({16: 0.60}, "concurrency 16 would miss one."),
        ({8: 0.7, 16: 0.60, 32: 0.4}, "concurrency 32 would meet every objective; concurrency 8, 16 would miss one."),
        ({}, ""),
        ({16: 0.49, 32: 0.60}, ""),
        ({16: 0.5, 32: 0.5}, ""),  # across the objective: neither side
    ],
)
def test_levels_whose_steady_part_is_on_the_other_side_are_named(p95: dict[int, float], says: str) -> None:
    text = page(steady(sweep(), p95), Slo(p95_e2e_s=0.5))
    assert (OTHER_SIDE in text) == bool(says)
    assert says == "" or OTHER_SIDE + says in text
    nothing = page(steady(sweep(), p95), Slo(p95_e2e_s=0.1))
    assert OTHER_SIDE not in nothing, "no side of it is below that"
    assert OTHER_SIDE not in page(steady(sweep(), p95)), "without an objective there is no side"


def test_a_steady_part_tells_where_nothing_is_chosen_and_by_single_repeats() -> None:
    lower = {at: value / 2 for at, value in P95.items()}
    for repeats in (1, 3):
        text = page(steady(sweep(repeats=repeats), lower), Slo(p95_e2e_s=0.19))
        assert OTHER_SIDE + "concurrency 1, 4, 8 would meet every objective." in text


def test_a_steady_part_with_the_burst_in_it_tells_nothing_nor_one_without_latencies() -> None:
    slo = Slo(p95_e2e_s=0.5)
    assert OTHER_SIDE not in page(steady(sweep(), {32: 0.4}, steady_settled_s=None), slo)
    assert OTHER_SIDE not in page(synthetic.changed(sweep(), lambda row: True, steady_p95_e2e_s=None), slo)
    arrivals = synthetic.changed(rates(), lambda row: True, steady_p95_e2e_s=0.001)
    assert OTHER_SIDE not in page(arrivals, Slo(p95_e2e_s=0.01)), "an open loop has no opening burst"


def test_the_burst_is_named_where_it_is_more_than_lies_above_a_p95() -> None:
    slo = Slo(p95_e2e_s=0.5)
    words = " At concurrency 32 the burst is 32 of {} requests, more than the 5 % that lie above a p95."
    for requests in (128, 320, 639):
        assert words.format(requests) in page(steady(sweep(), {32: 0.4}, num_requests=requests), slo)
    long = page(steady(sweep(), {32: 0.4}, num_requests=640), slo)
    assert OTHER_SIDE in long
    assert "the burst is" not in long


def test_how_large_levels_were_stands_beside_what_is_said_of_them() -> None:
    rows = synthetic.changed(sweep(), lambda row: row.concurrency == 16, num_requests=44, duration_s=2.25)
    text = page(rows, Slo(p95_e2e_s=0.5))
    assert "Measured: 3 repeats, 44 requests in 2.250 s each (medians)" in text
    assert "| purpose | concurrency | num_requests | duration_s | tok_s |" in text
    assert re.search(r"\| concurrency \| 16 \| 44 \| 2.250 \| 2,500 \|", text)
    assert "Measured: 1 repeat, 44 requests in 2.250 s" in page([r for r in rows if r.repeat == 1], Slo(p95_e2e_s=0.5))


def test_a_margin_that_another_start_may_eat_is_called_thin(tmp_path: Path) -> None:
    thin, wide = Slo(p95_e2e_s=0.49), Slo(p95_e2e_s=0.52)
    for slo in (thin, wide):
        assert at(choice(sweep(), slo)) == 16
        assert "What differs from one start of a server to the next is not in these intervals" in page(sweep(), slo)
    text = page(sweep(), thin)
    assert re.search(r"\| concurrency \| 16 \| .* \| meets, by a thin margin \|", text)
    assert re.search(r"\| concurrency \| 8 \| .* \| meets \|", text)
    assert "Its margin is thin: an interval ends less than 10 % below its objective" in text
    assert re.search(
        r"\*\*Q4\.[^*]*\*\* .* Its margin is thin: another start of the server may miss an objective\.", text
    )
    assert "concurrency 16 against p95_e2e_s at most 0.49 s: meets every objective, by a thin margin, so" in text
    assert page(sweep(), wide).count("thin margin") == 1
    assert "is thin" not in page(sweep(), wide)
    run = synthetic.write_run(tmp_path, sweep())
    (run / "manifest.json").write_text(json.dumps({"slo": {"p95_e2e_s": 0.49}}))
    reduce(run)
    assert re.search(r"concurrency 16, .* by a thin margin", answer(run))


def test_all_levels_of_a_server_that_still_rises_are_rivals_of_the_knee_of_another() -> None:
    """Also those of the curve that its knee is not read from."""
    knee = [replace(row, session_id=f"b-{row.session_id}", max_num_seqs=8) for row in sweep()]
    high = with_curve({1: 300.0, 32: 2000.0}, P95)
    few = [
        replace(row, purpose="batching", point_id=f"b-{row.point_id}")
        for row in with_curve({1: 300.0, 4: 1200.0, 16: 4000.0}, P95)
    ]
    assert at(choice([*high, *knee], Slo())) == 16
    assert at(choice([*high, *few, *knee], Slo())) is None


def test_a_run_without_levels_does_not_say_what_follows_from_throughput() -> None:
    assert "No objective is given" in page(sweep())
    bare = page(synthetic.rows()[:8])
    assert "it holds no levels of load to choose from;" in bare
    assert "No objective is given" not in bare
    assert "A level meets one where" not in page(synthetic.rows()[:8], Slo(p95_e2e_s=0.5))


def test_when_only_undecided_levels_are_left_nothing_is_chosen() -> None:
    text = page(sweep(noise=0.05), Slo(p95_e2e_s=0.20))
    assert (
        "Not known from this run: no level meets every objective beyond noise, and concurrency 1 is undecided" in text
    )
    assert "`+sweep=concurrency` with more `sweep.repeats`, or `+sweep=slo`, tells" in text
    assert "`sweep.repeats` of three or more" not in text
    assert not re.search(r"\*\*Concurrency", text)


def test_an_objective_that_nothing_meets_is_said_with_what_was_measured() -> None:
    text = page(sweep(), Slo(p95_e2e_s=0.1))
    assert "**None**: no measured level meets every objective. The lowest, concurrency 1, misses p95_e2e_s" in text
    assert "less at once cannot be asked of it" in text
    assert (
        "| `vllm:e2e_request_latency_seconds`, p95 | 0.3 | the objective itself is 0.1; the histogram tells nothing"
        in text
    )
    from_four = [row for row in sweep() if row.concurrency != 1]
    assert "with lower levels in `sweep.concurrency`, or `+sweep=slo`, tells" in page(from_four, Slo(p95_e2e_s=0.1))


@pytest.mark.parametrize(
    ("made_by", "tells"),
    [
        ("concurrency", "`+sweep=concurrency` with lower levels in `sweep.concurrency`, or `+sweep=slo`, tells"),
        ("capacity", "`+sweep=concurrency` with lower levels in `sweep.concurrency`, or `+sweep=slo`, tells"),
        ("knee", "`+sweep=slo` tells"),
        ("slo", "`+sweep=slo` with a lower `sweep.concurrency.lowest` tells"),
    ],
)
def test_levels_of_a_search_are_a_closed_loops_and_its_own_sweep_goes_on(made_by: str, tells: str) -> None:
    rows = [replace(row, sweep=made_by) for row in sweep() if row.concurrency != 1]
    assert at(choice(rows, Slo(p95_e2e_s=0.5))) == 16
    assert tells in page(rows, Slo(p95_e2e_s=0.1))


@pytest.mark.parametrize(
    ("made_by", "tells"),
    [
        ("concurrency", "`+sweep=concurrency` with higher levels in `sweep.concurrency`, or `+sweep=knee`, tells"),
        ("knee", "`+sweep=knee` with a higher `sweep.concurrency.highest` tells"),
        ("slo", "`+sweep=knee` tells"),
    ],
)
def test_no_knee_yet_names_the_sweep_that_goes_on(made_by: str, tells: str) -> None:
    rows = [replace(row, sweep=made_by) for row in sweep() if (row.concurrency or 0) < 16]
    assert "there is no knee up to concurrency 8" in page(rows)
    assert tells in page(rows)


def test_noise_of_a_search_is_told_by_its_own_repeats() -> None:
    rows = [replace(row, sweep="knee") for row in sweep(repeats=1)]
    assert "`+sweep=knee` with `sweep.repeats` of three or more tells" in page(rows)


def test_cells_of_an_envelope_are_no_levels_to_run() -> None:
    family = synthetic.family("qwen2.5-1.5b", synthetic.GPU)
    text = page([synthetic.envelope_row(family, 1024, 8)])
    assert "it holds no levels of load to choose from (cells of an envelope are not warmed up" in text


def test_with_one_repeat_the_choice_stands_as_measured_and_is_not_called_known() -> None:
    made = choice(sweep(repeats=1), Slo(p95_e2e_s=0.5))
    assert (made.basis, at(made)) == (Basis.AS_MEASURED, 16)
    assert made.point is not None
    assert made.point.safe_up_to is None
    text = page(sweep(repeats=1), Slo(p95_e2e_s=0.5))
    assert "Not known from this run beyond noise" in text
    assert "As it stands, concurrency 16 has the highest tok/s within the objectives" in text
    assert "| `vllm:num_requests_running` and `vllm:num_requests_waiting` together | not known from this run |" in text
    assert "**Q4. What is the safe operating point?** Not known from this run" in text


def test_a_higher_p95_moves_the_choice_down() -> None:
    assert at(choice(sweep(c16=0.6), Slo(p95_e2e_s=0.5))) == 8
    assert "misses, so it is for work that nobody waits for" in page(sweep(c16=0.6), Slo(p95_e2e_s=0.5))
    assert "meets every objective, so they allow it" in page(sweep(), Slo(p95_e2e_s=0.55))


def test_without_an_objective_the_knee_s_lowest_level_is_chosen() -> None:
    made = choice(sweep(), Slo())
    assert (made.basis, at(made)) == (Basis.KNEE, 16)
    rising = with_curve({1: 1, 2: 2, 4: 4}, {1: 0.2, 2: 0.2, 4: 0.2})
    assert at(choice(rising, Slo())) is None
    assert "Not known from this run: there is no knee up to concurrency 4" in page(rising)
    assert "Not known from this run: where throughput stops scaling is open" in page(sweep(repeats=1))


def plateau(noise: float) -> list[PointRow]:
    """No more tok/s from 16 on, and twice the p95 with every doubling."""
    return with_curve(TOK_S | {32: 2510.0, 64: 2520.0}, P95 | {64: 1.80}, 3, noise)


def test_that_a_higher_level_could_be_the_knee_is_no_leave_to_go_there() -> None:
    quiet, noisy = choice(plateau(0.005), Slo()), choice(plateau(0.05), Slo())
    assert [made.curves[0].knee.could_be for made in (quiet, noisy)] == [(16,), (16, 32, 64)]
    for made in (quiet, noisy):
        assert made.point is not None
        assert made.point.safe_up_to is made.point.reading
        assert (at(made), alert_above(made, "num_requests_running")) == (16, 16)
    words = (
        "Whether more than that is safe is not known from this run, for the knee of the levels tested could be as high "
        "as concurrency 64; "
    )
    text = page(plateau(0.05))
    assert words + "`+sweep=concurrency` with more `sweep.repeats` tells." in text
    of_tested = "concurrency 16, of the levels tested the lowest that could be the knee"
    assert f"{of_tested}; whether more pays, up to concurrency 64, noise" in text
    assert "upper end of the range" not in text
    text = page(plateau(0.005))
    assert words not in text
    assert f"| 16 | {of_tested} |" in text


# What a search for an objective left of a curve that goes on rising: its last doubling, from 8 to 16, gained 9 %.
CREEPS = {2: 276.0, 4: 361.0, 8: 426.0, 14: 452.0, 15: 460.0, 16: 465.0}
CREEPS_P95 = {2: 0.12, 4: 0.18, 8: 0.32, 14: 0.44, 15: 0.46, 16: 0.62}


def creeps(**tok_s: float) -> list[PointRow]:
    return with_curve(CREEPS | {int(level[1:]): value for level, value in tok_s.items()}, CREEPS_P95)


def test_a_level_past_the_knee_is_given_what_was_measured_above_the_knee() -> None:
    text = page(creeps(), Slo(p95_e2e_s=0.5))
    assert (
        "It lies past the knee of the levels tested (above concurrency 8 and up to 14): concurrency 14 gives 452.0 "
        "tok/s at p95 0.4400 s, and from there to concurrency 15 tok/s changes by +1.8 % ("
    ) in text
    assert "It lies past the knee" not in page(creeps(), Slo(p95_e2e_s=0.45)), "14 could be the knee itself"


def test_no_more_is_to_be_had_only_where_no_level_measured_gives_more() -> None:
    text = page(creeps(), Slo(p95_e2e_s=0.5))
    batch = text.partition("Batch: ")[2].splitlines()[0]
    tells = "`+sweep=concurrency` with higher levels in `sweep.concurrency`, or `+sweep=knee`, tells"
    assert (
        f", the same (of the levels tested; whether a higher one gives more, {tells}); of the levels measured " in batch
    )
    assert "; of the levels measured concurrency 16 gives most, 465.0 tok/s at p95 0.6200 s: tok/s +1.1 % (" in batch
    assert "no level measured gives more" not in batch
    flat = page(creeps(c8=450.0, c14=460.0, c15=462.0, c16=455.0), Slo(p95_e2e_s=0.5))
    assert "TTFT p95 " in flat
    assert ", the same; no level measured gives more. " in flat
    assert "of the levels tested;" not in flat
    less = page(sweep(), Slo(p95_e2e_s=0.35))
    assert (
        ", where throughput has stopped scaling, whatever its p95; of the levels measured concurrency 32 gives most, "
        "2,600 tok/s at p95 0.9000 s: tok/s +4.0 % ("
    ) in less


def test_without_an_objective_a_knee_that_may_lie_higher_is_not_told_as_the_end() -> None:
    words = "Above concurrency 16 nothing was measured, and the last doubling still gained more than 5 %"
    text = page(creeps())
    answer_line = next(line for line in text.splitlines() if line.startswith("**Concurrency 14**"))
    assert words in answer_line
    assert "where throughput has stopped scaling (of the levels tested; " in text
    assert words not in page(plateau(0.005))


def test_the_questions_say_which_load_they_are_of_where_there_are_several() -> None:
    slo = Slo(p95_e2e_s=0.5)
    longer = {"purpose": "near_full_context", "prompt_tokens": 4000}
    full = [replace(row, point_id=f"f-{row.point_id}", **longer) for row in sweep(c16=3.0)]
    first = "what these answers say of levels is of the first load above, prompts of 12 tokens, answers of 64"
    text = page([*sweep(), *full], slo)
    assert f"Where nothing else is said, {first}.\n" in text
    assert "8 → 16 with prompts of 12 tokens, answers of 64: tok/s " in text
    assert "Where nothing else is said" not in page(sweep(), slo)
    other = [replace(row, session_id="o", point_id=f"o-{row.point_id}", max_num_seqs=8) for row in sweep()]
    assert f"{first}, of one server, phi-3-mini-4k, seqs " in page([*sweep(), *other, *full], slo)
    assert f"{first}, in a closed loop.\n" in page([*sweep(), *rates()], slo)


@settings(deadline=None, max_examples=30)
@given(noise=st.lists(st.floats(0.001, 0.08), min_size=2, max_size=2).map(sorted))
def test_more_noise_never_makes_the_alert_looser(noise: list[float]) -> None:
    less, more = (alert_above(choice(plateau(each), Slo()), "num_requests_running") for each in noise)
    if isinstance(less, float | int) and isinstance(more, float | int):
        assert more <= less


def test_an_answer_of_one_token_cannot_miss_its_tpot() -> None:
    """As in goodput, and by the rule of the search."""
    gone = {"mean_tpot_s": None, "p50_tpot_s": None, "p95_tpot_s": None}
    slo = Slo(p95_e2e_s=0.52, p95_tpot_s=0.05)
    unknown = synthetic.changed(sweep(), lambda row: True, **gone)
    assert at(choice(unknown, slo)) is None, "longer answers whose TPOT is missing decide nothing"
    for columns in ({"output_tokens": 1}, {"output_tokens": 8, "mean_completion_tokens": 1.0}):
        rows = synthetic.changed(unknown, lambda row: True, **columns)
        made = choice(rows, slo)
        assert (made.basis, at(made)) == (Basis.OBJECTIVES, 16)
        assert [c.reading.at for c in made.having(Standing.MISSES)] == [32]
        assert "meets: 1, 4, 8, 16; misses: 32." in border_words(made.curves[0], slo).text
        text = page(rows, slo)
        assert f"| p95_tpot_s | {NOTHING} | answers of one token have no TPOT to miss |" in text
        assert re.search(
            rf"\| concurrency \| 16 \| 160 \| [^|]* \| 2,500 \| 0.4500 \| [^|]* \| {NOTHING} \| {NOTHING} \| meets \|",
            text,
        )
        assert at(choice(rows, Slo(p95_tpot_s=1e-9))) == 32


def test_a_level_that_failed_ends_the_safe_range_and_is_never_chosen() -> None:
    rows = [synthetic.failed(r, "engine_dead") if r.concurrency == 16 else r for r in sweep()]
    made = choice(rows, Slo(p95_e2e_s=5))
    assert at(made) == 32
    lost = [synthetic.failed(r, "engine_dead") if r.concurrency in (16, 32) else r for r in sweep()]
    made = choice(lost, Slo(p95_e2e_s=5))
    assert at(made) == 8
    assert made.point is not None
    assert made.point.safe_up_to is made.point.reading
    assert "The next higher level, concurrency 16, was tried and not measured." in page(lost, Slo(p95_e2e_s=5))


def test_the_safe_range_goes_on_past_the_chosen_level_while_levels_hold() -> None:
    flat = with_curve(TOK_S | {32: 2400.0}, P95)
    made = choice(flat, Slo(p95_e2e_s=1.0))
    assert made.point is not None
    assert made.point.safe_up_to is not None
    assert (at(made), made.point.safe_up_to.at) == (16, 32)


def test_a_lower_level_that_misses_is_not_passed_over() -> None:
    assert "up to it every measured level meets the objectives" in page(sweep(), Slo(p95_e2e_s=0.5))
    text = page(sweep(c1=0.9), Slo(p95_e2e_s=0.5))
    assert "**Concurrency 16**" in text
    assert "| 16 | concurrency 16: not every lower level meets the objectives |" in text


def test_a_longer_context_that_was_tried_is_not_called_untried() -> None:
    words = "It is the longest measured; a longer one was "
    assert words + "not tried" in page(synthetic.rows())
    rows = [synthetic.failed(r, "start_failed") if r.point_id == "utilization-4096" else r for r in synthetic.rows()]
    assert words + "tried and not measured" in page(rows)


def test_all_failed_chooses_nothing_and_says_so() -> None:
    rows = [synthetic.failed(row, "engine_dead") for row in synthetic.rows()]
    text = page(rows, Slo(p95_e2e_s=0.3), 2.0)
    assert "Not known from this run: no level of this load was measured" in text
    assert not re.search(r"tok/s at p95", text)
    assert text.count("Not known from this run") >= 10


def test_no_load_at_all_answers_what_memory_alone_tells() -> None:
    text = page(synthetic.rows()[:8])
    assert (
        "it holds no levels of load to choose from; `+sweep=knee`, or `+sweep=slo` for objectives, measures them."
        in text
    )
    assert "**Q2. Which max_model_len for production, by the KV sweep?** The longest that keeps" in text
    assert "**Q7. One more doubling of concurrency: is it acceptable?** Not known from this run" in text


def test_a_twin_that_misses_contradicts_a_level_that_meets() -> None:
    few = [
        replace(r, purpose="batching", point_id=f"b-{r.point_id}", p95_e2e_s=(r.p95_e2e_s or 0) * 2)
        for r in sweep()
        if r.concurrency == 16
    ]
    made = choice([*sweep(), *few], Slo(p95_e2e_s=0.5))
    assert at(made) == 8
    assert "undecided: missed under another purpose" in page([*sweep(), *few], Slo(p95_e2e_s=0.5))


def test_servers_that_were_sent_the_same_load_compete() -> None:
    faster = [
        replace(r, max_model_len=8192, session_id="other", tok_s=(r.tok_s or 0) * 1.5, point_id=f"o-{r.point_id}")
        for r in sweep()
    ]
    (made,) = choices(synthetic.tables_of([*sweep(), *faster]), Slo(p95_e2e_s=0.5), None)
    assert made.point is not None
    assert made.point.curve.series.sample.max_model_len == 8192
    text = page([*sweep(), *faster], Slo(p95_e2e_s=0.5))
    assert "Chosen among 2 servers that were sent this load." in text
    assert "Server: max_model_len 8192" in text
    other_load = [replace(r, prompt_tokens=500, session_id="long", point_id=f"l-{r.point_id}") for r in sweep()]
    assert len(choices(synthetic.tables_of([*sweep(), *other_load]), Slo(), None)) == 2


def another(rows: Iterable[PointRow], **columns: object) -> list[PointRow]:
    """The rows as of a second server."""
    return [replace(r, session_id="other", point_id=f"o-{r.point_id}", **columns) for r in rows]


def test_of_several_servers_a_level_is_named_with_its_server() -> None:
    text = page([*sweep(), *another(sweep(), max_model_len=8192)], Slo(p95_e2e_s=0.1))
    assert "The lowest, concurrency 1 of phi-3-mini-4k, len 4096, misses p95_e2e_s with 0.2000 s" in text
    noisy = sweep(noise=0.05)
    text = page([*noisy, *another(noisy, max_model_len=8192)], Slo(p95_e2e_s=0.20))
    assert "1 of phi-3-mini-4k, len 4096, 1 of phi-3-mini-4k, len 8192 are undecided" in text


def test_whether_another_server_gives_more_is_held_against_the_noise_of_both() -> None:
    def beaten(percent: float, noise: float, repeats: int) -> bool:
        more = with_curve({32: TOK_S[32] * (1 + percent / 100)}, {32: 0.9}, repeats, noise)
        rows = [*sweep(), *another(more, max_model_len=8192)]
        ours, theirs = load_curves(synthetic.tables_of(rows).points, "concurrency")
        return ours.beaten(ours.at(32), theirs, theirs.at(32))

    assert beaten(3, 0.005, 3)
    assert not beaten(3, 0.05, 3)
    assert not beaten(0.1, 0.005, 3)
    assert beaten(0.1, 0.0, 1), "where noise is not known, by what was measured"
    assert not beaten(-1, 0.0, 1)


def test_alerts_on_kv_are_of_the_server_that_is_spoken_of_where_none_is_chosen() -> None:
    rising = with_curve({1: 1.0, 2: 2.0, 4: 4.0}, {1: 0.2, 2: 0.2, 4: 0.2})
    faster = another(with_curve({1: 3.0, 2: 6.0, 4: 12.0}, {1: 0.2, 2: 0.2, 4: 0.2}), max_model_len=8192)
    faster = synthetic.changed(faster, lambda row: row.concurrency == 4, kv_usage_max=0.8, preemptions=2)
    text = page([*rising, *faster])
    assert "there is no knee up to concurrency 4" in text
    assert "preemptions began at concurrency 4, 0.800 in use" in text


def test_a_doubling_that_another_server_has_is_said_to_be_its() -> None:
    faster = with_curve({3: 900.0, 10: 9000.0}, {3: 0.2, 10: 0.3})
    text = page([*sweep(), *another(faster, max_model_len=8192)], Slo(p95_e2e_s=0.5))
    assert (
        "is it acceptable?** Of phi-3-mini-4k, len 4096: 8 → 16 with prompts of 12 tokens, answers of 64: tok/s" in text
    )
    assert "what these answers say of levels is of one server, phi-3-mini-4k, len 8192: the one chosen." in text
    assert "of one server" not in page(sweep(), Slo(p95_e2e_s=0.5))


def test_work_that_nobody_waits_for_goes_to_the_faster_server_whatever_the_objective() -> None:
    slower = with_curve({at: value / 2 for at, value in TOK_S.items()}, {at: value / 4 for at, value in P95.items()})
    text = page([*another(slower, max_model_len=8192), *sweep()], Slo(p95_e2e_s=0.1))
    assert "Interactive: phi-3-mini-4k, len 8192: max_model_len 8192, concurrency 8 (900.0 tok/s" in text
    assert "Batch: phi-3-mini-4k, len 4096: max_model_len 4096, concurrency 16 (2,500 tok/s" in text
    quick = with_curve(TOK_S, {at: value / 4 for at, value in P95.items()})
    hardly = with_curve({at: value * 1.001 for at, value in TOK_S.items()}, P95)
    text = page([*another(quick, max_model_len=8192), *hardly], Slo(p95_e2e_s=0.12))
    assert "Batch: phi-3-mini-4k, len 8192: " in text


def rates(at_8: bool | None = True) -> list[PointRow]:
    made = []
    for rate in (2, 4, 8):
        for repeat in range(3):
            row = synthetic.load_row(synthetic.GPU, "rate", rate, repeat)
            row = replace(
                row, concurrency=None, arrivals="poisson, 30 s", request_rate=float(rate), most_in_flight=rate
            )
            made.append(replace(row, keeps_up=at_8 if rate == 8 or at_8 is None else True))
    return made


def test_a_rate_that_the_server_does_not_keep_up_with_meets_nothing() -> None:
    assert at(choice(rates(), Slo(p95_e2e_s=5))) == 8
    assert at(choice(rates(at_8=False), Slo(p95_e2e_s=5))) == 4
    assert "misses: does not keep up" in page(rates(at_8=False), Slo(p95_e2e_s=5))
    short = page(rates(at_8=None), Slo(p95_e2e_s=5))
    assert "every one is undecided; a longer one (`sweep.seconds`) tells whether the server keeps up." in short
    assert "an open loop has no operating point" in page(rates())


def test_rates_need_not_be_whole_numbers() -> None:
    """Those that a search asks for lie between: cut to whole ones, three of these were a level of no width."""
    asked = {2: 1.0, 4: 1.19, 8: 2.0}
    rows = [replace(row, request_rate=asked[int(row.request_rate or 0)]) for row in rates()]
    made = choice(rows, Slo(p95_e2e_s=5))
    assert [level.at for level in made.curves[0].repeats] == [1.0, 1.19, 2.0]
    assert at(made) == 2.0
    flat = [replace(row, tok_s=1000.0 + (row.repeat or 0)) for row in rows]
    assert choice(flat, Slo(p95_e2e_s=5)).curves[0].knee.could_be
    assert "past the knee" not in page(flat, Slo(p95_e2e_s=5)), "an open loop gives what arrives"


def test_both_rules_for_an_objective_stand_in_one_sentence() -> None:
    """A search goes by single repeats, operating_point.md by intervals: 16 holds by these, and is open by those."""
    rows = [replace(row, p95_e2e_s=(row.p95_e2e_s or 0) * (1 + 0.1 * ((row.repeat or 0) - 1))) for row in sweep(0.0)]
    limit = Slo(p95_e2e_s=0.46 * 1.1)
    (curve,) = load_curves(synthetic.tables_of(rows).points, "concurrency")
    words = border_words(curve, limit).text
    assert words.startswith(
        "16 held, 32 (2.0x) broke. With noise counted, as in operating_point.md, of these levels, meets: 1, 4, 8; "
    )
    assert words.endswith("undecided: 16; misses: 32.")
    assert [c.reading.at for c in choice(rows, limit).having(Standing.UNDECIDED)] == [16]
    (once,) = load_curves(synthetic.tables_of(sweep(repeats=1)).points, "concurrency")
    assert border_words(once, limit).text.endswith("so how far noise moves this is not known.")


HIGHER = {
    ("concurrency", "concurrency"): "concurrency` with higher levels in `sweep.concurrency`, or `+sweep=slo`, tells",
    ("concurrency", "slo"): "slo` with a higher `sweep.concurrency.highest` tells",
    ("near_full_context", "capacity"): "capacity` with higher levels in `sweep.near_full_context.concurrency` tells",
}


@pytest.mark.parametrize(("purpose", "swept"), HIGHER)
def test_where_no_level_broke_the_sweep_that_is_named_can_send_this_load(purpose: str, swept: str) -> None:
    rows = [replace(row, purpose=purpose, sweep=swept) for row in sweep()]
    (curve,) = load_curves(synthetic.tables_of(rows).points, purpose)
    words = border_words(curve, Slo(p95_e2e_s=10.0)).text
    tells = HIGHER[purpose, swept]
    assert words.startswith(f"32 held, and no level broke. `+sweep={tells} where they break. ")


def test_a_level_between_held_and_broke_that_was_not_measured_is_named() -> None:
    limit, lost = Slo(p95_e2e_s=0.5), [16]
    rows = [synthetic.failed(row, "client_cores_few") if row.concurrency in lost else row for row in sweep()]
    (curve,) = load_curves(synthetic.tables_of(rows).points, "concurrency")
    assert border_words(curve, limit).text.startswith("8 held, 32 (4.0x) broke; 16 could not be measured (failed: ")
    lost.append(32)
    rows = [synthetic.failed(row, "client_cores_few") if row.concurrency in lost else row for row in rows]
    (curve,) = load_curves(synthetic.tables_of([r for r in rows if (r.concurrency or 0) <= 32]).points, "concurrency")
    words = border_words(curve, limit).text
    assert words.startswith("8 held, and no level broke; 16, 32 could not be measured (failed: client_cores_few). ")
    assert "`resume=RUN`, which tries again the higher levels that could not be measured, tells where they" in words
    assert "`+sweep" not in words
    (curve,) = load_curves(synthetic.tables_of([r for r in rows if (r.concurrency or 0) <= 8]).points, "concurrency")
    assert "`+sweep=concurrency` with higher levels" in border_words(curve, limit).text


def test_price_counts_all_cards_and_needs_a_price_and_a_gpu() -> None:
    (reading,) = load_curves(
        synthetic.tables_of([replace(sweep()[0], gpus=2, total_tok_s=600.0)]).points, "concurrency"
    )[0].levels
    price = price_per_million(reading, 3.6)
    assert price is not None
    assert price.output == pytest.approx(2 * 3.6 / 3600 / (reading.median("tok_s") or 0) * 1e6)
    assert price.total == pytest.approx(2 * 3.6 / 3600 / 600.0 * 1e6)
    assert price_per_million(reading, None) is None
    assert "| not known from this run | `cost.gpu_hour` is not given |" in page(sweep(), Slo(p95_e2e_s=0.5))
    assert "at cost.gpu_hour 2.5, 1 GPU, always as busy as here" in page(sweep(), Slo(p95_e2e_s=0.5), 2.5)
    on_cpu = [replace(r, gpus=0, device="cpu", power_w=None, energy_j=None) for r in sweep()]
    assert "| not known from this run | no GPU was used |" in page(on_cpu, Slo(p95_e2e_s=0.5), 2.5)


def test_energy_is_the_counter_over_output_tokens_and_never_a_simulated_card_s() -> None:
    (curve,) = load_curves(synthetic.tables_of(sweep()).points, "concurrency")
    reading = curve.levels[0]
    ratios = sorted((p.energy_j or 0) / ((p.tok_s or 0) * (p.duration_s or 0)) for p in reading.measured)
    assert joules_per_output_token(reading) == pytest.approx(ratios[1])
    simulated = [replace(r, simulated=True, engine="sim", device="sim") for r in sweep()]
    text = page(simulated, Slo(p95_e2e_s=0.5), 2.0)
    assert "| J per output token | not known from this run | simulated: no card was there; simulated |" in text
    synthetic.assert_every_table_row_says_simulated(text)
    assert "**Q8. Low concurrency, low throughput: why, and what to tell an SRE?** Not known from this run" in text


def test_room_is_the_pool_less_what_full_length_requests_take() -> None:
    room = KvRoom(pool_bytes=1000.0, requests=8, held_bytes=720.0, holds=11)
    assert (room.free_bytes, room.further_requests) == (280.0, 3)
    assert KvRoom(100.0, 2, 180.0, 1).further_requests == -1
    (curve,) = load_curves(synthetic.tables_of(sweep()).points, "concurrency")
    made = kv_room(curve.at(16), 76, 16, None)
    assert made is not None
    blocks = synthetic.GPU.pool_bytes // (16 * 393_216)
    assert made.holds == (blocks - 1) // math.ceil(76 / 16)
    left = f"| KV pool left, in requests of this load | {made.further_requests:,} | at least, by the pool alone"
    open_ = "max_num_seqs was left to vLLM, so how many of them would run is not known"
    all_ = f"{made.further_requests:,}"
    would = {16: "0", 20: "4", 8: "0", 10**6: all_}
    said = {seats: f"of them {n} would run beside these (max_num_seqs {seats})" for seats, n in would.items()}
    for seats, words in {None: open_, **said}.items():
        text = page([replace(r, max_num_seqs=seats) for r in sweep()], Slo(p95_e2e_s=0.5))
        assert left in text
        assert words in text
    unknown = [replace(r, engine_kv_bytes=None) for r in sweep()]
    assert "| KV pool left | not known from this run |" in page(unknown, Slo(p95_e2e_s=0.5))


SHAPES = {
    "full": {"num_hidden_layers": 4},
    "windows": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 6,
        "sliding_window": 512,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    },
}


@settings(deadline=None)
@given(shape=st.sampled_from(sorted(SHAPES)), length=st.integers(2, 20_000), tokens=st.integers(1, 40_000))
def test_a_request_never_takes_more_than_it_is_said_to(shape: str, length: int, tokens: int) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 65_536, "torch_dtype": "bfloat16",
    } | SHAPES[shape]  # fmt: skip
    layout = kv_layout(config, max_num_batched_tokens=2048, max_model_len=length)
    row = replace(
        sweep()[0],
        max_model_len=length,
        engine_block_size=layout.block_size,
        formula_bytes_per_sequence=layout.bytes_per_sequence(length),
        formula_bytes_per_token=layout.marginal_bytes_per_token(length),
    )
    (curve,) = load_curves(synthetic.tables_of([row]).points, "concurrency")
    said, true = request_bytes(curve.levels[0], tokens), layout.bytes_per_sequence(tokens)
    assert said is not None
    assert said >= true
    if shape == "full":
        assert said == true


def test_contexts_longer_than_what_was_sent_are_named() -> None:
    text = page(sweep(), Slo(p95_e2e_s=0.5))
    assert "These figures are for requests of 76 tokens, prompt and answer. Of target.context_tokens 4096 its" in text
    full = [replace(r, prompt_tokens=4020) for r in sweep()]
    assert "These figures are for requests of" not in page(full, Slo(p95_e2e_s=0.5)), "the same blocks"
    short = [replace(r, max_model_len=2048) for r in sweep()]
    assert "is above this server's max_model_len 2048" in page(short, Slo(p95_e2e_s=0.5))


def test_double_context_follows_the_slope_and_never_claims_a_latency() -> None:
    text = page(synthetic.rows())
    assert "need 48.00 GiB of KV by formula" in text
    assert "Latency and objectives at that length: not measured; `+sweep=capacity server.max_model_len=8192 " in text
    steep = page(synthetic.rows(replace(synthetic.GPU, bytes_per_token=2 * 393_216)))
    assert "need 96.00 GiB of KV by formula" in steep
    assert "**waits or preempts**; it holds 10 of them at once" in steep, "does not fit is not even one"


def test_a_context_that_the_model_does_not_take_is_refused_first() -> None:
    shape = synthetic.family("phi-3-mini-4k", synthetic.GPU)
    rows = synthetic.rows(shape)
    configs = {row.session_id: shape.config for row in rows}
    made = operating_page(replace(synthetic.tables_of(rows), configs=configs), Slo(), TARGETS, None)
    assert made is not None
    assert "**No**: the model takes 4,096 tokens at most. Memory: target.concurrency 16 requests" in made.text()
    assert "Whether the model takes that length is not known from this run." in page(rows)


def test_load_alone_knows_what_the_model_takes_and_what_its_windows_keep() -> None:
    shape = synthetic.family("phi-3-mini-4k", synthetic.GPU)
    rows = [row for row in synthetic.rows(shape) if row.purpose == "concurrency"]
    needs = []
    for config in (shape.config, None):
        text = operating_page(synthetic.tables_of(rows, config), Slo(), TARGETS, None).text()
        needs.append(float(re.findall(r"requests of 8,192 tokens need ([\d.]+) GiB of KV by formula", text)[0]))
        assert "% of the pool of the server under load" in text
        assert ("**No**: the model takes 4,096 tokens at most. Memory" in text) == (config is not None)
        assert ("Whether the model takes that length is not known" in text) == (config is None)
    assert needs[0] < needs[1] / 2, "one rate is an upper bound"


def test_the_doubling_is_the_tutorials_or_the_nearest_and_says_what_is_noise() -> None:
    assert "8 → 16 with prompts of 12 tokens, answers of 64: tok/s +38.9 %" in page(sweep())
    without = [row for row in sweep() if row.concurrency != 8]
    assert "8 → 16 was not measured; the nearest doubling is. 16 → 32 with prompts of 12 tokens, " in page(without)
    noisy = page([r for r in sweep(noise=0.2) if r.concurrency != 8])
    assert re.search(r"16 → 32 with [^:]*: tok/s [^;]*: within noise\)", noisy)
    assert "(noise not known: one repeat a level)" in page(sweep(repeats=1))


def test_what_a_step_gave_is_generated_tokens_and_no_prompts() -> None:
    counted = {1: (2048, 2048, 1.19), 32: (20480, 385, 63.2)}
    columns = ("server_generation_tokens", "server_steps", "server_step_mean_tokens")
    rows = sweep()
    for level, values in counted.items():
        rows = synthetic.changed(
            rows, lambda row, at=level: row.concurrency == at, **dict(zip(columns, values, strict=True))
        )
    text = page(rows)
    assert "gave any request a token gave 1.00 on average at the lowest level and 53.2 at the best: requests" in text
    assert not re.search(r"A step of the engine[^.]* (?:1\.19|63\.2)", text)
    assert "A step of the engine" not in page(synthetic.changed(rows, lambda row: True, server_steps=None))
    alike = {"server_generation_tokens": 20480, "server_steps": 20480}
    assert "A step of the engine" not in page(synthetic.changed(rows, lambda row: True, **alike))


def test_two_services_are_rows_that_were_measured() -> None:
    text = page(sweep(), Slo(p95_e2e_s=0.26))
    assert "Interactive: max_model_len 4096, concurrency 4 (1,000 tok/s at p95 0.2400 s" in text
    assert "Batch: max_model_len 4096, concurrency 16 (2,500 tok/s" in text
    assert "Interactive: not known from this run, where latency blows up is open" in page(sweep(repeats=1))


def test_no_blow_up_is_no_level_for_latency_and_near_full_contexts_are_named_beside_it() -> None:
    rising = [row for row in sweep() if (row.concurrency or 0) < 16]
    text = page(rising)
    assert "Latency-focused: no limit found up to concurrency 8, the highest level tested" in text
    assert "For prompts of 12 tokens, answers of 64. Interactive: no limit found up to concurrency 8" in text
    assert "choose by an objective (`slo.p95_e2e_s`" in text
    assert "With prompts of 4,000 tokens" not in text
    full = replace(synthetic.ladder_row(synthetic.GPU, 8), p95_e2e_s=3.487, tok_s=700.0)
    assert "With prompts of 4,000 tokens, answers of 64, concurrency 8 gave 700.0 tok/s at p95 3.487 s." in page(
        [*rising, full]
    )


def test_the_knee_says_what_the_levels_above_it_give() -> None:
    assert re.search(r"From it to concurrency 32, the highest measured, tok/s changes by \+4\.0 % \(", page(sweep()))
    assert "the highest measured, tok/s changes" not in page([row for row in sweep() if row.concurrency == 1])


def test_preemptions_and_a_full_pool_stand_beside_the_choice() -> None:
    full = synthetic.changed(sweep(), lambda row: row.concurrency == 32, preemptions=5, kv_usage_max=0.99)
    text = page(full, Slo(p95_e2e_s=0.5))
    assert "preemptions began at concurrency 32, 0.990 in use" in text
    loose = page(full, Slo(p95_e2e_s=1.0))
    assert "The level is **KV-bound** already" in loose
    assert "but not a safe one: it is KV-bound already" in loose
    assert "seen in use at most: 99.0 %" in loose
    assert "KV-bound" not in text


def alert_above(made: Choice, metric: str) -> object:
    (found,) = [alert for alert in alerts(made) if metric in alert.metric]
    return None if found.above is None else found.above.value


def test_alerts_on_p95_are_what_one_window_may_reach_or_the_objective_where_it_is_lower() -> None:
    """A mean of repeats scatters less than the single window that an alert sees."""
    made = choice(sweep(noise=0.05), Slo(p95_e2e_s=0.6))
    assert made.point is not None
    mean, one = (f(made.point.reading, "p95_e2e_s") for f in (made.point.curve.interval, made.point.curve.prediction))
    assert mean is not None and one is not None
    noise = made.point.curve.p95_noise
    assert noise is not None
    assert math.log(one.high / one.centre) == pytest.approx(
        2 * math.log(mean.high / mean.centre)
    )  # √(1 + 1/3) to √(1/3)
    assert mean.high < 0.5 < one.high, "or the histogram tells neither"
    assert alert_above(made, "e2e_request_latency") == 0.8
    quiet = choice(sweep(), Slo(p95_e2e_s=0.5))
    assert alert_above(quiet, "e2e_request_latency") == 0.5
    once = choice(sweep(repeats=1), Slo(p95_e2e_s=0.5))
    assert alert_above(once, "e2e_request_latency") == 0.5
    assert "p95 | 0.5 | the objective itself is 0.5 |" in page(sweep(repeats=1), Slo(p95_e2e_s=0.5))
    assert alert_above(choice(sweep(repeats=1), Slo()), "e2e_request_latency") is None


@settings(deadline=None)
@given(p95=st.lists(st.floats(0.001, 100), min_size=5, max_size=5), limit=st.floats(0.01, 200))
def test_no_latency_alert_fires_at_the_level_that_it_was_made_from(p95: list[float], limit: float) -> None:
    """Prometheus may give anything within the bucket that a p95 lies in: the threshold must not lie below its end."""
    made = choice(with_curve(TOK_S, dict(zip(TOK_S, p95, strict=True)), 3, 0.02), Slo(p95_e2e_s=limit))
    if made.point is None:
        return
    bucket_end = next(bound for bound in latency_buckets.E2EL_S if bound >= made.point.p95_e2e_s)
    above = alert_above(made, "e2e_request_latency")
    assert isinstance(above, float)
    assert above >= bucket_end


def why_of(made: Choice, metric: str) -> str:
    (found,) = [alert for alert in alerts(made) if metric in alert.metric]
    return found.why.text


def test_an_alert_on_p95_names_the_misses_that_it_does_not_see() -> None:
    slo = Slo(p95_e2e_s=0.6)
    near = choice(sweep(c16=0.52, c32=0.7), slo)
    assert alert_above(near, "e2e_request_latency") == 0.8
    unseen = "it fires at no repeat of concurrency 32, which missed the objective: "
    assert why_of(near, "e2e_request_latency").endswith(unseen + "there the alert on requests in flight guards it")
    once = choice(sweep(repeats=1, c16=0.52, c32=0.7), slo)
    assert why_of(once, "e2e_request_latency").endswith(unseen + "there watch the client's"), "no number for the other"
    below = why_of(choice(sweep(c8=0.7, c16=0.52, c32=0.9), slo), "e2e_request_latency")
    assert below.endswith("at no repeat of concurrency 8, which missed the objective: there watch the client's")
    for seen in ({"c16": 0.52, "c32": 0.9}, {"c16": 0.52, "c32": 0.798}):  # one repeat of three is above
        assert "it fires at no" not in why_of(choice(sweep(**seen), slo), "e2e_request_latency")
    undecided = choice(sweep(noise=0.05, c16=0.45, c32=0.62), slo)
    assert "it fires at no" not in why_of(undecided, "e2e_request_latency")


@settings(deadline=None)
@given(p95=st.lists(st.floats(0.001, 100), min_size=5, max_size=5), limit=st.floats(0.01, 200))
def test_a_level_that_misses_is_seen_by_the_alert_on_p95_or_named(p95: list[float], limit: float) -> None:
    made = choice(with_curve(TOK_S, dict(zip(TOK_S, p95, strict=True)), 3, 0.02), Slo(p95_e2e_s=limit))
    above = alert_above(made, "e2e_request_latency")
    assert isinstance(above, float)
    named = re.findall(r"at no repeat of concurrency ([\d, ]+), which", why_of(made, "e2e_request_latency"))
    unseen = [c.reading.at for c in made.having(Standing.MISSES) if (c.reading.highest("p95_e2e_s") or 0) <= above]
    assert [int(at) for at in (named[0].split(", ") if named else [])] == unseen


def test_no_alert_rests_on_the_few_samples_of_how_many_waited() -> None:
    made = choice(sweep(), Slo(p95_e2e_s=0.5))
    watching = [alert.metric for alert in alerts(made) if "num_requests_waiting" in alert.metric]
    assert watching == ["`vllm:num_requests_running` and `vllm:num_requests_waiting` together"]


def test_alert_on_kv_usage_is_a_share_of_the_pool_where_it_has_no_room_to_spare() -> None:
    """vLLM's gauge runs from 0 to 1; what a quiet level happened to use says nothing of when the pool is full."""
    quiet = synthetic.changed(sweep(), lambda row: True, kv_usage_max=0.4, preemptions=0)
    for slo in (Slo(p95_e2e_s=0.5), Slo()):
        assert alert_above(choice(quiet, slo), "kv_cache_usage_perc") == 0.9
    early = synthetic.changed(quiet, lambda row: row.concurrency == 32, kv_usage_max=0.8, preemptions=2)
    assert alert_above(choice(early, Slo(p95_e2e_s=0.5)), "kv_cache_usage_perc") == 0.8
    late = synthetic.changed(quiet, lambda row: row.concurrency == 32, kv_usage_max=0.99, preemptions=2)
    assert alert_above(choice(late, Slo(p95_e2e_s=0.5)), "kv_cache_usage_perc") == 0.9
    itself = synthetic.changed(quiet, lambda row: row.concurrency == 16, kv_usage_max=0.95)
    assert alert_above(choice(itself, Slo(p95_e2e_s=0.5)), "kv_cache_usage_perc") == 0.95
    assert "so there is no room to warn of" in page(itself, Slo(p95_e2e_s=0.5))


@settings(deadline=None)
@given(
    p95=st.lists(st.floats(0.01, 10), min_size=5, max_size=5),
    limit=st.floats(0.01, 10),
    noise=st.floats(0.001, 0.3),
)
def test_what_is_chosen_was_measured_and_lies_within_the_objective_with_its_interval(
    p95: list[float], limit: float, noise: float
) -> None:
    rows = with_curve(TOK_S, dict(zip(TOK_S, p95, strict=True)), 3, noise)
    made = choice(rows, Slo(p95_e2e_s=limit))
    held = [c for c in made.candidates if c.standing is Standing.MEETS]
    if made.point is None:
        assert held == []
        return
    assert made.point.p95_upper_s is not None
    assert made.point.p95_upper_s <= limit
    assert made.point.tok_s == max(c.reading.median("tok_s") or 0 for c in held)


@pytest.mark.parametrize("slo", [Slo(), Slo(p95_e2e_s=0.5), Slo(p95_e2e_s=0.01)])
def test_every_sweep_that_is_named_exists(slo: Slo) -> None:
    runs = [synthetic.rows(), sweep(), sweep(repeats=1), sweep(noise=0.2), rates(), rates(None), synthetic.rows()[:8]]
    named = {name for rows in runs for name in re.findall(r"\+sweep=(\w+)", page(rows, slo))}
    assert named
    assert [name for name in named if not (CONF / "sweep" / f"{name}.yaml").is_file()] == []


def test_terminal_gives_it_in_a_line(tmp_path: Path) -> None:
    run = synthetic.write_run(tmp_path, sweep())
    reduce(run)
    knee = "concurrency 16, 2,500 tok/s at p95 0.4500 s, of the levels tested the lowest that could be the knee"
    assert f"  operating point (12 + 64 tokens): {knee}" in answer(run)
    for limit, words in ((0.5, "concurrency 16, 2,500 tok/s at p95 0.4500 s"), (0.01, "no measured level meets the")):
        (run / "manifest.json").write_text(json.dumps({"slo": {"p95_e2e_s": limit}}))
        assert f"  operating point (12 + 64 tokens): {words}" in answer(run)


def test_terminal_gives_the_length_for_the_target_and_whether_its_contexts_fit(tmp_path: Path) -> None:
    run = synthetic.write_run(tmp_path, [row for row in synthetic.rows() if row.purpose == "kv_scaling"])
    reduce(run)
    manifest = {"target": {"concurrency": 16, "context_tokens": 4096}}
    (run / "manifest.json").write_text(json.dumps(manifest))
    text = answer(run)
    assert "longest safe max_model_len for 16 at once: 4096 (42.21 by the engine's count)" in text
    assert "16 requests at once of 4096 tokens: fits, 37.9 % of the pool (arithmetic)" in text
    (run / "manifest.json").write_text("{}")
    assert "longest safe" not in answer(run)


def test_terminal_begins_with_what_was_decided_and_has_one_block_for_each_model(tmp_path: Path) -> None:
    other = [
        replace(row, model="other", session_id=f"other-{row.session_id}", point_id=f"other-{row.point_id}")
        for row in synthetic.rows()
    ]
    run = synthetic.write_run(tmp_path, [*synthetic.rows(), *other])
    (run / "manifest.json").write_text(json.dumps({"slo": {"p95_e2e_s": 0.5}}))
    reduce(run)
    lines = answer(run).splitlines()
    titles = [at for at, line in enumerate(lines) if not line.startswith(" ") and not line.startswith("Files")]
    assert len(titles) == 2
    assert all(lines[at + 1].startswith("  operating point (") for at in titles)
    (run / "manifest.json").write_text(json.dumps({"slo": {"p95_e2e_s": 0.001}}))
    assert "operating point" in answer(run).splitlines()[titles[1] - 1], "what is open comes last"


def test_a_price_that_is_no_number_above_zero_is_none(tmp_path: Path) -> None:
    for given_, read in ((2.5, 2.5), (3, 3.0), (0, None), (-1, None), ("2", None), (True, None), (None, None)):
        (tmp_path / "manifest.json").write_text(json.dumps({"cost": {"gpu_hour": given_}}))
        assert read_gpu_hour(tmp_path) == read


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_latency_buckets_are_those_of_the_installed_vllm() -> None:
    """Its module of bounds alone is run: importing the package takes seconds."""
    vllm = importlib.util.find_spec("vllm")
    assert vllm is not None and vllm.origin is not None
    path = Path(vllm.origin).parent / "v1/metrics/buckets.py"
    if not path.is_file():
        pytest.skip("this vLLM has no module of bounds")
    bounds = runpy.run_path(str(path))
    assert bounds["REQUEST_LATENCY_BUCKETS"] == latency_buckets.E2EL_S
    assert bounds["TIME_TO_FIRST_TOKEN_BUCKETS"] == latency_buckets.TTFT_S
    assert bounds["INTER_TOKEN_LATENCY_BUCKETS"] == latency_buckets.TPOT_S
