"""What neighbours cost: told only by a level that was measured alone and in company, and never beyond its noise."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from analysis import reduce
from analysis.load.neighbours import add_neighbours, neighbour_sentences, neighbours
from analysis.numbers.intervals import CONFIDENCE
from analysis.rows.tables import Tables
from analysis.writing.document import Document
from contract.rows import PointRow
from tests import synthetic_run as synthetic

OTHER = ["another-session"]


def reading(purpose: str, n: int, tok_s: float, beside: bool, minute: int = 0) -> PointRow:
    row = synthetic.load_row(synthetic.GPU, purpose, 8, n)
    began = f"2026-01-02T03:{minute:02}:00Z"
    return replace(row, tok_s=tok_s, co_running_sessions=OTHER if beside else [], started_at=began)


def said(tables: Tables) -> str:
    return " ".join(sentence.text for sentence in neighbour_sentences(tables))


def both(beside: list[float], alone: list[float]) -> list[PointRow]:
    made = [reading("anchor", n, tok_s, beside=True, minute=n) for n, tok_s in enumerate(beside)]
    return made + [reading("control", n, tok_s, beside=False, minute=30 + n) for n, tok_s in enumerate(alone)]


def test_cost_beyond_noise_is_given_with_its_interval() -> None:
    words = said(synthetic.tables_of(both([800.0, 804.0, 796.0], [1000.0, 1004.0])))
    assert "tok_s changed by -20.2 %" in words
    assert "no more than noise" not in words
    assert "a drift of that server is in these figures" in words


def test_cost_within_noise_is_said_to_be_noise() -> None:
    words = said(synthetic.tables_of(both([1000.0, 950.0, 1040.0], [1000.0, 1010.0])))
    assert "in tok_s no more than noise" in words


def test_single_readings_tell_nothing_for_sure() -> None:
    words = said(synthetic.tables_of(both([800.0], [1000.0])))
    assert "tok_s changed by -20.0 %" in words
    assert "whether neighbours cost anything is not known from this run" in words


@pytest.mark.parametrize("rows", [both([800.0, 810.0], []), both([], [800.0, 810.0])], ids=["beside", "alone"])
def test_one_kind_alone_is_no_figure(rows: list[PointRow]) -> None:
    tables = synthetic.tables_of(rows)
    assert neighbours(tables.points) == []
    known = "no other session of the run on its host" in said(tables)
    assert known == (not rows[0].co_running_sessions)
    assert known or "not known from this run" in said(tables)


def test_failed_readings_and_runs_without_load_say_nothing() -> None:
    rows = [synthetic.failed(row, "engine_dead") for row in both([800.0], [1000.0])]
    assert neighbour_sentences(synthetic.tables_of(rows)) == []
    doc = Document("x.md")
    add_neighbours(doc, synthetic.tables_of([r for r in synthetic.rows() if r.kind == "memory"]))
    assert doc.blocks == []


def test_alone_first_is_no_drift() -> None:
    rows = [
        replace(row, started_at=f"2026-01-02T0{1 if row.co_running_sessions else 0}:00:00Z")
        for row in both([1, 2], [3, 4])
    ]
    assert "drift" not in said(synthetic.tables_of(rows))


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """2,000 seeded draws of three readings in company and two alone, 2 % noise, neighbours that cost 5 %."""
    (found,) = neighbours(synthetic.tables_of(both([800.0] * 3, [1000.0] * 2)).points)
    dice, covered = random.Random(7), 0
    for _ in range(2_000):
        beside = tuple(replace(p, tok_s=950 * math.exp(dice.gauss(0, 0.02))) for p in found.beside)
        alone = tuple(replace(p, tok_s=1000 * math.exp(dice.gauss(0, 0.02))) for p in found.alone)
        change = replace(found, beside=beside, alone=alone).change("tok_s")
        assert change.low is not None
        assert change.high is not None
        covered += change.low <= -0.05 <= change.high
    assert abs(covered / 2_000 - CONFIDENCE) < 0.015


def test_every_page_states_it(tmp_path: Path) -> None:
    rows = [r for r in synthetic.rows() if r.purpose in ("kv_scaling", "concurrency")]
    synthetic.write_run(tmp_path, [*rows, *both([800.0, 804.0], [1000.0, 1004.0])])
    reduce(tmp_path)
    pages = ("batching_benchmark.md", "operating_point.md", "kv_cache_scaling_notes.md", "report.html")
    assert all("tok_s changed by -20.0 %" in (tmp_path / page).read_text() for page in pages)
