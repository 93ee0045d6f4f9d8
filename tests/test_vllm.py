"""Real vLLM (the CPU build), from the command line to the artifacts."""

import csv
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests import test_analysis_figures as audit
from tests.command_line import made_place, orchestrate
from workers.engines import vllm

pytestmark = pytest.mark.vllm

SHORT_KV = """\
defaults: [kv, _self_]
max_model_len: [512, 1024]
utilization_max_model_len: [512]
"""
SHORT_CONCURRENCY = """\
defaults: [concurrency, _self_]
concurrency: [1, 4]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert vllm.is_installed(), "make test installs the CPU build of vLLM"
    own = tmp_path_factory.mktemp("conf")
    (own / "sweep").mkdir()
    (own / "sweep" / "short_kv.yaml").write_text(SHORT_KV)
    (own / "sweep" / "short_concurrency.yaml").write_text(SHORT_CONCURRENCY)
    with made_place(tmp_path_factory.mktemp("outputs")) as place:
        done = orchestrate(
            place, "--config-dir", str(own), "-m", "+sweep=short_kv,short_concurrency", "model=tiny",
            "engine.device=cpu", "server.max_model_len=512", "load.output_tokens=8", "load.requests_min=8",
            "load.requests_per_level=2",
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert place.leftovers() == []
        (directory,) = place.outputs.iterdir()
        return directory


def points(run: Path, **columns: object) -> list[dict[str, object]]:
    rows = pq.read_table(run / "points.parquet").to_pylist()
    return [row for row in rows if all(row[name] == value for name, value in columns.items())]


def test_memory_follows_the_formula_and_the_engine_agrees_exactly(run: Path) -> None:
    with (run / "kv_cache_scaling.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["max_model_len"] for row in rows] == ["512", "1024"]
    assert float(rows[1]["bytes_per_token_est"]) == pytest.approx(4096, rel=0.02)
    for row in points(run, mode="committed", kind="memory"):
        assert row["engine_bytes_per_token"] == row["formula_bytes_per_token"] == 4096
        assert row["engine_max_concurrency"] == row["formula_max_concurrency"]
        assert row["warmup_reached_batch"]


def test_load_is_exact_in_tokens_and_misses_the_prefix_cache(run: Path) -> None:
    rows = points(run, kind="load")
    assert sorted(row["concurrency"] for row in rows) == [1, 4]  # type: ignore[type-var]
    for row in rows:
        assert (row["completed"], row["failed"], row["prefix_hit_ratio"]) == (row["num_requests"], 0, 0)
        assert row["server_generation_tokens"] == row["num_requests"] * row["output_tokens"]  # type: ignore[operator]
        assert row["gpu_util_pct"] is None
        assert row["vllm_version"] == vllm.installed_version()


def test_server_and_client_tell_of_the_same_window(run: Path) -> None:
    for row in points(run, kind="load"):
        assert row["token_count_difference"] == 0
        requests, generated = row["num_requests"], row["server_generation_tokens"]
        assert row["server_steps"] * row["server_step_mean_tokens"] == pytest.approx(  # type: ignore[operator]
            generated + requests * row["prompt_tokens"]  # type: ignore[operator]
        )
        phases = [row[f"server_{phase}_mean_s"] for phase in ("queue", "prefill", "decode")]
        assert 0 < sum(phases) < row["mean_e2e_s"]  # type: ignore[arg-type, operator]
        assert row["server_ttft_mean_s"] < row["mean_ttft_s"]  # type: ignore[operator]
        assert all(row[f"server_{phase}_p95_le_s"] for phase in ("queue", "prefill", "decode", "ttft"))
    samples = pq.read_table(run / "server_samples.parquet").to_pylist()
    assert {row["point_id"] for row in samples} <= {row["point_id"] for row in points(run, kind="load")}
    assert all(row["waiting"] == row["waiting_capacity"] + row["waiting_deferred"] for row in samples)


def test_every_number_of_the_pages_is_recomputed_from_the_tables(run: Path) -> None:
    audit.test_every_number_on_a_page_is_a_registered_figure(run)
    audit.test_every_figure_is_recomputed_from_the_tables(run)
    audit.test_text_of_a_figure_is_its_value_rounded(run)


def test_the_workers_say_what_their_pool_and_their_weights_take(run: Path) -> None:
    pools = {row["session_id"]: row["engine_kv_bytes"] for row in points(run, mode="committed")}
    assert pools
    accounts = {row["session_id"]: row["account"] for row in pq.read_table(run / "sessions.parquet").to_pylist()}
    for session, pool in pools.items():
        (account,) = accounts[session]
        assert (account["moment"], account["device_id"], account["used_bytes"]) == ("ready", "host", None)
        assert account["kv_bytes"] == pool
        assert 2**23 < account["weights_bytes"] < 2**24  # a matrix that the backend has packed anew is no parameter


def test_every_server_was_proven_stopped_and_its_memory_came_back(run: Path) -> None:
    rows = pq.read_table(run / "sessions.parquet").to_pylist()
    assert len(rows) == 3
    for row in rows:
        assert (row["mem_baseline_bytes"], row["mem_after_stop_bytes"]) == (0, 0)
        assert row["memory_back_s"] is not None
        assert not any("=/" in word and "site-packages" in word for word in row["environment"])
