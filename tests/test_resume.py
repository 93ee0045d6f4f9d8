"""Going on with a run: where it is written, what may be said anew, what is removed, and what counts as done."""

import json
import re
from pathlib import Path

import pytest

import orchestrator.__main__
from contract.next_steps import NEXT_STEPS
from orchestrator.arguments import read
from orchestrator.plan import make_plan
from orchestrator.preflight import check
from orchestrator.problems import ConfigError
from orchestrator.resume import UNHASHED
from orchestrator.schema import Experiment
from orchestrator.store import Store
from tests.configs import experiment, raw, resolved, sim_fleet


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


# --- what may be said anew ---

ANEW: dict[str, object] = {
    "engine.ready_timeout_s": 4000, "engine.stop_grace_s": 3.5, "engine.memory_back_s": 4.5, "server.start": "warm",
    "load.processes": 7, "load.request_timeout_s": 50, "load.prefix_hit_limit": 0.5, "cluster.address": "auto",
    "cluster.num_gpus": 3, "cluster.gpu": "H100", "cluster.shared_gpus": True, "budget.minutes": 30,
    "budget.gpu_hours": 2.5,
}  # fmt: skip
"""A value for each key, other than its default."""


def said_of(key: str, made: Experiment) -> object:
    section, name = key.split(".")
    return getattr(getattr(made, section), name)


def gone_on_with(store: Store, *typed: str) -> list[Experiment]:
    """Return the experiments of `resume=RUN ...`, as far as they are refused before anything is looked at."""
    experiments = orchestrator.__main__._resumed(read([f"resume={store.directory}", *typed]))
    check(experiments)
    return experiments


def test_no_id_hangs_on_what_may_be_said_anew() -> None:
    assert set(ANEW) == set(UNHASHED)

    def ids(**changes: object) -> list[tuple[str, list[str]]]:
        asked = [experiment(sweep, engine="sim", **changes) for sweep in ("capacity", "rate", "knee", "envelope")]
        sessions = make_plan(resolved(*asked), sim_fleet(int(str(changes.get("cluster__num_gpus", 4))))).sessions
        return [(session.id, [point.id for point in session.points]) for session in sessions]

    before = ids()
    for key, value in ANEW.items():
        assert ids(**{key.replace(".", "__"): value}) == before, key


@pytest.mark.parametrize("key", UNHASHED)
def test_what_no_hash_holds_is_said_anew_for_the_whole_run(tmp_path: Path, key: str) -> None:
    store = stored(tmp_path / "run")
    (own,) = gone_on_with(store)
    assert said_of(key, own) != ANEW[key]
    (changed,) = gone_on_with(store, f"{key}={json.dumps(ANEW[key])}")
    assert said_of(key, changed) == ANEW[key]
    assert gone_on_with(store, f"{key}={json.dumps(said_of(key, own))}") == [own]


def test_a_further_grid_has_what_the_run_has_and_what_is_said_anew(tmp_path: Path) -> None:
    store = stored(tmp_path / "run", cluster__num_gpus=2, load__processes=3, budget__minutes=9)
    own, further = gone_on_with(store, "+sweep=rate", "engine=sim", "load.processes=5", "engine.stop_grace_s=3")
    for each in (own, further):
        assert (each.cluster.num_gpus, each.load.processes, each.budget.minutes) == (2, 5, 9)
        assert each.engine.stop_grace_s == 3
    assert gone_on_with(store, "+sweep=kv", "model=tiny", "engine=sim", "load.processes=5") == [
        own.model_copy(update={"engine": experiment("kv", engine="sim").engine})
    ], "the same grid adds nothing"


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("engine.ready_timeout_s=soon", "engine.ready_timeout_s: should be"),
        ("load.processes=0", "load.processes: should be"),
        ("load.processes=1,2", "load.processes=1,2: a run that is gone on with has one value of it"),
        ("server.max_num_seqs=8", "server.max_num_seqs=8 changes nothing of it; name a whole grid"),
        ("~budget.minutes", "changes nothing of it"),
    ],
)
def test_what_cannot_be_said_anew_is_refused_in_words(tmp_path: Path, typed: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        gone_on_with(stored(tmp_path / "run"), typed)


def test_every_next_step_that_goes_on_can_be_typed(tmp_path: Path) -> None:
    store, typed = stored(tmp_path / "run"), []
    for words in NEXT_STEPS.values():
        for command in re.findall(r"`python -m orchestrator resume=RUN([^`]*)`", words):
            typed.append(command.split())
            gone_on_with(store, *(word.replace("SECONDS", "7200") for word in typed[-1]))
    assert {word.partition("=")[0] for words in typed for word in words} >= {"engine.ready_timeout_s", "load.processes"}
    for words in NEXT_STEPS.values():
        before, _, _ = words.partition("; then `")
        keys = re.findall(r"`(\w+\.\w+)`", before) if before != words else []
        assert set(keys) <= set(UNHASHED), f"resume would not take it: {words}"


def test_the_documentation_names_what_may_be_said_anew() -> None:
    page = (Path(__file__).parent.parent / "docs" / "reliability.md").read_text()
    part = page.partition("## Going on")[2].partition("## ")[0]
    assert {key for key in re.findall(r"`(\w+\.\w+)`", part)} == set(UNHASHED)


def test_one_server_that_is_wanted_in_two_ways_is_refused() -> None:
    asked = [experiment("kv", engine="sim", server__start=start) for start in ("cold", "warm")]
    with pytest.raises(ConfigError, match="server.start: cold and warm for one and the same server of tiny"):
        make_plan(resolved(*asked), sim_fleet())
