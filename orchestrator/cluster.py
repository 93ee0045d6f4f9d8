"""Ray, and nothing else here knows it: connect, look at the nodes, run sessions as actors, let go.

Used by `orchestrator.driver`. A session's actor owns its server (`workers.session`); load runs as a Ray task on the
actor's own node.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import secrets
import socket
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from contract.rows import MEASURED, MUTE_PARENT, PointRow, SessionEnd, SessionRow
from contract.specs import ModelSpec, Point, SessionSpec, Start
from orchestrator import interrupts, knock
from orchestrator.fleet import (
    SIM_GPU_BYTES,
    DeviceKind,
    Fleet,
    Node,
    NoRoom,
    kind_of,
    of_one_kind,
    users_omp_num_threads,
)
from orchestrator.forks import Forks
from orchestrator.preflight import NotReady
from orchestrator.schema import ClusterConfig, EngineConfig
from workers import node_report
from workers.caretaker import Caretaker
from workers.lease import RENEWED_EVERY_S, Lease
from workers.load.failed import LoadFailed, LoadLost
from workers.node_report import NodeReport
from workers.temporary import PREFIX, Owned, end_what_is_left_in, remove_ownerless

OBJECT_STORE_BYTES = 256 * 2**20
PRIVATE_PREFIX = f"{PREFIX}ray-"
SOCKETS_BELOW = 70
"""Characters of /r/session_DATE_TIME_PID/sockets/NAME, Ray's sockets."""
ACTOR_LIMIT_S = 180.0
"""For a session's actor to come to life: its cards are ours by the queue, but another job may hold them."""
PROBE_LIMIT_S = 120.0
CANCEL_LIMIT_S = 10.0
WARM_CLOSE_LIMIT_S = 1.0
"""For owners to end their warm parents: those that heed nothing are killed after half of it (`workers.launch.warm`)."""
SWEEP_LIMIT_S = 10.0
"""For nodes to remove, when a run ends, what its actors have left where they were killed."""
DYING_S = 2.0
"""For an actor that is killed to be dead."""
NODES_LIMIT_S = 5.0
"""For the cluster to say which of its nodes live."""
OF_THE_NODE = "[Errno "
"""In the message of an actor that could not be made on a node, where it may be elsewhere: the system's errors (no space
left). Cards that are lost its server's start tells."""


class ActorLost(Exception):
    """The session's actor or its node is gone; another node may do."""


class NoCards(ActorLost):
    """The session's actor never came to life: cards that the queue takes for free are somebody else's."""


class ActorFailed(Exception):
    """The session's actor could not be made, for a reason that it would meet anywhere: a defect of ours."""


class ClusterError(Exception):
    """No cluster to be had, with what to do about it."""


class Cluster:
    """A connected Ray. Use as a context manager; a private one ends with it and leaves no file."""

    def __init__(self, config: ClusterConfig, local: Fleet | None) -> None:
        self._config = config
        self._local = local
        self._warm: dict[str, Any] = {}
        self._not_warm: dict[str, str] = {}
        """Nodes whose warm parent is not to be had, with why: it is not asked for again."""
        self._forks: defaultdict[str, Forks] = defaultdict(Forks)
        """By node."""
        self._served: set[str] = set()
        """Nodes that have had a server, or have a session that is to start their first."""
        self._keeps_warm: threading.Thread | None = None
        self._left = threading.Event()
        self._private: Owned | None = None
        self._caretaker: Caretaker | None = None
        self._nodes: list[str] = []
        """That a run has used of a cluster that others have started."""
        self.hurried = False
        """Whether the run was interrupted: what its killed servers have left is then for the next."""
        self._saved_environment: dict[str, str | None] = {}

    def __enter__(self) -> Self:
        try:
            if self._local is None:
                self._connect()
            else:
                with interrupts.deferred():
                    self._start_private()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._leave()

    def _start_private(self) -> None:
        assert self._local is not None
        for left in remove_ownerless():
            print(f"a run that was killed had left {left}: it is removed")
        try:
            self._private = Owned(PRIVATE_PREFIX, SOCKETS_BELOW)
        except OSError as error:
            raise ClusterError(f"no private directory for Ray: {error.strerror or error}") from None
        self._caretaker = Caretaker(self._private.path)
        # A key of its own: Ray would write one into the user's home.
        self._set_environment(
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN=secrets.token_hex(32),
            RAY_USAGE_STATS_ENABLED="0",
            RAY_ADDRESS=None,
            RAY_worker_niceness="0",
            RAY_memory_monitor_refresh_ms="0",  # it would kill workers where a CPU server fills the RAM
            RAY_raylet_start_wait_time_s="60",
            TMPDIR=str(self._private.path),  # what sessions leave when they are killed is removed with it
        )
        import ray

        node = self._local.nodes[0]
        _have_ray_read_its_environment()
        try:
            ray.init(
                address="local",
                num_cpus=max(4, node.cores),
                num_gpus=node.slots if self._local.device != "cpu" else 0,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=f"{self._private.path}/r",  # Ray opens it to every user: the one above stays ours alone
                _node_ip_address="127.0.0.1",
            )
        except Exception as error:  # Ray has no class of its own for this
            raise ClusterError(f"a private Ray did not start: {_in_a_line(error)}") from None

    def _connect(self) -> None:
        import ray

        try:
            address = knock.named(self._config.address)
        except knock.NotOneHead as error:
            raise ClusterError(str(error)) from None
        if refused := knock.refusal(address):
            raise ClusterError(refused)
        _have_ray_read_its_environment()
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
        except Exception as error:  # ConnectionError, RuntimeError, ValueError and Ray's own, all meaning this
            raise ClusterError(
                f"no Ray cluster at {address!r}: {_in_a_line(error)}. Is `ray start` running? "
                f"If it was started with a token, export RAY_AUTH_MODE=token; {knock.WHERE_TOKENS_ARE}"
            ) from None

    def remove_left(self, fleet: Fleet) -> None:
        """Have the fleet's nodes remove what killed runs have left there, before a run and, where servers of this one
        were killed, after it."""
        if self._local is None:
            self._nodes = [node.id for node in fleet.nodes]
            self._sweep("a run that was killed had left", SWEEP_LIMIT_S, 0.0)

    def _leave(self) -> None:
        import ray

        with interrupts.deferred():
            self._left.set()
            if self._keeps_warm is not None:
                self._keeps_warm.join(WARM_CLOSE_LIMIT_S)
            if self._warm:
                with contextlib.suppress(Exception):
                    ray.get([actor.close.remote() for actor in self._warm.values()], timeout=WARM_CLOSE_LIMIT_S)
            if self._nodes and not self.hurried:
                with contextlib.suppress(Exception):
                    self._sweep("what was killed had left", SWEEP_LIMIT_S, DYING_S)
            with contextlib.suppress(Exception):
                ray.shutdown()
            if self._private is not None:
                if self._warm:  # a parent that hangs in a library hears of nothing, and its owner may have been killed
                    with contextlib.suppress(OSError):
                        end_what_is_left_in(self._private.path, DYING_S)  # guards have that long for their servers
                self._private.remove()
            if self._caretaker is not None:
                self._caretaker.close()
                self._caretaker = None
            for name, value in self._saved_environment.items():
                _set(name, value)

    def _sweep(self, who: str, limit_s: float, patience_s: float) -> None:
        """Have every node remove what nobody owns any more, and say what."""
        import ray

        sweep: Any = ray.remote(num_cpus=0, max_retries=0)(_removed_there)
        asked = [sweep.options(scheduling_strategy=_on(node)).remote(patience_s) for node in self._nodes]
        done, _ = ray.wait(asked, num_returns=len(asked), timeout=limit_s)
        for each in done:
            with contextlib.suppress(Exception):  # a node that is gone, or without the package: said where it matters
                for left in ray.get(each):
                    print(f"{who} {left}: it is removed")

    def _set_environment(self, **changes: str | None) -> None:
        for name, value in changes.items():
            self._saved_environment[name] = os.environ.get(name)
            _set(name, value)

    def fleet(self, engine: EngineConfig) -> Fleet:
        """Return the nodes as Ray sees them.

        Raises `NoRoom` where there are no GPUs to run on, or GPUs of several kinds; `NotReady` where a node that may be
        of the run cannot be looked at.
        """
        import ray

        alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        if self._local is not None:
            return _renamed(self._local, alive[0]["NodeID"])
        on_gpu = [node for node in alive if node["Resources"].get("GPU")]
        if engine.name == "sim":
            return _some("sim", [_node(node, _gpus(node), "simulated GPU", SIM_GPU_BYTES) for node in on_gpu])
        if engine.device == "cpu" or (engine.device == "auto" and not on_gpu):
            cores = self._config.cores_per_session
            nodes = [_node(node, max(1, int(node["Resources"].get("CPU", 1)) // cores)) for node in alive]
            seen = self._reports([node.id for node in nodes], (), most_cards=0)
            nodes = [replace(node, environment=seen[node.id].environment) for node in nodes]
            return _some("cpu", nodes, next(iter(seen.values())).vllm_version)
        seen, problems = self._looks([node["NodeID"] for node in on_gpu], (), most_cards=None)
        nodes = [_node_of_cards(node, seen[node["NodeID"]]) for node in on_gpu if node["NodeID"] in seen]
        try:
            chosen = of_one_kind(nodes, self._config.gpu)
        except NoRoom as error:
            if problems:
                raise NotReady([*problems.values(), str(error)]) from None
            raise
        self._leave_out(problems, on_gpu, {node.id for node in chosen})
        return _some("cuda", chosen, seen[chosen[0].id].vllm_version if chosen else None)

    def reports(self, fleet: Fleet, models: tuple[ModelSpec, ...]) -> dict[str, NodeReport]:
        """Return what each node of the fleet says of itself, by id. Raises `NotReady` where one says nothing."""
        if fleet.device != "cuda":
            most_cards: int | None = 0
        else:
            most_cards = fleet.slots if self._local is not None else None  # a private Ray hands out the first so many
        return self._reports([node.id for node in fleet.nodes], models, most_cards)

    def _reports(
        self, nodes: list[str], models: tuple[ModelSpec, ...], most_cards: int | None
    ) -> dict[str, NodeReport]:
        seen, problems = self._looks(nodes, models, most_cards)
        if problems:
            raise NotReady(list(problems.values()))
        return seen

    def _looks(
        self, nodes: list[str], models: tuple[ModelSpec, ...], most_cards: int | None
    ) -> tuple[dict[str, NodeReport], dict[str, str]]:
        """Return the reports of the nodes, and of those that have none why, each by id."""
        if self._local is not None:
            return dict.fromkeys(nodes, node_report.look((), most_cards)), {}  # its models were read for the plan
        import ray

        look: Any = ray.remote(num_cpus=0, max_retries=1)(node_report.look)
        looks = {
            look.options(scheduling_strategy=_on(node)).remote(models, most_cards, users_omp_num_threads()): node
            for node in nodes
        }
        done, silent = ray.wait(list(looks), num_returns=len(looks), timeout=PROBE_LIMIT_S)
        seen: dict[str, NodeReport] = {}
        why = {looks[each]: f"it says nothing within {PROBE_LIMIT_S:.0f} s" for each in silent}
        for each in done:
            try:
                seen[looks[each]] = ray.get(each)
            except Exception as error:  # whatever a node's task raises: the package missing there, a card that is not
                why[looks[each]] = _in_a_line(error) + _way_out(error)
        hosts = {node["NodeID"]: node.get("NodeManagerHostname") for node in ray.nodes()}  # type: ignore[no-untyped-call]
        return seen, {
            node: f"{hosts.get(node) or node} could not be looked at: {why[node]}" for node in nodes if node in why
        }

    def _leave_out(self, problems: dict[str, str], on_gpu: list[dict[str, Any]], chosen: set[str]) -> None:
        """Say which nodes that could not be looked at are left out: where `cluster.gpu` has chosen others, those whose
        first card is, by Ray's word, of another type. Raises `NotReady` where one may be of the run.
        """
        types = {node["NodeID"]: _accelerator(node) for node in on_gpu}
        wanted = {types[node] for node in chosen}
        tells = self._config.gpu is not None and None not in wanted
        of_another = {node for node in problems if tells and types[node] not in {*wanted, None}}
        if in_the_way := [problem for node, problem in problems.items() if node not in of_another]:
            raise NotReady(in_the_way)
        for node, problem in problems.items():
            print(f"WARNING  {problem}. It is left out: to Ray its cards are {types[node]}, not cluster.gpu's")

    def held_by_others(self, fleet: Fleet) -> dict[str, int]:
        """Return how many GPUs of each node of the fleet other jobs hold now, by id; not of those where none are."""
        import ray
        from ray._private.state import available_resources_per_node

        if self._local is not None:
            return {}
        free = available_resources_per_node()  # type: ignore[no-untyped-call]
        ours = {node.id for node in fleet.nodes}
        nodes = [node for node in ray.nodes() if node["NodeID"] in ours]  # type: ignore[no-untyped-call]
        held = {
            node["NodeID"]: math.ceil(node["Resources"].get("GPU", 0) - free.get(node["NodeID"], {}).get("GPU", 0))
            for node in nodes
        }
        return {node: gpus for node, gpus in held.items() if gpus > 0}

    def warm_up(self, fleet: Fleet, first: Mapping[str, SessionSpec]) -> None:
        """Have nodes import what servers like their `first` one are forked from; who needs it waits for it.

        Others of the fleet do so when a session is first placed there: an import reads thousands of files, often from a
        disk that all nodes share, and takes cores that other jobs may use.

        Not a node whose cards are of several kinds: vLLM asks, as it is imported, what the first one can do
        (`get_device_capability`, which is cached) and chooses data types and kernels by it. Which cards a server will
        have, the parent cannot know.
        """
        for node in fleet.nodes:
            if node.mixes_kinds:
                self._not_warm[node.id] = f"this node has no warm parent: {_of_several_kinds(node.all_kinds)}"
        for name, spec in first.items():
            if name not in self._not_warm:
                self._import_on(name, spec)
        self._keeps_warm = threading.Thread(target=self._keep_warm, name="keeps warm", daemon=True)
        self._keeps_warm.start()

    def _import_on(self, node: str, spec: SessionSpec) -> None:
        import ray

        actor = ray.remote(num_cpus=0, max_restarts=0)(WarmActor)
        self._warm[node] = actor.options(scheduling_strategy=_on(node)).remote(spec, users_omp_num_threads())

    def _keep_warm(self) -> None:
        """Renew their leases from their making on: a node's first session may come later than a lease lasts."""
        while not self._left.wait(RENEWED_EVERY_S):
            for actor in list(self._warm.values()):  # the driver's thread adds to them
                with contextlib.suppress(Exception):  # who wants a server of it finds out
                    actor.ping.remote()

    async def has_lost(self, node: str) -> bool:
        """Return whether the cluster has given a node up. One that was cut off a moment ago it has not yet."""
        import ray

        try:
            nodes = await asyncio.wait_for(asyncio.to_thread(ray.nodes), NODES_LIMIT_S)
        except Exception:  # TimeoutError and Ray's own: who does not answer does not say
            return False
        return not any(each["NodeID"] == node and each["Alive"] for each in nodes)

    async def session(
        self, spec: SessionSpec, node: str, run_id: str, attempt: int, again: bool = False
    ) -> SessionHandle:
        """Make the actor of a session on `node`; Ray chooses the cards. `again`: another start came to nothing.

        Raises `ActorLost`, of it `NoCards`, and `ActorFailed`.
        """
        actor = _actor_class().options(num_gpus=spec.gpus, num_cpus=0, max_concurrency=4, scheduling_strategy=_on(node))
        forks = spec.start is Start.WARM and not again  # another start is never forked (`workers.session`)
        warm_parent, why = await self._warm_parent(node, spec) if forks else (None, None)
        omp = users_omp_num_threads()
        first = node not in self._served
        self._served.add(node)
        handle = SessionHandle(
            actor.remote(spec, run_id, attempt, again, omp, warm_parent, why, first),
            partial(self._served.discard, node) if first else lambda: None,
            partial(self._saw, node, spec),
        )
        await handle.alive()
        return handle

    def _saw(self, node: str, spec: SessionSpec, row: SessionRow) -> None:
        """Learn from what a start has come to: who asks a parent that hangs waits, for nothing."""
        self._forks[node].see(spec, row)
        if row.warm_parent_is_mute:
            what = (row.start_reason or "").removeprefix(MUTE_PARENT)
            self._not_warm[node] = f"the warm parent of this node did not answer an earlier session: {what}"

    def _why_not_warm(self, node: str, spec: SessionSpec) -> str | None:
        return self._not_warm.get(node) or self._forks[node].problem(spec)

    async def _warm_parent(self, node: str, spec: SessionSpec) -> tuple[str | None, str | None]:
        """Return the socket of the node's, or why it has none for `spec`. One that did not come is not waited for
        again."""
        why = self._why_not_warm(node, spec)
        if why:
            return None, why
        if node not in self._warm:
            if self._keeps_warm is None:
                return None, None  # nothing of this run can be forked
            self._import_on(node, spec)
        try:
            told: tuple[str | None, str | None] = await asyncio.wait_for(
                _result(self._warm[node].socket.remote(spec)), ACTOR_LIMIT_S
            )
        except TimeoutError:
            self._not_warm[node] = f"this node has no warm parent: none came within {ACTOR_LIMIT_S:g} s"
        except (ActorLost, ActorFailed) as error:
            self._not_warm[node] = f"this node has no warm parent: {error}"
        else:
            return told
        return None, self._not_warm[node]


class SessionHandle:
    """The driver's hold on one session actor. Every verb raises `ActorLost` when the actor is gone."""

    def __init__(self, actor: Any, came_to_nothing: Callable[[], None], started: Callable[[SessionRow], None]) -> None:
        """`came_to_nothing` is called where the session ends and has had no server that was ready, `started` with what
        its start has come to."""
        self._actor = actor
        self._came_to_nothing = came_to_nothing
        self._started = started
        self._served = False
        self._renewing: asyncio.Future[None] | None = None

    async def alive(self) -> None:
        """Wait until the actor answers. Raises `NoCards` where its cards do not become free."""
        try:
            await asyncio.wait_for(_result(self._actor.ping.remote()), ACTOR_LIMIT_S)
        except TimeoutError:
            self.kill()
            raise NoCards(f"no actor after {ACTOR_LIMIT_S:.0f} s: does another job hold the node's GPUs?") from None
        except BaseException:
            self.kill()
            raise
        self._renewing = asyncio.ensure_future(_renew(self._actor))

    async def start(self) -> SessionRow:
        """Start the server."""
        row: SessionRow = await _result(self._actor.start.remote())
        self._served = row.status == MEASURED
        self._started(row)
        return row

    async def measure(self, point: Point) -> PointRow:
        """Measure one point."""
        row: PointRow = await _result(self._actor.measure.remote(point))
        return row

    async def settle(self) -> None:
        """Close the account of the server's memory; only `stop` may follow."""
        await _result(self._actor.settle.remote())

    def hurry(self) -> None:
        """Have the server down in two seconds: `stop` is under way, or comes."""
        with contextlib.suppress(Exception):
            self._actor.hurry.remote()

    async def stop(self, limit_s: float, keep_cards: bool = False) -> SessionEnd:
        """Stop the server and end the actor, whatever else it is doing; with `keep_cards` `kill` has to end it.

        Until then Ray gives its cards to nobody.
        """
        try:
            end: SessionEnd = await asyncio.wait_for(_result(self._actor.stop.remote()), limit_s)
        except TimeoutError:
            self.kill()
            raise ActorLost(f"the session did not stop within {limit_s:.0f} s") from None
        except BaseException:
            self.kill()
            raise
        if keep_cards:
            self._ended()
        else:
            self.kill()
        return end

    def kill(self) -> None:
        """End the actor at once; the guard ends what it started."""
        import ray

        self._ended()
        if self._renewing is not None:
            self._renewing.cancel()
        with contextlib.suppress(Exception):
            ray.kill(self._actor)

    def _ended(self) -> None:
        if not self._served:
            self._served = True
            self._came_to_nothing()


async def _renew(actor: Any) -> None:
    """Renew an actor's lease until cancelled."""
    while True:
        with contextlib.suppress(ActorLost):  # for its caller to find out
            await _result(actor.ping.remote())
        await asyncio.sleep(RENEWED_EVERY_S)


async def _result(reference: Any) -> Any:
    import ray

    try:
        return await reference
    except ray.exceptions.RayTaskError:
        raise  # a defect of ours: not to be tried again
    except ray.exceptions.RayError as error:
        why = _in_a_line(error)
        if not _in_its_making(error):
            raise ActorLost(f"{type(error).__name__}: {why}") from None
        if OF_THE_NODE in why:
            raise ActorLost(f"it could not be made: {why}") from None
        raise ActorFailed(why) from None


def _of_several_kinds(kinds: tuple[str, ...]) -> str:
    return f"its cards are of several kinds ({', '.join(kinds)}), and an import would know the first one only"


def _actor_class() -> Any:
    import ray

    return ray.remote(max_restarts=0, max_task_retries=0)(SessionActor)


class WarmActor:
    """Owns a node's warm parent, which ends with it. A Ray worker starts it, as one starts cold servers: what a process
    inherits is the same."""

    def __init__(self, spec: SessionSpec, omp_num_threads: str | None) -> None:
        from workers import processes
        from workers.engines import make_engine
        from workers.launch.warm import parent_environment, parent_for

        processes.niceness_reset()
        engine = make_engine(spec.engine)
        self._environment = partial(parent_environment, engine, omp_num_threads=omp_num_threads)
        self._imported_in = self._environment(spec)
        self._parent = parent_for(engine, spec, omp_num_threads)
        self._lease = Lease(self._parent.close)

    def ping(self) -> None:
        """Live on."""
        self._lease.renew()

    def socket(self, spec: SessionSpec) -> tuple[str | None, str | None]:
        """Return where it is asked, which may still be importing; or why it would refuse a server for `spec` then."""
        from workers.launch.warm import environment_problem

        problem = environment_problem(self._environment(spec), self._imported_in)
        return (None, problem) if problem else (str(self._parent.socket), None)

    def close(self) -> None:
        """End the warm parent, and remove what it leaves where it was killed."""
        self._parent.close()


class SessionActor:
    """`workers.session.Session` as a Ray actor. Starting the server is a verb of its own, never part of making it."""

    def __init__(
        self,
        spec: SessionSpec,
        run_id: str,
        attempt: int,
        again: bool,
        omp_num_threads: str | None,
        warm_parent: str | None,
        no_warm_parent: str | None,
        first: bool,
    ) -> None:
        import ray

        from workers.session import Session

        remove_ownerless()  # another start's of this session, say: its server is gone from the cards before ours comes
        context = ray.get_runtime_context()
        devices = [str(name).strip() for name in context.get_accelerator_ids().get("GPU", [])]
        load = ray.remote(num_cpus=0, max_retries=0)(_generate).options(scheduling_strategy=_on(context.get_node_id()))
        self._session = Session(
            spec,
            run_id,
            attempt,
            devices,
            lambda plans: _together(load, plans),
            omp_num_threads,
            Path(warm_parent) if warm_parent else None,
            again,
            no_warm_parent,
            first,
        )
        self._lease = Lease(self._session.stop)

    def ping(self) -> None:
        """Answer, and live on."""
        self._lease.renew()

    def start(self) -> SessionRow:
        """See `Session.start`."""
        return self._session.start()

    def measure(self, point: Point) -> PointRow:
        """See `Session.measure`."""
        return self._session.measure(point)

    def settle(self) -> None:
        """See `Session.settle`."""
        self._session.settle()

    def hurry(self) -> None:
        """See `Session.hurry`."""
        self._session.hurry()

    def stop(self) -> SessionEnd:
        """See `Session.stop`."""
        return self._session.stop()


def _removed_there(patience_s: float) -> list[str]:
    return [f"{path} on {socket.gethostname()}" for path in remove_ownerless(patience_s=patience_s)]


def _together(load: Any, plans: list[Any]) -> list[Any]:
    """Run load tasks at once; where one fails none is left that still sends.

    Raises:
        LoadFailed: as `workers.load.client.generate` does, or a task's process has ended.
    """
    import ray

    running = [load.remote(plan) for plan in plans]
    try:
        results: list[Any] = ray.get(running)
    except BaseException as error:
        for task in running:
            ray.cancel(task, force=True)
        ray.wait(running, num_returns=len(running), timeout=CANCEL_LIMIT_S)
        if isinstance(error, ray.exceptions.RayTaskError):
            if isinstance(error.cause, LoadFailed):
                raise error.cause from None  # as it was raised, without Ray's traceback around it
        elif isinstance(error, ray.exceptions.RayError):
            raise LoadLost(f"a load process ended early: {type(error).__name__}: {_in_a_line(error)}") from None
        raise
    return results


def _generate(plan: Any) -> Any:
    from workers import processes
    from workers.load.client import generate

    processes.niceness_reset()
    return generate(plan)


def _have_ray_read_its_environment() -> None:
    """Have Ray read whether there is a token, and which: it keeps what stood there when it was imported, and the first
    token that this process had, and a head with another one refuses it until Ray says that the head did not start."""
    with contextlib.suppress(ImportError, AttributeError):  # Ray's own; earlier versions have no tokens
        from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()


def _in_a_line(error: Exception) -> str:
    """The first line of a message, or the last of one that is a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if "RayTaskError" in type(error).__name__ or _in_its_making(error) else lines[0]


def _in_its_making(error: Exception) -> bool:
    return bool(getattr(error, "actor_init_failed", False))


def _way_out(error: Exception) -> str:
    """What to do about a node that could not be looked at, where its error tells."""
    if "No module named" in str(error):
        return " (is this package installed there?)"
    return " (CUDA_VISIBLE_DEVICES is set before `ray start`)" if "NoSuchCard" in str(error) else ""


def _on(node_id: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def _node(node: dict[str, Any], slots: int, name: str | None = None, memory: int | None = None) -> Node:
    resources = node["Resources"]
    ram, cores = int(resources.get("memory", 0)), int(resources.get("CPU", 1))
    return Node(node["NodeID"], slots, memory, name, ram, cores, host=node.get("NodeManagerHostname", ""))


def _node_of_cards(node: dict[str, Any], seen: NodeReport) -> Node:
    made = _node(node, _gpus(node), kind_of(seen.gpu_names), seen.gpu_memory_bytes)
    return replace(
        made,
        driver_version=seen.driver_version,
        slices=seen.slices,
        environment=seen.environment,
        all_kinds=seen.all_kinds,
    )


def _accelerator(node: dict[str, Any]) -> str | None:
    """The type that Ray has read from the name of a node's first card; None where it has none."""
    prefix = "accelerator_type:"
    return next((name.removeprefix(prefix) for name in node["Resources"] if name.startswith(prefix)), None)


def _gpus(node: dict[str, Any]) -> int:
    return int(node["Resources"]["GPU"])


def _some(device: DeviceKind, nodes: Sequence[Node], vllm_version: str | None = None) -> Fleet:
    if not nodes:
        raise NoRoom("the cluster has no GPUs")
    return Fleet(device, tuple(nodes), vllm_version)


def _renamed(fleet: Fleet, node_id: str) -> Fleet:
    return replace(fleet, nodes=(replace(fleet.nodes[0], id=node_id),))


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
