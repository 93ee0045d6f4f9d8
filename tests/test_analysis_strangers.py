"""A process of others on the card of some levels: every page that rests on them says so, and none says what limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from analysis import reduce
from analysis.comparing.difference_rows import what_differs
from analysis.comparing.drift import drift_of
from analysis.comparing.matching import matched
from analysis.comparing.runs import Run
from analysis.load.neighbours import neighbour_sentences
from analysis.pages.answer import answer
from analysis.pages.kv_notes import kv_page
from analysis.rows.tables import Tables
from analysis.rows.targets import Targets
from contract.rows import PointRow
from tests import synthetic_run as synthetic

STRANGER = "pid 4711 on GPU-0: 900 MiB"
MARK = "Other processes were on the card at concurrency 32."
LEVELS = (1, 2, 4, 8, 16, 32)
PAGES = ("operating_point.md", "batching_benchmark.md", "report.html")


def sweep(beside: Sequence[int] = (), slower: float = 1.6, repeats: int = 3) -> list[PointRow]:
    """Return a sweep that rises all along but where a stranger slows the levels of `beside`, in so many repeats."""
    made = []
    for at in LEVELS:
        for repeat in range(3):
            row = synthetic.load_row(synthetic.GPU, "concurrency", at, repeat)
            taken = slower if at in beside else 1.0
            tok_s, p95 = 100 * at * (1 + repeat / 100), 0.2 * math.sqrt(at) * (1 + repeat / 100)
            row = replace(row, tok_s=tok_s / taken, p95_e2e_s=p95 * taken, waiting_max=0, running_max=at)
            seen = [STRANGER] if at in beside and repeat < repeats else []
            made.append(replace(row, foreign_processes=seen, preemptions=0, kv_usage_max=0.1))
    return made


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the same sweep reduced twice: with the cards to itself, and with a stranger at its highest level."""
    found = {}
    for name, beside in (("alone", ()), ("beside", (32,))):
        found[name] = synthetic.write_run(tmp_path_factory.mktemp(name), sweep(beside, slower=2.2))
        (found[name] / "manifest.json").write_text('{"slo": {"p95_e2e_s": 1.2}}')
        reduce(found[name])
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_deciding_page_names_the_level_and_who_was_there(runs: dict[str, Path], page: str) -> None:
    text = (runs["beside"] / page).read_text()
    assert "at concurrency 32 in 3 of 3 repeats another process on the card: pid 4711 on GPU-0: 900 MiB" in text
    assert MARK + " What rests on that is not known of this server alone" in text
    quiet = (runs["alone"] / page).read_text()
    assert "ther process" not in quiet
    assert "thers on the card" not in quiet


def test_the_answer_in_the_terminal_says_so(runs: dict[str, Path]) -> None:
    assert answer(runs["beside"]).count(MARK) == 1
    assert "process" not in answer(runs["alone"])


def test_a_level_against_the_objectives_is_marked(runs: dict[str, Path]) -> None:
    lines = (runs["beside"] / "operating_point.md").read_text().splitlines()
    marked = [line for line in lines if line.endswith(", with others on the card |")]
    assert [line.split("|")[2].strip() for line in marked] == ["32"]


@pytest.mark.parametrize("number", ["Q3", "Q4", "Q5", "Q7", "Q8", "Q9", "Q10"])
def test_answers_that_rest_on_it_are_marked(runs: dict[str, Path], number: str) -> None:
    text = (runs["beside"] / "operating_point.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith(f"- **{number}.")]
    assert MARK in line


def section(run: Path, heading: str) -> str:
    return (run / "batching_benchmark.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]


def test_what_limits_the_levels_is_not_known(runs: dict[str, Path]) -> None:
    limits = section(runs["beside"], "What limits each level")
    rows = {line.split("|")[1].strip(): line for line in limits.splitlines() if line.startswith("| ")}
    assert "| not known |" in rows["32"]
    assert "what others on the card took from it is not known" in rows["32"]
    assert STRANGER in rows["32"]
    assert "| not saturated |" in rows["8"], "a higher level without anybody beside gives clearly more"
    assert "compute-bound**" not in limits
    assert "the same sweep with the cards to itself tells" in limits


def test_power_and_rules_of_thumb_carry_the_mark(runs: dict[str, Path]) -> None:
    assert MARK in section(runs["beside"], "GPU utilization, power and what is left unused")
    rules = [line for line in section(runs["beside"], "Rules of thumb").splitlines() if line.startswith("- ")]
    assert rules
    assert all(MARK in rule for rule in rules if "prompts of" in rule)


def test_the_knee_is_left_open_in_the_table_and_in_the_file(runs: dict[str, Path]) -> None:
    lines = (runs["beside"] / "concurrency_sweep.csv").read_text().splitlines()
    assert all(line.endswith(",") for line in lines[1:])
    assert (runs["alone"] / "concurrency_sweep.csv").read_text().splitlines()[1].endswith(",no")
    assert "could be |" not in section(runs["beside"], "Concurrency sweep: the knee")


def test_a_level_is_named_from_one_of_its_repeats_on() -> None:
    said = " ".join(s.text for s in neighbour_sentences(synthetic.tables_of(sweep((8, 32), repeats=1))))
    assert "at concurrency 8 in 1 of 3 repeats another process" in said
    assert "at concurrency 32 in 1 of 3 repeats another process" in said


def test_looks_of_a_session_that_its_points_do_not_tell_are_named() -> None:
    tables = synthetic.tables_of(sweep((32,)))
    seen = [STRANGER, "pid 9 on GPU-0: 5 MiB", "pid 9 on GPU-0: 7 MiB", "pid 10 on GPU-0: 1 MiB"]
    tables = replace(tables, sessions=tuple(replace(s, foreign_processes=seen) for s in tables.sessions))
    (sentence,) = [s.text for s in neighbour_sentences(tables) if "at none of its measured points" in s.text]
    assert "other processes on the card: pid 9 on GPU-0: 5 MiB and 1 more" in sentence
    assert STRANGER not in sentence


def test_what_differs_between_runs_names_a_stranger() -> None:
    def run(name: str, rows: list[PointRow]) -> Run:
        return Run(name, Path(name), synthetic.tables_of(rows), {})

    base, other = run("base", sweep()), run("other", sweep((32,)))
    (differing,) = what_differs(base, other, matched(base, other, same_server=True).pairs)
    assert differing["what"] == "processes of others on the cards"
    assert (differing["base"], differing["other"]) == ("none seen", f"{STRANGER}, at 3 of 18 points")
    text = drift_of(base, other).text()
    assert f"processes of others on the cards none seen → {STRANGER}, at 3 of 18 points" in text
    assert what_differs(base, base, matched(base, base, same_server=True).pairs) == []


def memory_page(tables: Tables) -> str:
    page = kv_page(tables, Targets())
    assert page is not None
    return page.text()


@pytest.mark.parametrize("seen_by", ["memory point", "level of load", "look of the session", "nobody"])
def test_strangers_of_a_server_are_in_its_residual(seen_by: str) -> None:
    memory = [row for row in synthetic.rows() if row.kind == "memory"]
    server = next(row for row in memory if row.point_id == "committed-2048")
    level = replace(sweep()[0], session_id=server.session_id, attempt=server.attempt)
    seen = [STRANGER]
    rows = synthetic.changed(
        [*memory, level],
        lambda row: row.point_id == {"memory point": server.point_id, "level of load": level.point_id}.get(seen_by),
        foreign_processes=seen,
    )
    tables = synthetic.tables_of([rows[-1], *rows[:-1]])
    if seen_by == "look of the session":
        sessions = [
            replace(s, foreign_processes=seen) if s.session_id == server.session_id else s for s in tables.sessions
        ]
        tables = replace(tables, sessions=tuple(sessions))
    said = [line for line in memory_page(tables).splitlines() if line.startswith("While these servers lived")]
    if seen_by == "nobody":
        assert said == []
        return
    assert said == [
        f"While these servers lived, others were on their cards: committed, max_model_len 2048: another process on the "
        f"card: {STRANGER}. What those took since the server started is in the residual."
    ]
