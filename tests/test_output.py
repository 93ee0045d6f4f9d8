"""A reader of the output who leaves early, as `| head` does, gets no traceback, and costs a run nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from analysis import reduce
from tests import synthetic_run as synthetic
from tests.command_line import ROOT

SIGPIPE_KILLED = -13


def without_a_reader(*command: str, errors_too: bool = False) -> tuple[int, str]:
    """Run Python with a standard output that nobody reads; return its exit code and what it said on standard error."""
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        stdout=writes,
        stderr=writes if errors_too else subprocess.PIPE,
        timeout=60,
    )
    os.close(writes)
    return done.returncode, (done.stderr or b"").decode()


@pytest.mark.parametrize("arguments", [["+sweep=kv", "engine=sim", "dry_run=true"], ["+sweep=kv", "--cfg", "job"]])
def test_a_plan_that_nobody_reads_ends_quietly(arguments: list[str]) -> None:
    assert without_a_reader("-m", "orchestrator", *arguments) == (0, "")


def test_a_refusal_that_nobody_reads_keeps_its_exit_code() -> None:
    assert without_a_reader("-m", "orchestrator", "+sweep=kv", "server.nonsense=1", errors_too=True)[0] == 2


def test_work_goes_on_after_the_reader_left() -> None:
    code = "from orchestrator import output; output.outlives_its_reader(); import sys\n"
    code += "for _ in range(3): print('x' * 100_000, flush=True)\n"
    code += "print('done', file=sys.stderr)"
    assert without_a_reader("-c", code) == (0, "done\n")


def test_analysis_ends_quietly_with_its_artifacts_written(tmp_path: Path) -> None:
    synthetic.write_run(tmp_path, [row for row in synthetic.rows() if row.purpose == "concurrency"])
    code, said = without_a_reader("-m", "analysis", str(tmp_path))
    assert said == ""
    assert code in (0, SIGPIPE_KILLED)
    assert (tmp_path / "operating_point.md").is_file()
    reduce(tmp_path)  # and what it left can be reduced again
