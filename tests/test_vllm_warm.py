"""Real vLLM (the CPU build) started warm, from the command line to the rows."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.command_line import made_place, orchestrate
from workers.engines import vllm

pytestmark = pytest.mark.vllm


def test_a_warm_sweep_measures_forked_servers_and_leaves_nothing(tmp_path: Path) -> None:
    assert vllm.is_installed(), "make test installs the CPU build of vLLM"
    with made_place(tmp_path) as place:
        done = orchestrate(
            place, "+sweep=kv", "model=tiny", "engine.device=cpu", "server.start=warm",
            "sweep.max_model_len=[512,1024]", "sweep.modes=[committed]",
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert place.leftovers() == []
        (run,) = place.outputs.iterdir()
        sessions = pq.read_table(run / "sessions.parquet").to_pylist()
        points = pq.read_table(run / "points.parquet").to_pylist()
        assert (run / "plots" / "startup.svg").is_file()
    assert [(row["start"], row["start_reason"]) for row in sessions] == [("warm", None)] * 2
    for row in sessions:
        phases = {phase["name"]: phase["seconds"] for phase in row["phases"]}
        assert list(phases)[:5] == ["fork", "imports", "arguments", "engine", "worker"]
        assert phases["engine"] < phases["worker"]  # forked; the worker is a new program with an import of its own
        assert sum(phases.values()) == pytest.approx(row["ready_s"])
    for row in points:
        assert row["status"] == "measured"
        assert row["engine_bytes_per_token"] == row["formula_bytes_per_token"] == 4096
