"""whatif: arithmetic is called arithmetic, what was measured says so, and the rest is not known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.__main__ import main
from analysis.comparing.whatif import Fact, Question, what_if
from analysis.errors import AnalysisError
from contract.rows import PointRow
from tests import synthetic_run as synthetic

CONFIG = {
    "model_type": "phi3", "max_position_embeddings": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "hidden_size": 3072, "torch_dtype": "bfloat16",
}  # fmt: skip
ONE = 393_216


def ask(tmp_path: Path, rows: list[PointRow], max_model_len: int | None = 8192, n: int | None = 16) -> list[Fact]:
    ids = {row.session_id for row in rows}
    sessions = [{"id": name, "model": {"config": CONFIG}} for name in ids]
    synthetic.write_tables(tmp_path / "run", rows)
    (tmp_path / "run" / "manifest.json").write_text(json.dumps({"sessions": sessions}))
    ((_, facts),) = what_if(tmp_path / "run", Question(max_model_len, n)).models
    return facts


def of(facts: list[Fact], what: str) -> list[Fact]:
    return [fact for fact in facts if fact.values["what"] == what]


def bases(facts: list[Fact], what: str) -> list[str]:
    return [fact.basis for fact in of(facts, what)]


@pytest.fixture(scope="module")
def rows() -> list[PointRow]:
    return [replace(row, requests=[], telemetry=[], server_samples=[]) for row in synthetic.rows()]


def test_fit_is_the_need_against_the_measured_pool(tmp_path: Path, rows: list[PointRow]) -> None:
    facts = ask(tmp_path, rows)
    pool = synthetic.GPU.pool_bytes
    room = pool * (1 - 1 / (pool // (synthetic.GPU.block * ONE)))  # less the null block
    (fit,) = of(facts, "fit")
    assert fit.basis == "arithmetic"
    assert fit.values["need_bytes"] == 16 * 8192 * ONE
    assert fit.values["headroom_bytes"] == pytest.approx(room - 16 * 8192 * ONE)
    assert fit.values["share_pct"] == pytest.approx(100 * 16 * 8192 * ONE / room, rel=1e-9)
    assert fit.values["verdict"] == "fits"
    (one,) = of(facts, "request")
    assert one.values["requests_that_fit"] == pytest.approx(room / (8192 * ONE), rel=1e-9)
    assert (of(facts, "pool")[0].basis, of(facts, "pool")[0].values["pool_bytes"]) == ("measured", pool)


@pytest.mark.parametrize(("n", "verdict"), [(18, "fits"), (20, "tight"), (22, "waits or preempts")])
def test_room_for_what_moves_is_kept(tmp_path: Path, rows: list[PointRow], n: int, verdict: str) -> None:
    (fit,) = of(ask(tmp_path, rows, 8192, n), "fit")
    assert fit.values["verdict"].startswith(verdict)


def test_what_the_run_did_not_do_is_not_known(tmp_path: Path, rows: list[PointRow]) -> None:
    facts = ask(tmp_path, rows, 8192, 24)
    assert bases(facts, "model_limit") == ["not known"]
    assert bases(facts, "pool_at_length") == ["not known"]
    assert bases(facts, "latency_at_length") == ["not known"]
    levels = of(facts, "level")
    assert {fact.basis for fact in levels} == {"not known"}
    assert "its levels are 1, 2, 4, 8, 16, 32" in levels[0].words
    assert not any(name in fact.values for fact in levels for name in ("tok_s", "p95_e2e_s"))


def test_a_level_that_was_measured_is_told_as_it_was(tmp_path: Path, rows: list[PointRow]) -> None:
    facts = ask(tmp_path, rows, 4096, 32)
    (sweep,) = (fact for fact in of(facts, "level") if fact.values["load"].startswith("concurrency"))
    (point,) = (row for row in rows if row.purpose == "concurrency" and row.concurrency == 32)
    assert (sweep.basis, sweep.values["tok_s"], sweep.values["p95_e2e_s"]) == ("measured", point.tok_s, point.p95_e2e_s)
    assert not of(facts, "latency_at_length")  # the near-full ladder had this level at this length
    assert not of(facts, "model_limit")


def test_a_simulated_run_measured_nothing(tmp_path: Path) -> None:
    shape = replace(synthetic.GPU, simulated=True, engine="sim", device="sim", device_name=None)
    facts = ask(tmp_path, synthetic.rows(shape), 4096, 32)
    assert {fact.basis for fact in facts} == {"simulated", "arithmetic", "not known"}
    assert bases(facts, "pool") == ["simulated"]


def test_a_run_of_load_alone_has_its_servers_pool(tmp_path: Path) -> None:
    load = [row for row in synthetic.rows() if row.purpose == "near_full_context"]
    assert of(ask(tmp_path, load, 4096, 16), "fit")
    with pytest.raises(AnalysisError, match="no server of this run told the size of its KV pool"):
        ask(tmp_path / "b", [replace(row, engine_kv_bytes=None) for row in load])


def test_without_a_formula_no_need_is_computed(tmp_path: Path, rows: list[PointRow]) -> None:
    gone: dict[str, Any] = {"formula_bytes_per_sequence": None, "formula_bytes_per_token": None}
    with pytest.raises(AnalysisError, match="formula of its model is not known"):
        ask(tmp_path, [replace(row, **gone) for row in rows])


def test_terminal_and_json_are_the_same(
    tmp_path: Path, rows: list[PointRow], capsys: pytest.CaptureFixture[str]
) -> None:
    facts = ask(tmp_path, rows)
    asked = ["whatif", str(tmp_path / "run"), "max_model_len=8192", "concurrency=16"]
    assert main([*asked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["question"] == {"max_model_len": 8192, "concurrency": 16}
    assert [fact["words"] for fact in told["models"][0]["facts"]] == [fact.words for fact in facts]
    assert main(asked) == 0
    out = capsys.readouterr().out
    assert all(f"{fact.basis:<10}  {fact.words}" in out for fact in facts)
    assert out.startswith("phi-3-mini-4k, NVIDIA H100 80GB HBM3, dummy weights\n")


@given(st.text(max_size=20))
def test_questions_that_are_none_are_refused(words: str) -> None:
    try:
        question = Question.parse([words])
    except AnalysisError as error:
        assert len(str(error).splitlines()) <= 1 or "\n" in words or not words.isprintable()
    else:
        assert (question.max_model_len or question.concurrency or 0) > 0


@pytest.mark.parametrize("words", ["max_model_len=0", "concurrency=-1", "tokens=8", "8192", "concurrency=²"])
def test_only_counts_above_zero_can_be_asked(words: str) -> None:
    with pytest.raises(AnalysisError, match="is not understood"):
        Question.parse([words])
    with pytest.raises(AnalysisError, match="each once"):
        Question.parse(["concurrency=1", "concurrency=2"])
