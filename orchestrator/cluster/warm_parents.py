"""The warm parents of a run's nodes: which node has one, who keeps it, and where none is to be had, why."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from contract.rows import MUTE_PARENT, SessionRow
from contract.specs import SessionSpec
from orchestrator.cluster import nodes
from orchestrator.cluster.actors import WarmActor
from orchestrator.cluster.errors import ActorFailed, ActorLost, result
from orchestrator.cluster.handle import ACTOR_LIMIT_S
from orchestrator.fleet import Fleet, users_omp_num_threads
from orchestrator.forks import Forks
from workers.lease import RENEWED_EVERY_S

CLOSE_LIMIT_S = 1.0
"""For owners to end their warm parents: those that heed nothing are killed after half of it (`workers.launch.warm`)."""


class WarmParents:
    """Each is owned by an actor of its node; sessions ask it over its socket."""

    def __init__(self) -> None:
        self._owners: dict[str, Any] = {}
        self._not_to_be_had: dict[str, str] = {}
        """Nodes, with why: they are not asked for one again."""
        self._forks: defaultdict[str, Forks] = defaultdict(Forks)
        """By node."""
        self._renewing: threading.Thread | None = None
        self._left = threading.Event()

    def begin(self, fleet: Fleet, first: Mapping[str, SessionSpec]) -> None:
        """Have nodes import what servers like their `first` one are forked from; who needs it waits for it.

        Others of the fleet do so when a session is first placed there: an import reads thousands of files, often from a
        disk that all nodes share, and takes cores that other jobs may use.

        Not a node whose cards are of several kinds: vLLM asks, as it is imported, what the first one can do
        (`get_device_capability`, which is cached) and chooses data types and kernels by it. Which cards a server will
        have, the parent cannot know.
        """
        for node in fleet.nodes:
            if node.mixes_kinds:
                self._not_to_be_had[node.id] = f"this node has no warm parent: {_of_several_kinds(node.all_kinds)}"
        for name, spec in first.items():
            if name not in self._not_to_be_had:
                self._import_on(name, spec)
        renewing = threading.Thread(target=self._renew, name="keeps warm", daemon=True)
        renewing.start()
        self._renewing = renewing  # an interrupt may come before: who joins it finds it started

    def _import_on(self, node: str, spec: SessionSpec) -> None:
        import ray

        actor = ray.remote(num_cpus=0, max_restarts=0)(WarmActor)
        self._owners[node] = actor.options(scheduling_strategy=nodes.on(node)).remote(spec, users_omp_num_threads())

    def _renew(self) -> None:
        """Renew their leases from their making on: a node's first session may come later than a lease lasts."""
        while not self._left.wait(RENEWED_EVERY_S):
            for actor in list(self._owners.values()):  # the driver's thread adds to them
                with contextlib.suppress(Exception):  # who wants a server of it finds out
                    actor.ping.remote()

    def saw(self, node: str, spec: SessionSpec, row: SessionRow) -> None:
        """Learn from what a start has come to: who asks a parent that hangs waits, for nothing."""
        self._forks[node].see(spec, row)
        if row.warm_parent_is_mute:
            what = (row.start_reason or "").removeprefix(MUTE_PARENT)
            self._not_to_be_had[node] = f"the warm parent of this node did not answer an earlier session: {what}"

    def why_none(self, node: str, spec: SessionSpec) -> str | None:
        """Return why a node has none for `spec`, as far as is known without asking."""
        return self._not_to_be_had.get(node) or self._forks[node].problem(spec)

    async def socket(self, node: str, spec: SessionSpec) -> tuple[str | None, str | None]:
        """Return the socket of the node's, or why it has none for `spec`. One that did not come is not waited for
        again."""
        why = self.why_none(node, spec)
        if why:
            return None, why
        if node not in self._owners:
            if self._renewing is None:
                return None, None  # nothing of this run can be forked
            self._import_on(node, spec)
        try:
            async with asyncio.timeout(ACTOR_LIMIT_S):
                told: tuple[str | None, str | None] = await result(self._owners[node].socket.remote(spec))
        except TimeoutError:
            self._not_to_be_had[node] = f"this node has no warm parent: none came within {ACTOR_LIMIT_S:g} s"
        except (ActorLost, ActorFailed) as error:
            self._not_to_be_had[node] = f"this node has no warm parent: {error}"
        else:
            return told
        return None, self._not_to_be_had[node]

    def close(self) -> bool:
        """Have the owners end them; return whether there were any."""
        import ray

        self._left.set()
        if self._renewing is not None:
            self._renewing.join(CLOSE_LIMIT_S)
        if self._owners:
            with contextlib.suppress(Exception):
                ray.get([owner.close.remote() for owner in self._owners.values()], timeout=CLOSE_LIMIT_S)
        return bool(self._owners)


def _of_several_kinds(kinds: tuple[str, ...]) -> str:
    return f"its cards are of several kinds ({', '.join(kinds)}), and an import would know the first one only"
