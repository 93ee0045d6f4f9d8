"""Notes of a level: each stands where its condition is met, and only there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from analysis.load.knee import KneeVerdict
from analysis.load.load_curve import LoadCurve, load_curves
from analysis.load.request_notes import few_for_p95, request_notes
from analysis.load.server_table import add_server_table
from analysis.load.steady_table import add_steady_table
from analysis.rows.series import concurrency_figure
from analysis.writing.document import Document, join
from contract.rows import ClientRow
from tests import synthetic_run as synthetic


def curve(**columns: object) -> LoadCurve:
    """A level of 32 requests with these columns."""
    row = replace(synthetic.load_row(synthetic.GPU, "concurrency", 8, 0), concurrency=8, **columns)
    (made,) = load_curves(synthetic.tables_of([row]).points, "concurrency")
    return made


CALM = ClientRow(8, 0.1, gap_p99_raised_s=0.0019, ttft_p95_raised_s=0.0, slip_p99_s=0.0004)


def notes(**columns: object) -> str:
    return join(request_notes(curve(**columns).series.readings[0])).text


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"client_lag_s": 0.0132}, "the load client's event loop was up to 13.2 ms late (p99)"),
        ({"gap_p99_raised_s": 0.009}, "stalls of load processes raised the level's p99 gap between chunks by 9.00 ms"),
        ({"ttft_p95_raised_s": 0.0031}, "raised the level's p95 of TTFT by 3.10 ms"),
        ({"ttft_p99_raised_s": 0.19}, "raised the level's p99 of TTFT by 190 ms"),
        ({"e2e_p95_raised_s": 0.0029}, "raised the level's p95 of E2EL by 2.90 ms"),
        ({"e2e_p99_raised_s": 0.087}, "raised the level's p99 of E2EL by 87.0 ms"),
        ({"tpot_p95_raised_s": 0.0004}, "raised the level's p95 of TPOT by 0.400 ms"),
        (
            {"clients": [CALM, replace(CALM, gap_p99_raised_s=0.009)]},
            "raised the p99 gap between chunks of its own req",
        ),
        ({"clients": [CALM, replace(CALM, ttft_p95_raised_s=0.0031)]}, "p95 of TTFT of its own requests by 3.10 ms"),
        ({"clients": [CALM, replace(CALM, e2e_p95_raised_s=0.0029)]}, "p95 of E2EL of its own requests by 2.90 ms"),
        ({"clients": [CALM, replace(CALM, tpot_p95_raised_s=0.0004)]}, "p95 of TPOT of its own requests by 0.400 ms"),
        ({"clients": [CALM, replace(CALM, slip_p99_s=0.0025)]}, "a load process sent up to 2.50 ms late (p99)"),
        ({"p99_connect_s": 0.15}, "requests waited up to 150 ms for their connections (p99), which is in no latency"),
        ({"duration_s": 0.31}, "0.310 s are too short to tell whether the load client was the limit"),
        ({"warmup_stable": False, "warmup_tok_s": [1.0, 2.0, 4.0]}, "had not settled after 3 rounds"),
        ({"asked_s": 30.0, "duration_s": 20.5, "stopped_by": "requests"}, "ran out of requests after 20.5 of 30.0 s"),
        ({"server_hz": 5 / 4, "duration_s": 4.0}, "the server's metrics were answered only 1.2 times a second"),
        ({"api": "chat", "mean_prompt_tokens": 12.3}, "12.3 tokens a prompt by usage"),
        ({"api": "chat", "mean_prompt_tokens": 13.2}, "prompts are +10.0 % off the asked length"),
        ({"api": "chat", "text_cost_assumed": True}, "a word was taken for a token"),
        ({"prefix_hit_ratio": 0.4, "prefix_shared_ratio": 0.5}, "hits up to 40.00 % (shared on purpose: 50.00 %)"),
        ({"prefix_hit_ratio": 0.0, "prefix_shared_ratio": 0.5}, "hits up to 0.00 % (shared on purpose: 50.00 %)"),
        ({"completed": 20}, "p95 of only 20 requests"),
        ({"prefix_reset": False, "prefix_hit_ratio": None}, "did not confirm that its prefix cache was empty"),
    ],
)
def test_what_was_odd_is_said(columns: dict[str, object], words: str) -> None:
    assert words in notes(**columns)


@pytest.mark.parametrize(
    "columns",
    [
        {},
        {
            "client_lag_s": 0.0019,
            "p99_connect_s": 0.0019,
            "clients": [CALM],
            "gap_p99_raised_s": 0.0019,
            "tpot_p95_raised_s": 0.00003,
            "duration_s": 0.51,
            "warmup_stable": None,
            "server_hz": 1 / 0.51,
            "completed": 21,
        },
        {"asked_s": 30.0, "duration_s": 30.1, "stopped_by": "time"},
        {"server_hz": 3 / 1.6008, "duration_s": 1.6008},  # scraped every 0.4 s, the first scrape 8 ms late
        {"duration_s": 0.3, "simulated": True},  # a stand-in's client is not judged
        {  # one process's own figures where the level's are known: of all streams together stalls raised none
            "clients": [CALM, replace(CALM, ttft_p95_raised_s=0.031, e2e_p95_raised_s=0.14)],
            "gap_p99_raised_s": 0.0,
            "ttft_p95_raised_s": 0.000013,
        },
    ],
)
def test_what_was_as_it_should_be_is_not(columns: dict[str, object]) -> None:
    assert notes(**columns) == ""


def test_a_chat_of_the_asked_length_says_its_length_and_no_more() -> None:
    assert notes(api="chat", mean_prompt_tokens=12.3) == "12.3 tokens a prompt by usage"


def test_the_steady_part_has_requests_of_its_own_to_be_too_few() -> None:
    doc = Document("page.md")
    add_steady_table(doc, curve(steady_completed=12))
    assert "p95 of only 12 requests" in doc.text()
    assert few_for_p95(curve(steady_completed=21).series.readings[0], "steady_completed") == []


OF_AN_OLDER_ROW = {"steady_settled_s": None}
WITHOUT_LATENCIES = {name: None for name in synthetic.PointRow.__slots__ if name.startswith("steady_p")} | {
    "steady_completed": None, "steady_mean_e2e_s": None
}  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "others", "words", "lacking"),
    [
        ({}, {}, ["before any answer had ended"], ["are among them", "older version", "too short"]),
        (WITHOUT_LATENCIES, {}, ["before any answer had ended", "| too short for latencies once"], ["older version"]),
        (OF_AN_OLDER_ROW, {}, ["before any answer had ended", "| rows of an older version"], ["too short"]),
        (OF_AN_OLDER_ROW, OF_AN_OLDER_ROW, ["opening burst, in which", "are among them"], ["older version", "had end"]),
    ],
)
def test_whether_the_opening_burst_is_in_steady_latencies_is_said(
    columns: dict[str, object], others: dict[str, object], words: list[str], lacking: list[str]
) -> None:
    rows = [
        replace(synthetic.load_row(synthetic.GPU, "concurrency", c, r), **(columns if (c, r) == (4, 1) else others))
        for c in (2, 4)
        for r in range(2)
    ]
    (made,) = load_curves(synthetic.tables_of(rows).points, "concurrency")
    page = steady_page(made)
    assert [each in page for each in words] == [True] * len(words)
    assert [each in page for each in lacking] == [False] * len(lacking)


def test_levels_whose_steady_parts_are_too_short_for_latencies_have_a_knee_all_the_same() -> None:
    """It is one of tok/s."""
    made = sweep(steady_tok_s=500.0, **WITHOUT_LATENCIES)
    assert made.steady_knee is not None
    assert made.steady_knee.could_be == (1,)


def test_what_the_servers_histograms_say_stands_in_a_table() -> None:
    doc = Document("page.md")
    add_server_table(doc, curve(), "concurrency", concurrency_figure)
    assert "server_queue_mean_s" in doc.text()
    assert "0.008000 | inf |" in doc.text()
    empty = {name: None for name in synthetic.PointRow.__slots__ if name.startswith("server_") and name[-1] in "s"}
    doc = Document("page.md")
    add_server_table(doc, curve(**empty), "concurrency", concurrency_figure)
    assert doc.text().strip() == ""


def test_a_bound_in_the_table_is_one_that_the_histogram_has() -> None:
    rows = [
        replace(synthetic.load_row(synthetic.GPU, "concurrency", 8, n), server_decode_p95_le_s=bound)
        for n, bound in enumerate((0.3, 0.5))
    ]
    (made,) = load_curves(synthetic.tables_of(rows).points, "concurrency")
    doc = Document("page.md")
    add_server_table(doc, made, "concurrency", concurrency_figure)
    (bound,) = [figure.value for figure in doc.figures if figure.name.endswith("server_decode_p95_le_s")]
    assert bound == 0.5


def sweep(**columns: object) -> LoadCurve:
    """Three repeats of five levels, and what their steady parts gave."""
    rows = [synthetic.load_row(synthetic.GPU, "concurrency", c, r) for c in (1, 2, 4, 8, 16) for r in range(3)]
    flat = [replace(row, tok_s=1000.0 + (row.repeat or 0), **columns) for row in rows]
    growing = [replace(row, steady_tok_s=(row.tok_s or 0.0) * (row.concurrency or 0)) for row in flat]
    (made,) = load_curves(synthetic.tables_of(growing if not columns else flat).points, "concurrency")
    return made


def steady_page(made: LoadCurve) -> str:
    doc = Document("page.md")
    add_steady_table(doc, made)
    return doc.text()


def test_verdicts_rest_on_the_whole_run_and_the_other_window_stands_beside_it() -> None:
    """Here ramp and drain alone keep the whole run's throughput from scaling."""
    made = sweep()
    assert made.knee.could_be == (1,)
    assert made.steady_knee is not None
    assert made.steady_knee.verdict is KneeVerdict.NO_KNEE_YET
    page = steady_page(made)
    assert "rest on the whole run" in page
    assert "where throughput stops scaling would be: no knee yet" in page
    assert "| +1500.0 % |" in page  # sixteen times what the whole run gave


def test_the_knee_by_the_steady_parts_is_named() -> None:
    assert "By the steady parts alone the knee would be at concurrency 1." in steady_page(sweep(steady_tok_s=500.0))


def test_a_level_without_a_steady_part_leaves_no_other_knee() -> None:
    rows = [
        replace(synthetic.load_row(synthetic.GPU, "concurrency", c, 0), steady_tok_s=None if c == 4 else 9.0)
        for c in (1, 4)
    ]
    (made,) = load_curves(synthetic.tables_of(rows).points, "concurrency")
    assert made.steady_knee is None
    assert "Not every level has a steady part" in steady_page(made)
