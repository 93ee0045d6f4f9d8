"""A connected Ray: a private one, or a cluster that others have started; its nodes, and sessions as actors on them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import Mapping
from functools import partial
from types import TracebackType
from typing import Any, Self

from contract.specs import ModelSpec, SessionSpec, Start
from orchestrator import interrupts, knock
from orchestrator.cluster import nodes
from orchestrator.cluster.actors import actor_class, removed_there
from orchestrator.cluster.errors import ClusterError, in_a_line
from orchestrator.cluster.handle import SessionHandle
from orchestrator.cluster.warm_parents import WarmParents
from orchestrator.fleet import Fleet, users_omp_num_threads
from orchestrator.schema import ClusterConfig, EngineConfig
from workers import node_report
from workers.caretaker import Caretaker
from workers.node_report import NodeReport
from workers.temporary import PREFIX, Owned, end_what_is_left_in, remove_ownerless

OBJECT_STORE_BYTES = 256 * 2**20
PRIVATE_PREFIX = f"{PREFIX}ray-"
SOCKETS_BELOW = 70
"""Characters of /r/session_DATE_TIME_PID/sockets/NAME, Ray's sockets."""
SWEEP_LIMIT_S = 10.0
"""For nodes to remove, when a run ends, what its actors have left where they were killed."""
DYING_S = 2.0
"""For an actor that is killed to be dead."""
NODES_LIMIT_S = 5.0
"""For the cluster to say which of its nodes live."""


class Cluster:
    """A connected Ray. Use as a context manager; a private one ends with it and leaves no file."""

    def __init__(self, config: ClusterConfig, local: Fleet | None) -> None:
        self._config = config
        self._local = local
        self._warm_parents = WarmParents()
        self._served: set[str] = set()
        """Nodes that have had a server, or have a session that is to start their first."""
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
            raise ClusterError(f"a private Ray did not start: {in_a_line(error)}") from None

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
                f"no Ray cluster at {address!r}: {in_a_line(error)}. Is `ray start` running? "
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
            had_parents = self._warm_parents.close()
            if self._nodes and not self.hurried:
                with contextlib.suppress(Exception):
                    self._sweep("what was killed had left", SWEEP_LIMIT_S, DYING_S)
            with contextlib.suppress(Exception):
                ray.shutdown()
            if self._private is not None:
                if had_parents:  # one that hangs in a library hears of nothing, and its owner may have been killed
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

        sweep: Any = ray.remote(num_cpus=0, max_retries=0)(removed_there)
        asked = [sweep.options(scheduling_strategy=nodes.on(node)).remote(patience_s) for node in self._nodes]
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
        """Return the nodes as Ray sees them. Raises `NoRoom` and `NotReady` as `nodes.fleet` does."""
        if self._local is None:
            return nodes.fleet(self._config, engine)
        import ray

        name = next(node["NodeID"] for node in ray.nodes() if node["Alive"])  # type: ignore[no-untyped-call]
        return nodes.renamed(self._local, name)

    def reports(self, fleet: Fleet, models: tuple[ModelSpec, ...]) -> dict[str, NodeReport]:
        """Return what each node of the fleet says of itself, by id. Raises `NotReady` where one says nothing."""
        names = [node.id for node in fleet.nodes]
        if self._local is None:
            return nodes.reports(names, models, None if fleet.device == "cuda" else 0)
        cards = fleet.slots if fleet.device == "cuda" else 0  # a private Ray hands out the first so many
        return dict.fromkeys(names, node_report.look((), cards))  # its models were read for the plan

    def held_by_others(self, fleet: Fleet) -> dict[str, int]:
        """Return how many GPUs of each node of the fleet other jobs hold now, by id; not of those where none are."""
        return nodes.held_by_others(fleet) if self._local is None else {}

    def warm_up(self, fleet: Fleet, first: Mapping[str, SessionSpec]) -> None:
        """Have nodes import what servers like their `first` one are forked from; who needs it waits for it."""
        self._warm_parents.begin(fleet, first)

    async def has_lost(self, node: str) -> bool:
        """Return whether the cluster has given a node up. One that was cut off a moment ago it has not yet."""
        import ray

        try:
            async with asyncio.timeout(NODES_LIMIT_S):
                told = await asyncio.to_thread(ray.nodes)
        except Exception:  # TimeoutError and Ray's own: who does not answer does not say
            return False
        return not any(each["NodeID"] == node and each["Alive"] for each in told)

    async def session(
        self, spec: SessionSpec, node: str, run_id: str, attempt: int, again: bool = False
    ) -> SessionHandle:
        """Make the actor of a session on `node`; Ray chooses the cards. `again`: another start came to nothing.

        Raises `ActorLost`, of it `NoCards`, and `ActorFailed`.
        """
        actor = actor_class().options(
            num_gpus=spec.gpus, num_cpus=0, max_concurrency=4, scheduling_strategy=nodes.on(node)
        )
        forks = spec.start is Start.WARM and not again  # another start is never forked (`workers.session`)
        warm_parent, why = await self._warm_parents.socket(node, spec) if forks else (None, None)
        omp = users_omp_num_threads()
        first = node not in self._served
        self._served.add(node)
        handle = SessionHandle(
            actor.remote(spec, run_id, attempt, again, omp, warm_parent, why, first),
            partial(self._served.discard, node) if first else lambda: None,
            partial(self._warm_parents.saw, node, spec),
        )
        await handle.alive()
        return handle


def _have_ray_read_its_environment() -> None:
    """Have Ray read whether there is a token, and which: it keeps what stood there when it was imported, and the first
    token that this process had, and a head with another one refuses it until Ray says that the head did not start."""
    with contextlib.suppress(ImportError, AttributeError):  # Ray's own; earlier versions have no tokens
        from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
