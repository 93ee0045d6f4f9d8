"""Before the first server: what stops a run, what is only said, and that all of it is said at once."""

from dataclasses import replace
from pathlib import Path

import pytest

from contract.specs import ModelSpec
from orchestrator.fleet import Fleet, Node, NoRoom, kind_of, of_one_kind
from orchestrator.preflight import LEAST_FREE_BYTES, NotReady, check_nodes
from orchestrator.schema import EngineConfig
from tests.configs import experiment
from workers import caches, node_report
from workers.node_report import NodeReport

GOOD = NodeReport("a", ("NVIDIA H100",) * 2, 80 * 2**30, "580.1", "0.25.1", "schema 5", (), 2**40, "/tmp")
ROOM = 2**40


def engine(name: str = "vllm") -> EngineConfig:
    return experiment("kv", engine=name).engine


def two_nodes(device: str = "cuda") -> Fleet:
    nodes = tuple(Node(host, 2, 80 * 2**30, "NVIDIA H100", host=host) for host in ("a", "b"))
    return Fleet(device, nodes)  # type: ignore[arg-type]


def judged(
    second: NodeReport,
    shared_gpus: bool = False,
    name: str = "vllm",
    room: int = ROOM,
    held: dict[str, int] | None = None,
) -> list[str]:
    return check_nodes(
        two_nodes(), {"a": GOOD, "b": replace(second, host="b")}, engine(name), shared_gpus, room, held or {}
    )


def problems(second: NodeReport, **changes: object) -> list[str]:
    with pytest.raises(NotReady) as caught:
        judged(second, **changes)  # type: ignore[arg-type]
    return caught.value.problems


def test_equal_nodes_pass_without_a_word() -> None:
    assert judged(GOOD) == []


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (replace(GOOD, vllm_version="0.26.0"), "vLLM differs: 0.25.1 on a; 0.26.0 on b"),
        (replace(GOOD, vllm_version=None), "b: vLLM is not installed there"),
        (replace(GOOD, code="schema 4"), "this package differs: schema 4 on b; schema 5 on a"),
        (replace(GOOD, gpu_names=("NVIDIA H100",)), "b: Ray was told of 2 GPUs, NVML shows 1"),
        (replace(GOOD, foreign_processes=("pid 7 on GPU-1: 900 MiB",)), "b: somebody else is on its GPUs: pid 7"),
        (
            replace(GOOD, cache="/var/tmp/x", cache_free_bytes=0),
            "b: /var/tmp/x (or name another in VLLM_CAPACITY_CACHE_ROOT) has 0 MiB free, a run needs 1024",
        ),
        (replace(GOOD, missing_models=("/models/x is no directory there",)), "b: /models/x is no directory there"),
        (replace(GOOD, free_bytes=2**20), "b: /tmp has 1 MiB free"),
    ],
)  # fmt: skip
def test_what_stops_a_run(second: NodeReport, words: str) -> None:
    assert any(words in line for line in problems(second))


def test_all_is_said_at_once() -> None:
    second = replace(GOOD, vllm_version="0.26.0", free_bytes=0, foreign_processes=("pid 7",))
    assert len(problems(second, room=LEAST_FREE_BYTES - 1)) == 5  # the last: what to do about the process


def test_a_driver_that_differs_and_processes_on_shared_cards_are_only_named() -> None:
    second = replace(GOOD, driver_version="570.2", foreign_processes=("pid 7",))
    said = judged(second, shared_gpus=True)
    assert said == ["driver differs: 570.2 on b; 580.1 on a", "b: somebody else is on its GPUs: pid 7"]


def test_processes_are_another_jobs_where_one_holds_cards_and_in_the_way_where_none_does() -> None:
    second = replace(GOOD, foreign_processes=("pid 7",))
    assert judged(second, held={"b": 1}) == ["b: somebody else is on its GPUs: pid 7"]
    assert problems(second, held={"a": 1})[0] == "b: somebody else is on its GPUs: pid 7"


def test_pretended_cards_need_no_vllm_and_no_nvml() -> None:
    bare = replace(GOOD, gpu_names=(), vllm_version=None, driver_version=None)
    assert check_nodes(two_nodes("sim"), {"a": bare, "b": bare}, engine("sim"), False, ROOM, {}) == []


# --- kinds of cards ---


def node(name: str | None, host: str) -> Node:
    return Node(host, 4, 80 * 2**30, name, host=host)


def test_kinds_never_mix_silently() -> None:
    nodes = [node("NVIDIA H100", "a"), node("NVIDIA A100", "b")]
    with pytest.raises(NoRoom, match=r"4 x NVIDIA H100 on a; 4 x NVIDIA A100 on b; name one with cluster.gpu=NAME"):
        of_one_kind(nodes, None)
    assert of_one_kind(nodes, "a100") == (nodes[1],)
    with pytest.raises(NoRoom, match=r"cluster.gpu=L4: no node has it"):
        of_one_kind(nodes, "L4")


def test_a_node_of_two_kinds_cannot_be_chosen_by_name() -> None:
    mixed = node(kind_of(["NVIDIA L4", "NVIDIA A100", "NVIDIA L4"]), "a")
    for wanted in (None, "A100"):
        with pytest.raises(NoRoom, match="CUDA_VISIBLE_DEVICES"):
            of_one_kind([mixed], wanted)


def test_one_kind_passes_and_so_do_nodes_without_cards() -> None:
    same = [node("NVIDIA H100", "a"), node("NVIDIA H100", "b")]
    assert of_one_kind(same, None) == tuple(same)
    assert of_one_kind([], "H100") == ()


# --- what a node says ---


def test_a_node_says_which_models_it_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setenv(caches.VARIABLE, str(tmp_path / "cache"))
    here = ModelSpec("here", {}, False, path=str(tmp_path))
    gone = ModelSpec("gone", {}, False, path="/no/such/model")
    shape = ModelSpec("shape", {}, True)
    report = node_report.look((here, gone, shape), most_cards=0)
    assert report.missing_models == (
        "/no/such/model is no directory there: models belong on a shared file system, or on every node alike",
    )
    assert report.free_bytes > 0
    assert (report.cache, report.cache_free_bytes > 0) == (str(tmp_path / "cache"), True)
    assert report.foreign_processes == ()


def test_weights_that_are_not_there_are_missed_unless_none_are_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    model = ModelSpec("m", {}, False, path=str(tmp_path))
    (said,) = node_report.look((model,), most_cards=0).missing_models
    assert said.startswith(f"{tmp_path} has no weights (*.safetensors, ")
    assert node_report.look((replace(model, dummy_weights=True),), most_cards=0).missing_models == ()
