"""Clusters that were started by hand, of pretended GPUs: nodes and links that go away, submitted jobs, tokens."""

import asyncio
import contextlib
import fcntl
import json
import os
import re
import secrets
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray  # without a token in the environment, as by whoever uses it in the same process

from contract.rows import CAME_TO_NOTHING, FAILED, MEASURED, MUTE_PARENT, SessionRow
from contract.specs import SessionSpec, Start
from orchestrator import knock
from orchestrator.cluster import (
    ActorFailed,
    ActorLost,
    Cluster,
    ClusterError,
    actors,
    connection,
    errors,
    nodes,
    warm_parents,
)
from orchestrator.fleet import Fleet, local_fleet
from orchestrator.plan import make_plan
from orchestrator.preflight import NotReady
from tests.command_line import ROOT
from tests.configs import experiment, gpu_fleet, resolved, sim_fleet
from tests.privileged import not_shown
from tests.ray_hosts import BIN, RayHosts, linked_hosts, ray_hosts, set_link, wait_for
from tests.test_session import spec
from workers import processes
from workers.launch import warm
from workers.node_report import NodeReport
from workers.temporary import own

pytestmark = pytest.mark.ray
QUICK = ["engine=sim", "load.requests_min=4", "load.requests_per_level=1", "load.output_tokens=4"]
SLOW_START = "server.extra_args={start_s: 3}"
TWO_LEVELS = ["+sweep=concurrency", "sweep.concurrency=[1,2]", *QUICK]
LEFT_LIMIT_S = 90.0


def left_by_a_killed_process(mark: Path) -> Path:
    """Return a directory there as one of a session that was killed before its guard began."""
    directory = Path(tempfile.mkdtemp(prefix="vc-", dir=mark))
    os.close(own(directory))
    return directory


def rows(outputs: Path) -> list[dict[str, object]]:
    """Return the rows of the points of the last run."""
    directory = sorted(outputs.iterdir())[-1]
    return pq.read_table(directory / "points.parquet").to_pylist()  # type: ignore[no-any-return]


def assert_each_point_is_measured_once(outputs: Path, points: int) -> None:
    found = rows(outputs)
    assert [row["status"] for row in found] == [MEASURED] * points
    assert len({row["point_id"] for row in found}) == points
    assert len(list(outputs.glob("*/shards/*/[!s]*.parquet"))) == points


def assert_no_server_is_left(hosts: RayHosts) -> None:
    deadline = time.monotonic() + LEFT_LIMIT_S
    while hosts.servers() and time.monotonic() < deadline:
        time.sleep(1)
    assert hosts.servers() == []


# --- private ones ---


def test_one_process_can_have_a_private_ray_after_another() -> None:
    asked = experiment("kv", engine="sim", cluster__num_gpus=1)
    for _ in range(2):
        with Cluster(asked.cluster, local_fleet(asked.cluster, asked.engine)) as cluster:
            assert cluster.fleet(asked.engine).nodes


def test_a_tmpdir_that_cannot_be_locked_is_said_with_what_to_export(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(connection, "remove_ownerless", list)
    monkeypatch.setattr(fcntl, "flock", refuses)
    asked = experiment("kv", engine="sim", cluster__num_gpus=1)
    with pytest.raises(ClusterError, match=r"TMPDIR=\S+ cannot be locked \(No locks available\): export TMPDIR=/tmp"):
        Cluster(asked.cluster, local_fleet(asked.cluster, asked.engine)).__enter__()


DEAF = """
import signal, time
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGIO])
print("deaf", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("owner", ["closes it", "was killed"])
def test_a_warm_parent_that_hangs_in_a_library_ends_with_a_private_ray(
    owner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python hears nothing there; whoever removes its directory hides it from all who would look for it later."""
    (tmp_path / "deaf.py").write_text(DEAF)
    path = os.pathsep.join([str(ROOT), str(tmp_path)])

    class Owner:
        def __init__(self) -> None:
            from workers.launch.warm import WarmParent

            self._parent = WarmParent(("deaf",), {**os.environ, "PYTHONPATH": path})

        def parent(self) -> int:
            log = self._parent.socket.with_name("log")
            while "deaf" not in log.read_text():
                time.sleep(0.02)
            return self._parent.pid

        def close(self) -> None:
            self._parent.close()

    asked = experiment("kv", engine="sim", cluster__num_gpus=1)
    with Cluster(asked.cluster, local_fleet(asked.cluster, asked.engine)) as cluster:
        actor = ray.remote(num_cpus=0)(Owner).remote()
        pid = ray.get(actor.parent.remote(), timeout=60)
        cluster._warm_parents._owners = {"node": actor}
        if owner == "was killed":
            ray.kill(actor)
        else:
            monkeypatch.setattr(connection, "end_what_is_left_in", lambda *_: None)
    deadline = time.monotonic() + 20
    while processes.is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_warm_parent_that_heeds_nothing_is_killed_before_the_driver_no_longer_waits_for_its_owner() -> None:
    """An interrupted run leaves a cluster at once, and looks for nothing there afterwards."""
    assert warm.CLOSE_LIMIT_S < warm_parents.CLOSE_LIMIT_S


def test_an_actor_that_cannot_be_made_is_a_defect_and_what_is_left_on_nodes_is_removed_when_a_run_leaves(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = experiment("kv", engine="sim", cluster__num_gpus=1)
    with Cluster(asked.cluster, local_fleet(asked.cluster, asked.engine)) as cluster:
        (node,) = [node.id for node in cluster.fleet(asked.engine).nodes]
        unlike = warm_spec(gpus=0, start=Start.COLD)
        with pytest.raises(ActorFailed, match=r"AttributeError: .* no attribute 'engine'"):
            asyncio.run(cluster.session(unlike, node, "run", 1))
        left = left_by_a_killed_process(Path(os.environ["TMPDIR"]))
        cluster._nodes = [node]  # as of a cluster that others have started
    assert f"what was killed had left {left} on " in capsys.readouterr().out
    assert not left.exists()


# --- actors ---


@pytest.mark.parametrize(
    ("last_line", "expected"),
    [
        ("ValueError: a defect", ActorFailed),
        ("OSError: [Errno 28] No space left on device: '/tmp/vc-x'", ActorLost),
    ],
)
def test_an_actor_that_could_not_be_made_is_tried_elsewhere_only_for_a_reason_of_its_node(
    last_line: str, expected: type[Exception]
) -> None:
    words = (
        f"The actor died because of an error raised in its creation task, ray::SessionActor.__init__()\n{last_line}\n"
    )

    async def call() -> None:
        raise ray.exceptions.RayActorError("id", words, actor_init_failed=True)

    with pytest.raises(expected, match=re.escape(last_line)):
        asyncio.run(errors.result(call()))


def test_an_actor_that_died_is_lost_with_the_first_words_of_why() -> None:
    async def call() -> None:
        raise ray.exceptions.RayActorError(
            "id", "The actor died unexpectedly.\n\tpid: 7\nWorker exit type: SYSTEM_ERROR"
        )

    with pytest.raises(ActorLost, match=r"^RayActorError: The actor died unexpectedly\.$"):
        asyncio.run(errors.result(call()))


def test_warm_parents_live_on_before_the_first_session_of_their_node(monkeypatch: pytest.MonkeyPatch) -> None:
    pinged = threading.Semaphore(0)
    actor = SimpleNamespace(ping=SimpleNamespace(remote=pinged.release))
    made = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *_: actor))
    monkeypatch.setattr(ray, "remote", lambda **_: lambda _: made)
    monkeypatch.setattr(nodes, "on", lambda _: None)
    monkeypatch.setattr(warm_parents, "RENEWED_EVERY_S", 0.01)
    cluster = Cluster(experiment("kv").cluster, None)
    fleet = sim_fleet(1)
    cluster.warm_up(fleet, {node.id: SimpleNamespace() for node in fleet.nodes})  # type: ignore[misc]
    try:
        assert all(pinged.acquire(timeout=20) for _ in range(3))
    finally:
        cluster._warm_parents.close()


def test_a_node_whose_cards_are_of_several_kinds_has_no_warm_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is imported once has looked at its first card, whichever a server then has."""
    made: list[str] = []
    sessions: list[tuple[Any, ...]] = []

    async def ping() -> None: ...

    async def socket() -> tuple[str, None]:
        return "/one", None

    def remote(*arguments: Any) -> Any:
        sessions.append(arguments)
        return SimpleNamespace(ping=SimpleNamespace(remote=ping), socket=SimpleNamespace(remote=lambda _spec: socket()))

    options = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=remote))
    monkeypatch.setattr(ray, "remote", lambda **_: lambda _: options)
    monkeypatch.setattr(connection, "actor_class", lambda: options)
    monkeypatch.setattr(nodes, "on", made.append)
    cluster = Cluster(experiment("kv").cluster, None)
    of_one, of_two = gpu_fleet(1, 1).nodes
    of_two = replace(of_two, all_kinds=("NVIDIA A100", "NVIDIA H100"))
    warm = warm_spec()
    fleet = Fleet("cuda", (replace(of_one, all_kinds=("NVIDIA H100",)), of_two))
    cluster.warm_up(fleet, {of_one.id: warm, of_two.id: warm})
    assert made == [of_one.id]

    async def start() -> None:
        for node in (of_one, of_two):
            await cluster.session(warm, node.id, "run", 1)

    asyncio.run(start())
    cluster._warm_parents.close()
    why = (
        "this node has no warm parent: its cards are of several kinds (NVIDIA A100, NVIDIA H100), and an import would "
        "know the first one only"
    )
    assert [arguments[-3:-1] for arguments in sessions[1:]] == [("/one", None), (None, why)]


def test_a_node_imports_when_the_queue_first_places_a_server_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen imports from a disk that all share would slow the one that matters."""
    imports: list[tuple[str, str]] = []
    sessions: list[tuple[Any, ...]] = []

    async def ping() -> None: ...

    def importing(scheduling_strategy: str) -> Any:
        async def socket(_: SessionSpec) -> tuple[str, None]:
            return f"/{scheduling_strategy}", None

        def remote(spec: SessionSpec, _: Any) -> Any:
            imports.append((scheduling_strategy, spec.id))
            return SimpleNamespace(ping=SimpleNamespace(remote=ping), socket=SimpleNamespace(remote=socket))

        return SimpleNamespace(remote=remote)

    def session(*arguments: Any) -> Any:
        sessions.append(arguments)
        return SimpleNamespace(ping=SimpleNamespace(remote=ping))

    actor = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=session))
    monkeypatch.setattr(ray, "remote", lambda **_: lambda _: SimpleNamespace(options=importing))
    monkeypatch.setattr(connection, "actor_class", lambda: actor)
    monkeypatch.setattr(nodes, "on", lambda node: node)
    cluster = Cluster(experiment("kv").cluster, None)
    fleet = gpu_fleet(8, 8, 8)
    first, second, third = (node.id for node in fleet.nodes)
    warm, another, cold = sessions_of_two_starts()
    cluster.warm_up(fleet, {first: warm})
    assert imports == [(first, warm.id)]

    async def start() -> None:
        await cluster.session(warm, third, "run", 2, again=True)
        assert imports == [(first, warm.id)], "it is never forked"
        for node, one in ((first, warm), (second, cold), (third, another), (third, warm)):
            await cluster.session(one, node, "run", 1)

    asyncio.run(start())
    cluster._warm_parents.close()
    assert imports == [(first, warm.id), (third, another.id)], "for the one that came first"
    assert [arguments[-3] for arguments in sessions] == [None, f"/{first}", None, f"/{third}", f"/{third}"]


def sessions_of_two_starts() -> tuple[SessionSpec, SessionSpec, SessionSpec]:
    """Return two sessions that are to be forked and one that is not."""
    one, other, *_ = make_plan(resolved(experiment("kv", sweep__max_model_len=[512, 1024])), gpu_fleet(1)).sessions
    return replace(one, start=Start.WARM), replace(other, start=Start.WARM), replace(one, start=Start.COLD)


HOSTS = {"a": "gpu-01", "b": "gpu-02", "c": "gpu-03"}
H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"
NO_PACKAGE = "gpu-02 could not be looked at: ModuleNotFoundError: No module named 'workers' (is this package installed"


def cluster_of(
    monkeypatch: pytest.MonkeyPatch, answers: dict[str, Any], types: dict[str, str], gpu: str | None = None
) -> Cluster:
    """A cluster whose nodes answer so when they are looked at (None: not at all), and are of these types to Ray."""

    def get(node: str) -> Any:
        if isinstance(answers[node], Exception):
            raise answers[node]
        return answers[node]

    def wait(looks: list[str], num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        return [node for node in looks if answers[node] is not None], [node for node in looks if answers[node] is None]

    def on(node: str) -> Any:
        return SimpleNamespace(remote=lambda *_: node)

    told = [
        {"NodeID": node, "Alive": True, "NodeManagerHostname": host, "Resources": {"GPU": 8.0, "CPU": 64.0}}
        for node, host in HOSTS.items()
        if node in answers
    ]
    for node in told:
        node["Resources"] |= {f"accelerator_type:{types[each]}": 1.0 for each in types if each == node["NodeID"]}  # type: ignore[operator]
    look = SimpleNamespace(options=lambda scheduling_strategy: on(scheduling_strategy))
    monkeypatch.setattr(ray, "nodes", lambda: told)
    monkeypatch.setattr(ray, "remote", lambda **_: lambda _: look)
    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(nodes, "on", lambda node: node)
    return Cluster(experiment("kv", cluster__address="auto", cluster__gpu=gpu).cluster, None)


def of(name: str, host: str) -> NodeReport:
    return NodeReport(host, (name,) * 8, 80 * 2**30, "570", "0.25.1")


def a_missing_package() -> Exception:
    class RayTaskError(Exception):
        """As Ray's: its message is a traceback of the node."""

    return RayTaskError(
        "ray::look() (pid=7, ip=10.0.0.2)\n  File \"x\"\nModuleNotFoundError: No module named 'workers'"
    )


def test_all_nodes_that_could_not_be_looked_at_are_named_at_once_with_why(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"a": of(H100, "gpu-01"), "b": a_missing_package(), "c": None}
    with pytest.raises(NotReady) as refused:
        cluster_of(monkeypatch, answers, {}).fleet(experiment("kv").engine)
    first, second = refused.value.problems
    assert first.startswith(NO_PACKAGE)
    assert second == "gpu-03 could not be looked at: it says nothing within 120 s"


@pytest.mark.parametrize(
    ("gpu", "types", "left_out"),
    [
        ("H100", {"a": "H100", "b": "A100"}, True),
        ("H100", {"a": "H100", "b": "H100"}, False),
        ("H100", {"a": "H100"}, False),
        ("H100", {"b": "A100"}, False),
        (None, {"a": "H100", "b": "A100"}, False),
    ],
    ids=["another kind", "the same", "not known", "those chosen not known", "no kind asked for"],
)
def test_a_node_that_cannot_be_looked_at_is_in_the_way_unless_it_is_surely_of_another_kind(
    gpu: str | None,
    types: dict[str, str],
    left_out: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cluster = cluster_of(monkeypatch, {"a": of(H100, "gpu-01"), "b": a_missing_package()}, types, gpu)
    if left_out:
        assert [node.id for node in cluster.fleet(experiment("kv").engine).nodes] == ["a"]
        assert f"WARNING  {NO_PACKAGE} there?). It is left out: to Ray its cards are A100" in capsys.readouterr().out
    else:
        with pytest.raises(NotReady, match="gpu-02 could not be looked at"):
            cluster.fleet(experiment("kv").engine)


def test_a_node_without_a_report_is_said_beside_the_lack_of_the_kind_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = cluster_of(monkeypatch, {"a": of(A100, "gpu-01"), "b": a_missing_package()}, {}, "H100")
    with pytest.raises(NotReady) as refused:
        cluster.fleet(experiment("kv").engine)
    assert [problem[:20] for problem in refused.value.problems] == ["gpu-02 could not be ", "cluster.gpu=H100: no"]


def warm_spec(model: str = "shape", eager: bool = True, gpus: int = 1, start: Start = Start.WARM) -> Any:
    server = SimpleNamespace(enforce_eager=eager)
    return SimpleNamespace(gpus=gpus, start=start, model=model, server=server)


async def never() -> None:
    await asyncio.sleep(3600)


async def not_made() -> None:
    words = "The actor died because of an error raised in its creation task, ray::WarmActor.__init__()\nOSError: no"
    raise ray.exceptions.RayActorError("id", words, actor_init_failed=True)


@pytest.mark.parametrize(
    ("socket", "why"), [(never, "none came within 0.5 s"), (not_made, "OSError: no")], ids=["never", "not_made"]
)
def test_a_warm_parent_that_does_not_come_is_waited_for_once_and_sessions_are_told_why(
    socket: Any, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[None] = []
    made: list[tuple[Any, ...]] = []

    def remote(_spec: Any) -> Any:
        asked.append(None)
        return socket()

    async def ping() -> None: ...

    actor = SimpleNamespace(ping=SimpleNamespace(remote=ping))
    options = SimpleNamespace(remote=lambda *arguments: made.append(arguments) or actor)
    monkeypatch.setattr(connection, "actor_class", lambda: SimpleNamespace(options=lambda **_: options))
    monkeypatch.setattr(nodes, "on", lambda _: None)
    monkeypatch.setattr(warm_parents, "ACTOR_LIMIT_S", 0.5)
    cluster = Cluster(experiment("kv").cluster, None)
    cluster._warm_parents._owners = {"node": SimpleNamespace(socket=SimpleNamespace(remote=remote))}
    warm = warm_spec()

    async def sessions() -> None:
        for _ in range(2):
            await cluster.session(warm, "node", "run", 1)

    asyncio.run(sessions())
    assert len(asked) == 1
    assert [arguments[-3:-1] for arguments in made] == [(None, f"this node has no warm parent: {why}")] * 2


def test_a_good_fork_of_one_kind_keeps_no_other_kind_warm() -> None:
    cluster = Cluster(experiment("kv").cluster, None)
    good = SessionRow(1, "run", "s", 1, MEASURED, False, "", start="warm")
    in_vain = replace(good, start="cold", start_reason=f"{CAME_TO_NOTHING}no word from it for 900 s")
    for row, like in [(good, warm_spec()), (in_vain, warm_spec(eager=False)), (in_vain, warm_spec(eager=False))]:
        cluster._warm_parents.saw("node", like, row)
    assert cluster._warm_parents.why_none("node", warm_spec()) is None
    assert "2 forks of this model" in (cluster._warm_parents.why_none("node", warm_spec(eager=False)) or "")


@pytest.mark.parametrize(("first", "asked"), [("cold", 2), ("warm", 3)])
def test_a_node_on_which_forks_come_to_nothing_starts_cold_at_once_and_says_why(
    first: str, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = iter([first, "cold", "cold"])
    made: list[tuple[Any, ...]] = []

    async def ping() -> None: ...

    async def socket() -> tuple[str, None]:
        return "/one", None

    async def start() -> SessionRow:
        how = next(starts)
        reason = f"{CAME_TO_NOTHING}no word from it for 30 s" if how == "cold" else None
        return SessionRow(1, "run", "s", 1, MEASURED, False, "", start=how, start_reason=reason)

    actor = SimpleNamespace(ping=SimpleNamespace(remote=ping), start=SimpleNamespace(remote=start))
    options = SimpleNamespace(remote=lambda *arguments: made.append(arguments) or actor)
    monkeypatch.setattr(connection, "actor_class", lambda: SimpleNamespace(options=lambda **_: options))
    monkeypatch.setattr(nodes, "on", lambda _: None)
    cluster = Cluster(experiment("kv").cluster, None)
    cluster._warm_parents._owners = {
        node: SimpleNamespace(socket=SimpleNamespace(remote=lambda _spec: socket())) for node in ("node", "other")
    }
    warm = warm_spec()

    async def sessions() -> None:
        for _ in range(3):
            handle = await cluster.session(warm, "node", "run", 1)
            await handle.start()
        others = ("other", warm), ("node", warm_spec("larger")), ("node", warm_spec(eager=False))
        for node, other in others:
            await cluster.session(other, node, "run", 1)

    asyncio.run(sessions())
    why = (
        "on this node 2 forks of this model in this mode (eager or not) have come to nothing where a cold server was "
        "ready, and none has been good"
    )
    cold, warm_one = (None, why), ("/one", None)
    # the other node, then other kinds
    assert [arguments[-3:-1] for arguments in made] == [warm_one] * asked + [cold] * (3 - asked) + [warm_one] * 3


@pytest.mark.parametrize("what", ["it was still importing, or busy", "nothing within 30 s"])
def test_a_parent_that_did_not_answer_one_session_is_asked_by_no_other(what: str) -> None:
    cluster = Cluster(experiment("kv").cluster, None)
    cluster._warm_parents._owners = {"node": None}
    mute = SessionRow(1, "run", "s", 1, MEASURED, False, "", start="cold", start_reason=f"{MUTE_PARENT}{what}")
    cluster._warm_parents.saw("node", warm_spec(), mute)
    why = f"the warm parent of this node did not answer an earlier session: {what}"
    assert asyncio.run(cluster._warm_parents.socket("node", warm_spec("another"))) == (None, why)
    assert cluster._warm_parents.why_none("other", warm_spec()) is None


@pytest.mark.parametrize(("users", "why"), [({}, "HF_HUB_OFFLINE"), ({"HF_HUB_OFFLINE": "1"}, None)])
def test_a_server_that_its_parent_would_refuse_for_its_environment_does_not_wait_for_the_import(
    users: dict[str, str], why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes are told not to look at the hub, real weights are not, unless the user says so."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name, value in users.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(warm, "WarmParent", lambda *_: SimpleNamespace(socket="/one", close=lambda: None))
    monkeypatch.setattr(actors, "Lease", lambda _: None)  # it would end this process
    shape = replace(spec(), engine="vllm")
    real = replace(shape, model=replace(shape.model, dummy_weights=False))
    owner = actors.WarmActor(shape, None)
    assert owner.socket(shape) == ("/one", None)
    refused = f"its environment is not the one that was imported in: {why}"
    assert owner.socket(real) == ((None, refused) if why else ("/one", None))


@pytest.mark.parametrize(
    ("lives", "status", "again"), [(False, None, True), (True, FAILED, True), (True, MEASURED, False)]
)
def test_a_session_is_the_first_of_its_node_until_one_has_had_a_server(
    lives: bool, status: str | None, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[Any, ...]] = []

    async def ping() -> None:
        if not lives and len(made) == 1:
            raise ray.exceptions.RayActorError

    async def start() -> Any:
        return SessionRow(1, "run", "s", 1, str(status), False, "", start="cold")

    async def stop() -> None: ...

    monkeypatch.setattr(ray, "kill", lambda _: None)  # it would start a Ray
    verbs = {verb.__name__: SimpleNamespace(remote=verb) for verb in (ping, start, stop)}
    options = SimpleNamespace(remote=lambda *arguments: made.append(arguments) or SimpleNamespace(**verbs))
    monkeypatch.setattr(connection, "actor_class", lambda: SimpleNamespace(options=lambda **_: options))
    monkeypatch.setattr(nodes, "on", lambda _: None)
    cluster = Cluster(experiment("kv").cluster, None)
    cold = warm_spec(start=Start.COLD)

    async def sessions() -> None:
        with contextlib.suppress(ActorLost):
            handle = await cluster.session(cold, "node", "run", 1)
            beside = await cluster.session(cold, "node", "run", 1)
            assert made[-1][-1] is False  # one at a time
            await handle.start()
            await beside.stop(1)
            await handle.stop(1)
        await cluster.session(cold, "node", "run", 2)

    asyncio.run(sessions())
    assert made[0][-1] is True
    assert made[-1][-1] is again


# --- one head, with a token and jobs ---


@pytest.fixture(scope="module")
def head() -> Iterator[RayHosts]:
    with ray_hosts(token=secrets.token_hex(32)) as hosts:
        hosts.start_head(gpus=2, dashboard=True)
        yield hosts


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RAY_AUTH_MODE": "disabled"}, "asks for a token: export RAY_AUTH_MODE=token"),
        ({"RAY_AUTH_TOKEN": ""}, "asks for a token and there is none here"),
        ({"RAY_AUTH_TOKEN": "0" * 64}, "refuses the token that is here"),
    ],
)
def test_a_token_that_is_missing_or_wrong_is_said_with_what_to_export(
    head: RayHosts, tmp_path: Path, environment: dict[str, str], words: str
) -> None:
    arguments = [*TWO_LEVELS, f"cluster.address={head.address}", f"output_root={tmp_path}"]
    process = head.orchestrate(*arguments, **environment)
    said = process.communicate(timeout=60)[0]
    assert (process.returncode, list(tmp_path.iterdir())) == (4, [])
    assert words in said
    assert "RAY_AUTH_TOKEN" in said
    assert head.token not in said  # type: ignore[operator]
    assert "gcs_client" not in said, "Ray was let to try by itself"


def test_nobody_at_an_address_is_said_at_once() -> None:
    said = str(knock.refusal("127.0.0.1:1"))
    assert "nobody listens at 127.0.0.1:1" in said
    assert "ray start --head" in said


@pytest.mark.parametrize(
    ("address", "variable", "heads", "named"),
    [
        ("head:6379", "other:6379", ["a:1", "b:2"], "head:6379"),
        ("auto", "other:6379", ["a:1", "b:2"], "other:6379"),
        ("auto", "", ["a:1"], "a:1"),
        ("auto", "auto", ["a:1"], "a:1"),
        ("auto", "", [], r"runs no node of a Ray cluster on this host.*: say cluster.address=HOST:PORT"),
        ("auto", "", ["a:1", "b:2"], r"belongs to several clusters \(a:1, b:2\) on this host.*: say cluster.address="),
    ],
)
def test_which_cluster_auto_joins(
    address: str, variable: str, heads: list[str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is Ray that is told, and told an address: Ray's own `auto` believes any user's process and a file in /tmp."""
    joined: list[str] = []

    def join(address: str, **_: Any) -> None:
        joined.append(address)

    monkeypatch.setenv("RAY_ADDRESS", variable)
    monkeypatch.setattr(knock, "heads_of", lambda _: heads)
    monkeypatch.setattr(knock, "refusal", lambda _: None)
    monkeypatch.setattr(ray, "init", join)
    cluster = Cluster(experiment("kv", cluster__address=address).cluster, None)
    if named.endswith(("=", "PORT")):
        with pytest.raises(ClusterError, match=named):
            cluster._connect()
        assert joined == []
    else:
        cluster._connect()
        assert joined == [named]


def test_auto_finds_the_head_of_a_node_that_this_user_has_started(head: RayHosts) -> None:
    (found,) = knock.heads_of(head.processes())
    assert found.endswith(f":{head.port}")  # Ray may say this host's other address
    assert "asks for a token" in str(knock.refusal(found))


def submitted(head: RayHosts, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "ray"), "job", "submit", "--address", f"http://127.0.0.1:{head.dashboard_port}"]
    command += ["--working-dir", ".", "--", "python", "-m", "orchestrator", *arguments, "cluster=auto"]
    deadline = time.monotonic() + 60
    while True:
        done = subprocess.run(command, cwd=ROOT, env=head.environment(), capture_output=True, text=True, timeout=180)
        if "No available agent" not in done.stderr or time.monotonic() > deadline:  # Ray's is not up yet: "try again"
            return done
        time.sleep(1)


def test_a_submitted_job_writes_where_it_is_told_and_its_exit_code_is_the_jobs(head: RayHosts, tmp_path: Path) -> None:
    left = left_by_a_killed_process(head.mark)
    done = submitted(head, *TWO_LEVELS, f"output_root={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_each_point_is_measured_once(tmp_path, 2)
    (directory,) = tmp_path.iterdir()
    assert json.loads((directory / "manifest.json").read_text())["status"] == "complete"
    assert f"a run that was killed had left {left} on " in done.stdout
    assert not left.exists()
    assert_no_server_is_left(head)


def test_a_submitted_job_without_an_absolute_output_root_is_refused(head: RayHosts) -> None:
    done = submitted(head, *TWO_LEVELS)
    assert done.returncode == 1
    assert "lies inside Ray's package cache, which Ray deletes: give an absolute output_root" in done.stdout
    assert "exit code 2" in done.stdout + done.stderr


# --- nodes and links that go away ---


def test_a_node_that_dies_in_the_middle_costs_no_point(tmp_path: Path) -> None:
    with ray_hosts() as hosts:
        hosts.start_head(gpus=1)
        worker = hosts.start_worker(0, gpus=1)
        arguments = ["+sweep=kv", *QUICK, SLOW_START, f"output_root={tmp_path}", f"cluster.address={hosts.address}"]
        process = hosts.orchestrate(*arguments)
        wait_for("ready", process)
        hosts.kill_raylet(worker)
        said = process.communicate(timeout=240)[0]
        assert process.returncode == 0, said
        assert_each_point_is_measured_once(tmp_path, 8)
        assert_no_server_is_left(hosts)
        assert list(hosts.mark.glob("vc-*")) == []


@pytest.fixture(scope="module")
def linked() -> Iterator[RayHosts]:
    try:
        with linked_hosts() as hosts:
            hosts.start_head(gpus=1)
            hosts.start_worker(1, gpus=1)
            yield hosts
    except OSError as error:
        not_shown(f"network namespaces cannot be made ({error})")


def interrupted_run(linked: RayHosts, outputs: Path, cut_s: float | None) -> str:
    """Run a sweep over both hosts and cut their link when both have servers; return what it said."""
    arguments = ["+sweep=kv", *QUICK, SLOW_START, f"output_root={outputs}", f"cluster.address={linked.address}"]
    process = linked.orchestrate(*arguments)
    wait_for("ready", process)
    set_link(linked, up=False)
    if cut_s is not None:
        time.sleep(cut_s)
        set_link(linked, up=True)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    return said


def test_a_link_that_is_down_for_seconds_costs_nothing(linked: RayHosts, tmp_path: Path) -> None:
    said = interrupted_run(linked, tmp_path, cut_s=5.0)
    assert "lost" not in said
    assert_each_point_is_measured_once(tmp_path, 8)
    assert_no_server_is_left(linked)


def test_a_host_that_is_cut_off_for_good_costs_no_point_and_ends_its_server(linked: RayHosts, tmp_path: Path) -> None:
    said = interrupted_run(linked, tmp_path, cut_s=None)
    assert re.search(r"\] again +", said)
    assert_each_point_is_measured_once(tmp_path, 8)
    assert_no_server_is_left(linked)
