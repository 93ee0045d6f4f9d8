"""The target against the load: which measured level stands for it, and what the pages say where none does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis import answer, reduce
from analysis.advice.operating_point import Standing
from analysis.advice.subject import subjects
from analysis.advice.target_load import target_level, target_sentences
from analysis.load.ladder import add_ladder
from analysis.load.load_curve import load_curves
from analysis.pages.kv_notes import kv_page
from analysis.pages.operating_page import operating_page
from analysis.rows.targets import Slo, Targets
from analysis.writing.document import Document
from contract.rows import PointRow
from tests import synthetic_run as synthetic

P95 = {2: 0.35, 4: 0.45, 8: 0.83, 16: 1.85, 32: 3.85}
OBJECTIVE = Slo(p95_e2e_s=0.5)
MEMORY = synthetic.rows()[:8]


def near_full(
    p95: dict[int, float] | None = None,
    repeats: int = 3,
    noise: float = 0.005,
    max_model_len: int = 4096,
    sequences: int | None = None,
    **columns: object,
) -> list[PointRow]:
    """A near-full ladder of known p95, at 4,024 + 64 of 4,096 tokens. Its pool holds the sequences that it was sized
    for; without, it is that of the server as it is configured, for 16."""
    made = []
    pool, blocks = synthetic.pool_of(synthetic.GPU, sequences or 16, max_model_len, None)
    server = {"max_model_len": max_model_len, "prompt_tokens": max_model_len - 72, "sequences": sequences}
    server |= {"kv_cache_memory_bytes": pool} if sequences else {}
    server |= synthetic.kv_columns(synthetic.GPU, max_model_len, pool, blocks)
    for level, value in (P95 if p95 is None else p95).items():
        row = replace(synthetic.ladder_row(synthetic.GPU, level), **(server | columns))
        for repeat in range(repeats):
            factor = 1 + noise * (repeat - (repeats - 1) / 2)
            name = f"{row.purpose}-{row.prompt_tokens}-{row.max_num_seqs}-{level}-r{repeat}"
            made.append(replace(row, point_id=name, repeat=repeat, p95_e2e_s=value * factor, tok_s=100.0 * level))
    return made


def swept(p95: dict[int, float], prompt_tokens: int = 4032, **columns: object) -> list[PointRow]:
    """Levels of the same server, sent by the concurrency sweep: 4,032 + 64 tokens each."""
    return near_full(p95, prompt_tokens=prompt_tokens, **({"purpose": "concurrency"} | columns))


def short(p95_s: float = 0.1) -> list[PointRow]:
    """A sweep of three repeats with 12 + 64 tokens, in which every level is quick."""
    made = [synthetic.load_row(synthetic.GPU, "concurrency", level, r) for level in (1, 4, 16) for r in range(3)]
    return [replace(row, p95_e2e_s=p95_s * (1 + 0.001 * (row.repeat or 0))) for row in made]


def said(rows: Iterable[PointRow], n: int = 16, tokens: int = 4096, slo: Slo = OBJECTIVE) -> str:
    """What is said of the target of the one model."""
    (subject,) = subjects(synthetic.tables_of(rows), slo, Targets(n, tokens), None)
    return " ".join(sentence.text for sentence in target_sentences(subject))


def test_a_level_that_misses_is_said_of_the_target_with_its_p95_and_what_holds() -> None:
    text = said(near_full())
    assert "The target, 16 requests at once of 4096 tokens under load: misses, with p95_e2e_s 1.850 s (1." in text
    assert re.search(
        r"1\.850 s \(1\.8\d+ to 1\.8\d+\) where at most 0\.5 s is asked, measured with 4024 \+ 64 tokens", text
    )
    assert text.endswith("Of that load concurrency 4 holds: 400.0 tok/s at p95 0.4500 s.")


def test_the_standing_is_that_of_the_operating_point() -> None:
    assert ": meets, with p95_e2e_s 0.3500 s" in said(near_full(), n=2)
    assert "Of that load" not in said(near_full(), n=2)
    assert ": meets, by a thin margin, with p95_e2e_s 0.4900 s" in said(near_full(P95 | {4: 0.49}, noise=0.001), n=4)
    torn = said(near_full(P95 | {4: 0.499}, noise=0.02), n=4)
    assert ": undecided, with p95_e2e_s 0.4990 s" in torn
    assert "; `+sweep=capacity` with more `sweep.near_full_context.repeats` tells." in torn
    alone = said(near_full(repeats=1), n=2)
    assert ": undecided: met by its one repeat, with p95_e2e_s 0.3500 s (no interval: one repeat)" in alone


def test_without_an_objective_its_latency_is_said_and_no_verdict() -> None:
    text = said(near_full(), slo=Slo())
    assert "under load: p95_e2e_s 1.850 s (1." in text
    assert "no objective is given to hold that against" in text
    assert not re.search("meets|misses|undecided|Of that load", text)


def test_every_objective_is_held_against_it() -> None:
    rows = [replace(row, p95_ttft_s=1.2) for row in near_full()]
    text = said(rows, slo=Slo(p95_e2e_s=5, p95_ttft_s=0.5))
    assert ": misses, with p95_e2e_s 1.850 s (1.8" in text
    assert "where at most 5 s is asked, p95_ttft_s 1.200 s (1.200 to 1.200) where at most 0.5 s is asked" in text


@pytest.mark.parametrize(
    ("rows", "n", "tokens", "sweep"),
    [
        (short(), 16, 4096, "server.max_model_len=4096 'sweep.near_full_context.concurrency=[16]'"),
        (near_full(), 12, 4096, "server.max_model_len=4096 'sweep.near_full_context.concurrency=[12]'"),
        (near_full(), 16, 4097, "server.max_model_len=4097 'sweep.near_full_context.concurrency=[16]'"),
        (MEMORY, 16, 4096, "server.max_model_len=4096 'sweep.near_full_context.concurrency=[16]'"),
    ],
    ids=["shorter requests", "another concurrency", "a longer context", "no load"],
)
def test_without_such_a_level_it_is_not_measured_and_the_sweep_is_named(
    rows: Sequence[PointRow], n: int, tokens: int, sweep: str
) -> None:
    text = said(rows, n, tokens)
    assert f"under load: not measured; `+sweep=capacity {sweep}` measures it" in text
    assert "p95" not in text


def test_the_cpu_backends_small_pool_is_sized_for_the_target() -> None:
    text = said([synthetic.load_row(synthetic.CPU, "concurrency", 1, 0)])
    assert "'sweep.near_full_context.concurrency=[16]' sweep.near_full_context.sequences=16` measures it" in text


def test_longer_requests_that_hold_tell_and_those_that_miss_leave_it_open() -> None:
    text = said(near_full(), n=2, tokens=2048)
    assert ": meets, with p95_e2e_s 0.3500 s" in text
    assert "measured with 4024 + 64 tokens, which are longer." in text
    text = said(near_full(), n=16, tokens=2048)
    assert (
        "under load: not known from this run, for what was measured is harder: misses, with p95_e2e_s 1.850 s" in text
    )
    assert "`+sweep=capacity server.max_model_len=2048 " in text
    assert "Of that load" not in text


def test_near_full_requests_whose_answers_are_drawn_do_not_fill_the_context() -> None:
    rows = near_full(output_lengths="uniform from 8 to 120")
    text = said(rows)
    assert "under load: not measured; `+sweep=capacity " in text
    assert "'sweep.near_full_context.concurrency=[16]' load.output_tokens=64` measures it" in text
    assert "misses, with p95_e2e_s 1.850 s" in said(rows, tokens=4088), "their mean"
    assert "measured with 4024 + 64 tokens on average" in said(rows, tokens=4088)


def test_prefixes_that_prompts_share_are_named() -> None:
    shared = "8 shared prefixes of 256 tokens"
    assert f"measured with 4024 + 64 tokens, {shared}." in said(near_full(shared_prefix=shared))


def test_a_pool_sized_for_fewer_that_misses_leaves_it_open() -> None:
    text = said(near_full(sequences=4))
    assert "not known from this run, for what was measured is harder: misses" in text
    assert "on a pool that was sized for 4 full-length sequences" in text
    assert "sweep.near_full_context.sequences=16` measures it" in text
    assert "under load: misses" in said(near_full(sequences=16))
    assert "under load: meets" in said(near_full(sequences=1), n=2)


def test_a_level_that_was_tried_and_failed_is_no_untried_one() -> None:
    rows = [synthetic.failed(r, "engine_dead") if r.concurrency == 16 else r for r in near_full()]
    assert "under load: tried and not measured: 3 not measured (failed: engine_dead)" in said(rows)
    assert "`resume=RUN` tries it again" in said(rows)


def test_of_two_servers_the_one_that_holds_the_target_is_named() -> None:
    quick = [
        replace(row, session_id="quick", point_id=f"q-{row.point_id}", max_num_seqs=256) for row in near_full({16: 0.3})
    ]
    text = said([*(replace(row, max_num_seqs=8) for row in near_full()), *quick])
    assert ": meets, with p95_e2e_s 0.3000 s" in text
    assert "on phi-3-mini-4k, seqs 256" in text


def test_a_miss_beyond_noise_stands_before_what_too_few_repeats_leave_open() -> None:
    rows = [*near_full({16: 0.3}, repeats=1), *swept({16: 1.85})]
    text = said(rows)
    assert "under load: misses, with p95_e2e_s 1.850 s" in text
    assert "measured with 4032 + 64 tokens" in text


def test_another_server_that_may_hold_the_target_stands_before_one_that_does_not() -> None:
    rows = [*near_full({16: 0.3}, repeats=1, max_num_seqs=256), *swept({16: 1.85}, max_num_seqs=8)]
    assert "under load: undecided: met by its one repeat" in said(rows)


def test_what_tells_stands_before_what_is_nearer_and_leaves_it_open() -> None:
    longest = near_full({16: 0.3}, max_model_len=8192)
    for nearer in (swept({16: 1.85}, 4436), swept({16: 0.499}, noise=0.02)):
        text = said([*(replace(row, max_model_len=8192) for row in nearer), *longest])
        assert "under load: meets, with p95_e2e_s 0.3000 s" in text
        assert "measured with 8120 + 64 tokens, which are longer" in text


def test_the_targets_own_length_that_misses_stands_before_a_longer_one_that_meets() -> None:
    rows = [*swept({16: 1.85}, max_model_len=8192), *near_full({16: 0.3}, max_model_len=8192)]
    assert "under load: misses, with p95_e2e_s 1.850 s" in said(rows)
    rows = [*swept({16: 0.3}), *near_full({16: 1.85})]
    assert "under load: misses, with p95_e2e_s 1.850 s" in said(rows), "of two as near the one that contradicts"


def test_two_purposes_that_disagree_leave_the_target_undecided() -> None:
    rows = [*swept({16: 0.3}), *swept({16: 1.85}, purpose="batching")]
    assert "under load: undecided: missed under another purpose, with p95_e2e_s 0.3000 s" in said(rows)


def test_a_pool_sized_for_more_than_servers_have_tells_only_by_a_miss() -> None:
    def sized(sequences: int, p95_s: float, beside: Sequence[PointRow] = tuple(short())) -> str:
        return said([*beside, *near_full({32: p95_s}, max_model_len=8192, sequences=sequences)], 32, 8192)

    held = sized(32, 0.3)
    assert "not known from this run, for what was measured is easier: meets, with p95_e2e_s 0.3000 s" in held
    assert "; the pool of the server under load holds 21 of 8192 tokens at once; `+sweep=capacity server." in held
    assert "sweep.near_full_context.concurrency=[32]'` measures it" in held, "on the pool that the card has"
    assert "is easier: meets" in sized(22, 0.3)
    assert "easier" in sized(32, 0.5), "nor do more repeats there tell"
    assert "under load: misses" in sized(32, 1.85)
    assert "under load: meets" in sized(21, 0.3)
    assert "under load: misses" in sized(21, 1.85)
    assert "under load: meets" in sized(4, 0.3)
    smaller = sized(4, 1.85)
    assert "is harder: misses" in smaller and "sequences" not in smaller.partition("`+sweep")[2]
    assert "the measured pool holds 21 of 8192 tokens at once" in sized(32, 0.3, MEMORY)
    assert "under load: meets" in sized(32, 0.3, ()), "no other pool is known"


def test_the_cpu_backends_pool_is_never_sized_for_more_than_servers_have() -> None:
    row = synthetic.load_row(synthetic.CPU, "concurrency", 1, 0)
    assert "sequences=16` measures it" in said([row], 16, 8192)
    assert "sequences=95` measures it" in said([row], 128, 8192), "96 less the null block"
    assert "not measured; the pool of the server under load does not hold one of that length." in said(
        [row], 1, 900_000
    )


def test_what_the_model_does_not_take_has_no_sweep_that_would_tell() -> None:
    shape = synthetic.family("phi-3-mini-4k", synthetic.GPU)
    rows = synthetic.rows(shape)
    (subject,) = subjects(synthetic.tables_of(rows, shape.config), OBJECTIVE, Targets(16, 8192), None)
    (text,) = (sentence.text for sentence in target_sentences(subject))
    assert text.endswith("under load: not measured; the model takes 4,096 tokens at most.")


def test_an_arrival_rate_is_no_concurrency() -> None:
    rows = near_full({16: 0.1}, purpose="rate", concurrency=None, request_rate=16.0, arrivals="poisson, 30 s")
    assert "under load: not measured" in said([replace(row, prompt_tokens=4032, keeps_up=True) for row in rows])


@given(
    st.dictionaries(st.sampled_from([1, 2, 4, 8, 16]), st.floats(0.05, 5), min_size=1),
    st.integers(1, 16),
    st.integers(64, 5000),
    st.sampled_from([None, 1, 8, 64]),
)
def test_a_level_stands_for_the_target_only_where_it_is_no_easier(
    p95: dict[int, float], n: int, tokens: int, sequences: int | None
) -> None:
    rows = [*near_full(p95, sequences=sequences), *short()]
    (subject,) = subjects(synthetic.tables_of(rows), OBJECTIVE, Targets(n, tokens), None)
    level = target_level(subject, n, tokens)
    lengths = {4096 if n in p95 else 0, 76 if n in (1, 4, 16) else 0}
    assert (level is None) == (max(lengths) < tokens)
    if level is not None:
        reading, sample = level.candidate.reading, level.candidate.curve.series.sample
        assert reading.at == n
        assert max(level.candidate.curve.request_tokens, sample.max_model_len if n in p95 else 0) >= tokens
        if level.told and level.candidate.standing is not Standing.MEETS:
            assert level.candidate.curve.request_tokens <= tokens
            assert sample.sequences is None or sample.sequences >= n


@given(
    st.lists(
        st.tuples(
            st.sampled_from([4096, 8192]),
            st.floats(0.05, 5),
            st.sampled_from([1, 3]),
            st.sampled_from([None, 10, 64]),
        ),
        min_size=1,
        unique_by=lambda ladder: (ladder[0], ladder[3]),
    )
)
def test_of_one_server_nothing_that_leaves_the_target_open_hides_what_tells(
    ladders: list[tuple[int, float, int, int | None]],
) -> None:
    rows = [
        replace(row, point_id=f"{row.point_id}-{sequences}")
        for length, p95_s, repeats, sequences in ladders
        for row in near_full({48: p95_s}, repeats, max_model_len=length, sequences=sequences)
    ]
    (subject,) = subjects(synthetic.tables_of([*MEMORY, *rows]), OBJECTIVE, Targets(48, 4096), None)
    level = target_level(subject, 48, 4096)
    each = [
        target_level(replace(subject, choices=(replace(choice, candidates=(candidate,)),)), 48, 4096)
        for choice in subject.choices
        for candidate in choice.candidates
    ]
    decided = (Standing.MEETS, Standing.MISSES)
    told = [one for one in each if one is not None and one.told]
    assert level is not None and len(each) == len(ladders)
    assert level.told == bool(told)
    if any(one.candidate.standing in decided for one in told):
        assert level.candidate.standing in decided
    for one in told:
        sequences = one.candidate.curve.series.sample.sequences
        assert one.candidate.standing is Standing.MISSES or sequences != 64, "the card holds 42 of them"


def test_all_that_answer_join_memory_and_load(tmp_path: Path) -> None:
    run = synthetic.write_run(tmp_path, [*MEMORY, *short(), *near_full()])
    (run / "manifest.json").write_text(
        json.dumps({"slo": {"p95_e2e_s": 0.5}, "target": {"concurrency": 16, "context_tokens": 4096}})
    )
    reduce(run)
    clause = "16 requests at once of 4096 tokens under load: misses, with p95_e2e_s 1.850 s"
    assert re.search(rf"fits, .*\n  {clause}", answer(run)), "beside what memory says of them"
    assert clause in (run / "report.html").read_text()
    notes = (run / "kv_cache_scaling_notes.md").read_text()
    assert notes.index("**fits** (arithmetic") < notes.index(f"The target, {clause}")
    operating = (run / "operating_point.md").read_text()
    assert re.search(rf"^- These figures are for requests of 76 tokens.* The target, {clause}", operating, re.MULTILINE)
    assert re.search(rf"^- \*\*Q2\..* The target, {clause}", operating, re.MULTILINE)


@pytest.mark.parametrize(
    ("memory", "load", "target", "told"),
    [
        ("cold", "warm", Targets(16, 4096), True),
        ("warm", "cold", Targets(16, 4096), False),
        ("cold", "warm", Targets(), False),
        ("cold", "warm", Targets(48, 4096), False),  # no level had so many in flight
    ],
)
def test_notes_on_memory_say_so_where_the_load_they_tell_of_went_to_forked_servers(
    memory: str, load: str, target: Targets, told: bool
) -> None:
    tables = synthetic.tables_of([*MEMORY, *near_full(session_id="load")])
    starts = (load if session.session_id == "load" else memory for session in tables.sessions)
    sessions = (replace(session, start=start) for session, start in zip(tables.sessions, starts, strict=True))
    page = kv_page(replace(tables, sessions=tuple(sessions)), target, OBJECTIVE).text()
    assert ("**forked servers**" in page) == told


def test_load_alone_answers_for_the_target_too(tmp_path: Path) -> None:
    run = synthetic.write_run(tmp_path, near_full())
    (run / "manifest.json").write_text(json.dumps({"target": {"concurrency": 16, "context_tokens": 4096}}))
    reduce(run)
    assert "  16 requests at once of 4096 tokens under load: p95_e2e_s 1.850 s" in answer(run)


def test_twice_the_context_is_answered_by_the_level_that_had_it() -> None:
    def sixth(context: int, n: int = 16, rows: Sequence[PointRow] = (*MEMORY, *near_full())) -> str:
        text = operating_page(synthetic.tables_of(rows), OBJECTIVE, Targets(n, context), None).text()
        return next(line for line in text.splitlines() if line.startswith("- **Q6."))

    found = "Latency and objectives at that length: misses, with p95_e2e_s 1.850 s"
    assert found in sixth(2048), "near-full requests of a max_model_len just so long"
    assert found in sixth(2044)
    assert "Of that load concurrency 4 holds" in sixth(2048)
    assert "at that length: meets, with p95_e2e_s 0.3500 s" in sixth(2044, n=2)
    assert "at that length: not known from this run, for what was measured is harder" in sixth(1024)
    assert "not measured; `+sweep=capacity server.max_model_len=8192 'sweep.near_full_context" in sixth(4096)
    assert "at that length: not measured" in sixth(2048, rows=(*MEMORY, *short()))


def notes(rows: Iterable[PointRow]) -> str:
    return (
        kv_page(synthetic.tables_of([*MEMORY, *rows]), Targets(16, 4096), OBJECTIVE)
        .text()
        .partition("Latency-focused or throughput-focused")[2]
    )


def test_each_load_has_its_own_advice_and_none_is_taken_over_to_another_length() -> None:
    both = notes([*short(), *near_full()])
    loads = re.findall(r"From the levels measured in this run \((prompts of [\d,]+ tokens)", both)
    assert loads == ["prompts of 12 tokens", "prompts of 4,024 tokens"]
    assert both.count("Latency-focused: ") == both.count("Throughput-focused: ") == 2
    assert "what the envelope lets fit" not in both
    assert "not known from this run; `+sweep=capacity` measures contexts" not in both
    alone = notes(short())
    assert "Latency with longer contexts is not known from this run; `+sweep=capacity` measures contexts that" in alone
    assert "From the levels measured in this run (prompts of 4,024" in notes(near_full())
    assert "on a pool that was sized for 4 full-length sequences" in notes(near_full(sequences=4))
    assert "fewer than two levels of load were measured" in notes([])
    assert "prompts of 4,024 tokens" in notes(near_full({16: 1.85}))


def test_what_limits_near_full_levels_is_left_to_the_verdict() -> None:
    doc = Document("page.md")
    add_ladder(doc, load_curves(synthetic.tables_of(near_full()).points, "near_full_context"))
    assert "should set the limit" not in doc.text()
    assert "is said below, under *What limits each level*" in doc.text()
