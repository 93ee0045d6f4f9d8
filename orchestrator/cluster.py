"""Ray, and nothing else here knows it: connect, look at the nodes, run sessions as actors, let go.

Used by `orchestrator.driver`. A session's actor owns its server (`workers.session`); load runs as a Ray task on the
actor's own node.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from contract.rows import PointRow, SessionEnd, SessionRow
from contract.specs import Point, SessionSpec, Start
from orchestrator import interrupts
from orchestrator.fleet import SIM_GPU_BYTES, Fleet, Node, NoRoom
from orchestrator.schema import ClusterConfig, EngineConfig
from workers.load.tasks import LoadLost
from workers.temporary import private_directory

OBJECT_STORE_BYTES = 256 * 2**20
SOCKETS_BELOW = 68
"""Characters of /session_DATE_TIME_PID/sockets/NAME, Ray's sockets."""
ACTOR_LIMIT_S = 180.0
"""For a session's actor to come to life: its cards are ours by the queue, but another job may hold them."""
CONNECT_LIMIT_S = 5.0
PROBE_LIMIT_S = 120.0
CANCEL_LIMIT_S = 10.0


NODES_LIMIT_S = 5.0
"""For the cluster to say which of its nodes live."""


class ActorLost(Exception):
    """The session's actor or its node is gone; another node may do."""


class ClusterError(Exception):
    """No cluster to be had, with what to do about it."""


class Cluster:
    """A connected Ray. Use as a context manager; a private one ends with it and leaves no file."""

    def __init__(self, config: ClusterConfig, local: Fleet | None) -> None:
        self._config = config
        self._local = local
        self._warm: dict[str, Any] = {}
        self._private_dir: str | None = None
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
        self._private_dir = str(private_directory("vc-ray-", SOCKETS_BELOW))
        # A key of its own: Ray would write one into the user's home.
        self._set_environment(
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN=secrets.token_hex(32),
            RAY_USAGE_STATS_ENABLED="0",
            RAY_ADDRESS=None,
            RAY_worker_niceness="0",
            RAY_memory_monitor_refresh_ms="0",  # it would kill workers where a CPU server fills the RAM
            RAY_raylet_start_wait_time_s="60",
            TMPDIR=self._private_dir,  # what sessions leave when they are killed is removed with it
        )
        import ray

        node = self._local.nodes[0]
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
                _temp_dir=self._private_dir,
                _node_ip_address="127.0.0.1",
            )
        except Exception as error:  # Ray has no class of its own for this
            raise ClusterError(f"a private Ray did not start: {_first_line(error)}") from None

    def _connect(self) -> None:
        import ray

        self._knock()
        try:
            ray.init(
                address=self._config.address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False
            )
        except Exception as error:  # ConnectionError, RuntimeError, ValueError and Ray's own, all meaning this
            raise ClusterError(
                f"no Ray cluster at {self._config.address!r}: {_first_line(error)}. Is `ray start` running? "
                "If it was started with a token, export RAY_AUTH_MODE=token"
            ) from None

    def _knock(self) -> None:
        """Ray tries a wrong address for minutes; a closed port says so at once."""
        host, colon, port = self._config.address.rpartition(":")
        if colon and port.isdigit():
            try:
                socket.create_connection((host.rpartition("/")[2].strip("[]"), int(port)), CONNECT_LIMIT_S).close()
            except OSError as error:
                raise ClusterError(f"nobody listens at cluster.address={self._config.address} ({error})") from None

    def _leave(self) -> None:
        import ray

        with interrupts.deferred():
            with contextlib.suppress(Exception):
                ray.shutdown()
            if self._private_dir:
                shutil.rmtree(self._private_dir, ignore_errors=True)
            for name, value in self._saved_environment.items():
                _set(name, value)

    def _set_environment(self, **changes: str | None) -> None:
        for name, value in changes.items():
            self._saved_environment[name] = os.environ.get(name)
            _set(name, value)

    def fleet(self, engine: EngineConfig) -> Fleet:
        """Return the nodes as Ray sees them. Raises `NoRoom` where there are no GPUs to run on."""
        import ray

        alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        if self._local is not None:
            return _renamed(self._local, alive[0]["NodeID"])
        on_gpu = [node for node in alive if node["Resources"].get("GPU")]
        if engine.name == "sim":
            nodes = [_node(node, int(node["Resources"]["GPU"]), "simulated GPU", SIM_GPU_BYTES) for node in on_gpu]
        elif engine.device == "cpu" or (engine.device == "auto" and not on_gpu):
            cores = self._config.cores_per_session
            nodes = [_node(node, max(1, int(node["Resources"].get("CPU", 1)) // cores)) for node in alive]
            return Fleet("cpu", tuple(nodes), _looked_at(alive)[0].vllm_version)
        else:
            nodes = [
                _node(node, int(node["Resources"]["GPU"]), seen.gpu_name, seen.gpu_memory_bytes, seen.driver_version)
                for node, seen in zip(on_gpu, _looked_at(on_gpu), strict=True)
            ]
        if not nodes:
            raise NoRoom("the cluster has no GPUs")
        if engine.name == "sim":
            return Fleet("sim", tuple(nodes))
        return Fleet("cuda", tuple(nodes), _looked_at(on_gpu[:1])[0].vllm_version)

    def warm_up(self, fleet: Fleet, spec: SessionSpec) -> None:
        """Have every node import what servers like `spec` are forked from; who needs it waits for it."""
        import ray

        actor = ray.remote(num_cpus=0, max_restarts=0)(WarmActor)
        for node in fleet.nodes:
            self._warm[node.id] = actor.options(scheduling_strategy=_on(node.id)).remote(spec, _users_omp_num_threads())

    async def has_lost(self, node: str) -> bool:
        """Return whether the cluster has given a node up. One that was cut off a moment ago it has not yet."""
        import ray

        try:
            nodes = await asyncio.wait_for(asyncio.to_thread(ray.nodes), NODES_LIMIT_S)
        except Exception:  # TimeoutError and Ray's own: who does not answer does not say
            return False
        return not any(each["NodeID"] == node and each["Alive"] for each in nodes)

    async def session(self, spec: SessionSpec, node: str, run_id: str, attempt: int) -> SessionHandle:
        """Make the actor of a session on `node`; Ray chooses the cards. Raises `ActorLost`."""
        actor = _actor_class().options(num_gpus=spec.gpus, num_cpus=0, max_concurrency=4, scheduling_strategy=_on(node))
        warm_parent: str | None = None
        if spec.start is Start.WARM and node in self._warm:
            with contextlib.suppress(ActorLost, TimeoutError):
                warm_parent = await asyncio.wait_for(_result(self._warm[node].socket.remote()), ACTOR_LIMIT_S)
        handle = SessionHandle(actor.remote(spec, run_id, attempt, _users_omp_num_threads(), warm_parent))
        await handle.alive()
        return handle


class SessionHandle:
    """The driver's hold on one session actor. Every verb raises `ActorLost` when the actor is gone."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def alive(self) -> None:
        """Wait until the actor answers. Raises `ActorLost` where its cards do not become free."""
        try:
            await asyncio.wait_for(_result(self._actor.ping.remote()), ACTOR_LIMIT_S)
        except TimeoutError:
            self.kill()
            raise ActorLost(f"no actor after {ACTOR_LIMIT_S:.0f} s: does another job hold the node's GPUs?") from None
        except BaseException:
            self.kill()
            raise

    async def start(self) -> SessionRow:
        """Start the server."""
        row: SessionRow = await _result(self._actor.start.remote())
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

    async def stop(self, limit_s: float) -> SessionEnd:
        """Stop the server and end the actor, whatever else it is doing."""
        try:
            end: SessionEnd = await asyncio.wait_for(_result(self._actor.stop.remote()), limit_s)
        except TimeoutError:
            raise ActorLost(f"the session did not stop within {limit_s:.0f} s") from None
        finally:
            self.kill()
        return end

    def kill(self) -> None:
        """End the actor at once; the guard ends what it started."""
        import ray

        with contextlib.suppress(Exception):
            ray.kill(self._actor)


def _users_omp_num_threads() -> str | None:
    in_a_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # there Ray, not the user, has set it
    return None if in_a_job else os.environ.get("OMP_NUM_THREADS")


async def _result(reference: Any) -> Any:
    import ray

    try:
        return await reference
    except ray.exceptions.RayTaskError:
        raise  # a defect of ours: not to be tried again
    except ray.exceptions.RayError as error:
        raise ActorLost(f"{type(error).__name__}: {str(error).splitlines()[0]}") from None


def _actor_class() -> Any:
    import ray

    return ray.remote(max_restarts=0, max_task_retries=0)(SessionActor)


class WarmActor:
    """Owns a node's warm parent, which ends with it. A Ray worker starts it, as one starts cold servers: what a process
    inherits is the same."""

    def __init__(self, spec: SessionSpec, omp_num_threads: str | None) -> None:
        from workers import processes
        from workers.engines import make_engine
        from workers.launch.warm import parent_for

        processes.niceness_reset()
        self._parent = parent_for(make_engine(spec.engine), spec, omp_num_threads)

    def socket(self) -> str:
        """Return where it is asked; it may still be importing."""
        return str(self._parent.socket)


class SessionActor:
    """`workers.session.Session` as a Ray actor. Starting the server is a verb of its own, never part of making it."""

    def __init__(
        self, spec: SessionSpec, run_id: str, attempt: int, omp_num_threads: str | None, warm_parent: str | None
    ) -> None:
        import ray

        from workers.session import Session

        context = ray.get_runtime_context()
        devices = [str(name) for name in context.get_accelerator_ids().get("GPU", [])]
        load = ray.remote(num_cpus=0, max_retries=0)(_generate).options(scheduling_strategy=_on(context.get_node_id()))
        self._session = Session(
            spec,
            run_id,
            attempt,
            devices,
            lambda plans: _together(load, plans),
            omp_num_threads,
            Path(warm_parent) if warm_parent else None,
        )

    def ping(self) -> None:
        """Answer."""

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


def _together(load: Any, plans: list[Any]) -> list[Any]:
    """Run load tasks at once; where one fails none is left that still sends."""
    import ray

    running = [load.remote(plan) for plan in plans]
    try:
        results: list[Any] = ray.get(running)
    except BaseException as error:
        for task in running:
            ray.cancel(task, force=True)
        ray.wait(running, num_returns=len(running), timeout=CANCEL_LIMIT_S)
        if isinstance(error, ray.exceptions.RayError) and not isinstance(error, ray.exceptions.RayTaskError):
            raise LoadLost(f"{type(error).__name__}: {_first_line(error)}") from None
        raise
    return results


def _generate(plan: Any) -> Any:
    from workers import processes
    from workers.load.client import generate

    processes.niceness_reset()
    return generate(plan)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a node says of itself."""

    gpu_name: str | None
    gpu_memory_bytes: int | None
    vllm_version: str | None
    driver_version: str | None


def _look() -> _Seen:
    from workers.devices.nvml import driver_version, visible_cards
    from workers.engines.vllm import installed_version

    cards = visible_cards()
    memory = min((card.memory_bytes for card in cards), default=None)
    return _Seen(cards[0].name if cards else None, memory, installed_version(), driver_version())


def _looked_at(nodes: list[dict[str, Any]]) -> list[_Seen]:
    import ray

    look = ray.remote(num_cpus=0, max_retries=1)(_look)
    looks = [look.options(scheduling_strategy=_on(node["NodeID"])).remote() for node in nodes]
    try:
        seen: list[_Seen] = ray.get(looks, timeout=PROBE_LIMIT_S)
    except Exception as error:  # whatever a node's task raises: the package missing there, a card that is not
        raise ClusterError(
            f"a node could not be looked at: {_first_line(error)}. Is the package on all nodes?"
        ) from None
    return seen


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if "RayTaskError" in type(error).__name__ and lines else (lines or [type(error).__name__])[0]


def _on(node_id: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def _node(
    node: dict[str, Any], slots: int, name: str | None = None, memory: int | None = None, driver: str | None = None
) -> Node:
    resources = node["Resources"]
    ram, cores = int(resources.get("memory", 0)), int(resources.get("CPU", 1))
    return Node(node["NodeID"], slots, memory, name, ram, cores, driver)


def _renamed(fleet: Fleet, node_id: str) -> Fleet:
    return replace(fleet, nodes=(replace(fleet.nodes[0], id=node_id),))


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
