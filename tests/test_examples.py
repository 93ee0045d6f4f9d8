"""The kept runs: what stands in their pages is what the analysis of today says of their rows."""

import shutil
from pathlib import Path

import pytest

import analysis

OUTPUTS = Path(__file__).parent.parent / "outputs"
RUNS = sorted(path for path in OUTPUTS.glob("example-*") if path.is_dir())
TEXT = (".md", ".csv")


def test_runs_are_kept() -> None:
    assert [run.name for run in RUNS] == ["example-cpu", "example-h100", "example-h200"]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_kept_run_reduces_to_the_pages_that_are_kept_with_it(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / run.name)
    written = [Path(path) for path in analysis.reduce(copy) if Path(path).suffix in TEXT]
    assert written
    for path in written:
        kept = run / path.relative_to(copy)
        assert path.read_text() == kept.read_text(), f"python -m analysis outputs/{run.name} writes another {kept.name}"
    made = {path.relative_to(copy) for path in written}
    assert {path.relative_to(run) for path in run.rglob("*") if path.suffix in TEXT} - made == {Path("README.md")}
