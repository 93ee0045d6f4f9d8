"""Going on with a run: where it is written, what may be said anew, what is removed, and what counts as done."""

import json
from pathlib import Path

import pytest

import orchestrator.__main__
from orchestrator.store import Store
from tests.configs import raw


def stored(directory: Path, sweep: str = "kv", **changes: object) -> Store:
    """Return a run of one simulated experiment that has measured nothing yet."""
    directory.mkdir(parents=True, exist_ok=True)
    experiments = [raw(sweep, engine="sim", **changes)]
    (directory / "manifest.json").write_text(json.dumps({"experiments": experiments}))
    return Store(directory)


def resumed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *typed: str
) -> tuple[int, str]:
    """Return the exit code of `python -m orchestrator resume=...` in this process, and all that it said."""
    monkeypatch.setattr("sys.argv", ["orchestrator", *typed])
    monkeypatch.setattr("orchestrator.interrupts.raise_on_all", lambda: None)
    code = orchestrator.__main__.main()
    said = capsys.readouterr()
    return code, said.out + said.err


# --- where it is written ---

RAYS = Path("runtime_resources/working_dir_files/_ray_pkg_1")
NO_GPUS = "there are no GPUs: cluster.num_gpus=0"
"""What is said once the directory has been found good, and before anything is started."""


@pytest.mark.parametrize("root", ["/proc/nothing", "outputs"])
def test_a_run_is_gone_on_with_where_it_is_wherever_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], root: str
) -> None:
    """Moved from a place that is gone, or made below a relative root and gone on with by `ray job submit`."""
    store = stored(tmp_path / "shared" / "run", output_root=root, cluster__num_gpus=0)
    (tmp_path / RAYS).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / RAYS)
    code, said = resumed(monkeypatch, capsys, f"resume={store.directory}")
    assert (code, NO_GPUS in said) == (4, True), said


def test_a_run_inside_rays_package_cache_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stored(tmp_path / RAYS / "outputs" / "run", output_root=str(tmp_path), cluster__num_gpus=0)
    monkeypatch.chdir(tmp_path / RAYS)
    code, said = resumed(monkeypatch, capsys, "resume=outputs/run")
    assert (code, "resume: " in said, "Ray's package cache" in said) == (2, True, True), said
