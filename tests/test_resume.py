"""Going on with a run: where it is written, what may be said anew, what is removed, and what counts as done."""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import orchestrator.__main__
from analysis.rows.shards import build_tables
from contract.next_steps import NEXT_STEPS
from contract.rows import CLIENT_LIMITED, FAILED, MEASURED, OVER_BUDGET, PRUNED
from contract.specs import SessionSpec
from orchestrator.arguments import read
from orchestrator.cluster import Cluster, ClusterError
from orchestrator.driver import Outcome
from orchestrator.fleet import Fleet, local_fleet
from orchestrator.manifest import make_manifest
from orchestrator.plan import Plan, make_plan
from orchestrator.preflight import check
from orchestrator.problems import ConfigError
from orchestrator.resume import UNHASHED, differences, left_to_do
from orchestrator.schema import Experiment
from orchestrator.store import NotWritten, Store
from tests import synthetic_run
from tests.configs import cpu_fleet, experiment, raw, resolved, sim_fleet
from tests.in_this_process import orchestrate_here
from tests.test_driver import PretendedCluster


def stored(directory: Path, sweep: str = "kv", **changes: object) -> Store:
    """Return a run of one simulated experiment that has measured nothing yet."""
    directory.mkdir(parents=True, exist_ok=True)
    experiments = [raw(sweep, engine="sim", **changes)]
    (directory / "manifest.json").write_text(json.dumps({"experiments": experiments}))
    return Store(directory)


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
    code, said = orchestrate_here(monkeypatch, capsys, f"resume={store.directory}")
    assert (code, NO_GPUS in said) == (4, True), said


def test_a_run_inside_rays_package_cache_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stored(tmp_path / RAYS / "outputs" / "run", output_root=str(tmp_path), cluster__num_gpus=0)
    monkeypatch.chdir(tmp_path / RAYS)
    code, said = orchestrate_here(monkeypatch, capsys, "resume=outputs/run")
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
            gone_on_with(store, *(each.replace("SECONDS", "7200").replace("NUMBER", "8") for each in typed[-1]))
    named = {word.partition("=")[0] for words in typed for word in words}
    assert named >= {"engine.ready_timeout_s", "load.processes"}
    for words in NEXT_STEPS.values():
        before, _, _ = words.partition("; then `")
        keys = re.findall(r"`(\w+\.\w+)`", before) if before != words else []
        assert set(keys) <= set(UNHASHED), f"resume would not take it: {words}"


def test_the_documentation_names_what_may_be_said_anew() -> None:
    page = (Path(__file__).parent.parent / "docs" / "reliability.md").read_text()
    part = page.partition("## Going on")[2].partition("## ")[0]
    assert set(re.findall(r"`(\w+\.\w+)`", part)) == set(UNHASHED)


def test_one_server_that_is_wanted_in_two_ways_is_refused() -> None:
    asked = [experiment("kv", engine="sim", server__start=start) for start in ("cold", "warm")]
    with pytest.raises(ConfigError, match=r"server.start: cold and warm for one and the same server of tiny"):
        make_plan(resolved(*asked), sim_fleet())


# --- what is done, and what is removed ---


def put(store: Store, *points: str, session: str = "s") -> list[Path]:
    row = next(row for row in synthetic_run.rows() if row.status == MEASURED)
    for point in points:
        store.put(replace(row, session_id=session, point_id=point))
    return [store.directory / "shards" / session / f"{point}.parquet" for point in points]


def test_a_copy_of_a_shard_makes_no_other_point_done(tmp_path: Path) -> None:
    store = Store.create(tmp_path, "test")
    (shard,) = put(store, "a")
    shutil.copy(shard, shard.with_name("b.parquet"))
    shutil.copytree(shard.parent, shard.parent.with_name("t"))
    assert (list(store.rows("s")), list(store.rows("t"))) == (["a"], [])


def test_a_file_of_other_columns_makes_no_point_done(tmp_path: Path) -> None:
    store = Store.create(tmp_path, "test")
    (shard,) = put(store, "a")
    pq.write_table(pa.table({"odd": [1]}), shard)
    assert store.rows("s") == {}


def torn_at(share: float) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def holed(path: Path) -> None:
    """As a disk may leave a file whose host has failed: its end is there, its middle is not."""
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(1000) + content[1004:])


@pytest.mark.parametrize("tear", [torn_at(0), torn_at(0.5), torn_at(0.99), holed])
def test_what_is_not_whole_is_set_aside_whether_or_not_it_is_planned(
    tmp_path: Path, tear: Callable[[Path], None]
) -> None:
    store = Store.create(tmp_path, "test")
    whole, torn = put(store, "a", "b")
    assert store.discard_torn() == []
    tear(torn)
    content = torn.read_bytes()
    assert store.discard_torn() == [torn]
    assert (whole.exists(), torn.exists()) == (True, False)
    assert torn.with_name(f".{torn.name}.torn").read_bytes() == content
    assert store.discard_torn() == []
    build_tables(store.directory)


def test_what_is_only_kept_from_us_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.create(tmp_path, "test")
    (shard,) = put(store, "a")

    def stale(path: Path) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(pq, "ParquetFile", stale)
    with pytest.raises(ConfigError, match="cannot be read"):
        store.discard_torn()
    assert shard.exists()


def test_a_shard_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, str]] = []
    sync, rename = os.fsync, Path.replace

    def fsync(file: int) -> None:
        done.append(("sync", Path(f"/proc/self/fd/{file}").readlink().name))
        sync(file)

    def replace_(self: Path, target: Path) -> Path:
        done.append(("name", target.name))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace_)
    put(Store.create(tmp_path, "test"), "a")
    assert done == [("sync", "a.parquet.tmp"), ("name", "a.parquet"), ("sync", "s")]


# --- warm parents ---


@pytest.mark.parametrize(("left", "expected"), [("warm", ["imports", "looks"]), ("cold", ["looks"])])
def test_what_servers_are_forked_from_is_imported_while_nodes_are_looked_at_if_one_is_left_to_fork(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    left: str,
    expected: list[str],
) -> None:
    seen: list[str] = []

    class Pretended(contextlib.AbstractContextManager["Pretended"]):
        def __init__(self, *how: object) -> None:
            pass

        def __exit__(self, *why: object) -> None:
            pass

        def fleet(self, engine: object) -> Fleet:
            return cpu_fleet()

        def warm_up(self, fleet: Fleet, first: dict[str, SessionSpec]) -> None:
            assert first.keys() == {node.id for node in fleet.nodes}
            seen.append("imports")

        def remove_left(self, fleet: Fleet) -> None:
            seen.append("looks")
            raise ClusterError("that will do")

    grid = {"engine__device": "cpu", "sweep__modes": ["committed"]}
    experiments = [raw("kv", server__start="warm", **grid), raw("kv", server__start="cold", seed=1, **grid)]
    experiments[1]["sweep"]["max_model_len"] = [256]
    (tmp_path / "manifest.json").write_text(json.dumps({"experiments": experiments}))
    monkeypatch.setattr("orchestrator.cluster.Cluster", Pretended)
    monkeypatch.setattr("orchestrator.preflight.check", lambda _: None)  # vLLM need not be installed here
    monkeypatch.setattr(
        "orchestrator.resume.left_to_do", lambda plan, _: [each for each in plan.sessions if each.start == left]
    )
    code, said = orchestrate_here(monkeypatch, capsys, f"resume={tmp_path}")
    assert (code, seen) == (4, expected), said


# --- what differs, and what a further try may replace ---


@pytest.mark.parametrize(
    ("then", "now", "words"),
    [
        ("0.25.0", "0.26.0", ["vLLM: 0.25.0 then, 0.26.0 now"]),
        ("0.25.0", "0.25.0", []),
        ("0.25.0", None, []),
        (None, "0.26.0", []),
    ],
)
def test_only_what_both_sides_know_is_a_difference(then: str | None, now: str | None, words: list[str]) -> None:
    manifest = {"fleet": asdict(replace(cpu_fleet(), vllm_version=then))}
    assert differences(manifest, replace(cpu_fleet(), vllm_version=now)) == words


@pytest.mark.parametrize(
    ("then", "now", "words"),
    [
        ([("A=1", "B=2")], [("A=1", "B=2")], []),
        ([("A=1",)], [("A=2=3",)], ["environment: A: 1 then, 2=3 now"]),
        ([("A=1",)], [()], ["environment: A: 1 then, not set now"]),
        ([()], [("A=1",)], ["environment: A: not set then, 1 now"]),
        ([("A=1",)], [("A=1",), ()], ["environment: A: 1 then, 1 or not set now"]),
        ([None], [("A=1",)], []),
        ([("A=1",)], [None], []),
    ],
)
def test_a_variable_that_moves_numbers_is_a_difference(
    then: list[tuple[str, ...] | None], now: list[tuple[str, ...] | None], words: list[str]
) -> None:
    def fleet(nodes: list[tuple[str, ...] | None]) -> Fleet:
        (node,) = cpu_fleet().nodes
        return Fleet("cpu", tuple(replace(node, environment=lines) for lines in nodes))

    manifest = json.loads(json.dumps({"fleet": asdict(fleet(then))}))
    assert differences(manifest, fleet(now)) == words


def test_the_manifest_has_the_environment_that_servers_inherit_and_resume_holds_it_against_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("orchestrator.preflight.check", lambda _: None)  # vLLM need not be installed here
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    asked = experiment("kv", engine__device="cpu")
    here = local_fleet(asked.cluster, asked.engine)
    plan = make_plan(resolved(asked), here)
    Store(tmp_path).put_manifest(make_manifest("run", [asked], plan, here))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "FLASHINFER")
    code, said = orchestrate_here(monkeypatch, capsys, f"resume={tmp_path}")
    assert code == 2
    assert "environment: VLLM_CPU_KVCACHE_SPACE: 1 then, 2 now" in said
    assert "environment: VLLM_ATTENTION_BACKEND: not set then, FLASHINFER now" in said


@pytest.mark.parametrize(("status", "replaces"), [(FAILED, False), (OVER_BUDGET, True), (PRUNED, True)])
def test_a_failed_try_without_numbers_never_replaces_one_that_has_some(
    tmp_path: Path, status: str, replaces: bool
) -> None:
    store = Store.create(tmp_path, "test")
    limited = next(row for row in synthetic_run.rows() if row.requests)
    limited = replace(limited, status=CLIENT_LIMITED, failure_class=CLIENT_LIMITED, tok_s=690.9)
    bare = replace(limited, attempt=limited.attempt + 1, status=status, requests=[], tok_s=None)
    path = store.directory / "shards" / limited.session_id / f"{limited.point_id}.parquet"
    for row, expected in [
        (replace(bare, status=FAILED), bare.attempt),
        (limited, limited.attempt),
        (bare, bare.attempt if replaces else limited.attempt),
        (replace(limited, attempt=9), 9),
    ]:
        store.put(row)
        assert pq.read_table(path, columns=["attempt"]).to_pylist() == [{"attempt": expected}]


# --- a full disk, and a second Ctrl-C ---


class FullDisk:
    """Takes so many manifests, and says what a disk says then."""

    def __init__(self, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room, self.put = room, Store.put_manifest
        monkeypatch.setattr(Store, "put_manifest", lambda store, manifest: self(store, manifest))

    def __call__(self, store: Store, manifest: dict[str, object]) -> None:
        self.room -= 1
        if self.room < 0:
            raise NotWritten("manifest.json could not be written: no space left on device")
        self.put(store, manifest)


def measured(store: Store) -> tuple[Outcome, Plan]:
    asked = experiment("concurrency", engine="sim", sweep__concurrency=[1], sweep__repeats=1, controls="off")
    plan = make_plan(resolved(asked), sim_fleet(1))
    left = left_to_do(plan, store)
    pretended = cast("Cluster", PretendedCluster())
    return orchestrator.__main__._measure(pretended, sim_fleet(1), store, [asked], plan, left), plan


def test_a_disk_that_is_full_at_the_last_file_does_not_cost_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    FullDisk(1, monkeypatch)
    store = Store.create(tmp_path, "test")
    outcome, plan = measured(store)
    assert (outcome.measured, "no space left" in (outcome.not_written or "")) == (1, True)
    assert left_to_do(plan, store) == []
    assert orchestrator.__main__._conclude(store, outcome) == 3
    said = capsys.readouterr().out
    assert f"no space left on device; go on with: python -m orchestrator resume={store.directory}" in said


def test_a_disk_that_is_full_as_a_run_is_gone_on_with_is_no_bad_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotWritten):
        FullDisk(0, monkeypatch)
        measured(Store.create(tmp_path, "new"))
    outcome, _ = measured(stored(tmp_path / "run", "concurrency"))
    assert (outcome.measured, "no space left" in (outcome.not_written or "")) == (0, True)


def test_ended_at_once_a_run_says_where_it_is_and_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = stored(tmp_path / "run")

    def interrupted(*where: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("orchestrator.cluster.Cluster", interrupted)
    code, said = orchestrate_here(monkeypatch, capsys, f"resume={store.directory}")
    assert code == 130
    assert f"python -m analysis {store.directory}" in said
    assert f"go on with: python -m orchestrator resume={store.directory}\n" in said
