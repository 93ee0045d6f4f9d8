"""Every benchmark that a page or a docstring names starts by that command, in a shell that knows nothing of it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLACES = ("README.md", "docs/*.md", "benchmarks/**/*.md", "benchmarks/**/*.py")
PAGES = [page for place in PLACES for page in ROOT.glob(place)]
NAMED = sorted({script for page in PAGES for script in re.findall(r"python (benchmarks/[\w/]+\.py)", page.read_text())})


def test_there_are_some() -> None:
    assert {"benchmarks/warm_start.py", "benchmarks/client/run.py", "benchmarks/slo_truth.py"} < set(NAMED)


@pytest.mark.parametrize("script", NAMED)
def test_it_starts_by_that_command(script: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, script, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")
