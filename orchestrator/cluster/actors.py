"""What runs on a cluster's nodes: the owner of a session, that of a warm parent, and tasks."""

from __future__ import annotations

import socket
from functools import partial
from pathlib import Path
from typing import Any

from contract.rows import PointRow, SessionEnd, SessionRow
from contract.specs import Point, SessionSpec
from orchestrator.cluster import nodes
from orchestrator.cluster.errors import in_a_line
from workers.lease import Lease
from workers.load.failed import LoadFailed, LoadLost
from workers.temporary import remove_ownerless

ENDING_S = 1.0
"""Given to the other tasks to end by themselves after one has failed: mostly all fail by the same, at one moment. Ray
ends the process that cancels a task whose result is just coming in ("Tried to complete task that was not pending", Ray
2.60; ray-project/ray#54798 tells of the race). None that has its result is cancelled; one may get it just then."""
CANCEL_LIMIT_S = 10.0


def actor_class() -> Any:
    """Return the class of a session's actor, as Ray wants it."""
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

        from workers.load.process import generate
        from workers.session import Session

        remove_ownerless()  # another start's of this session, say: its server is gone from the cards before ours comes
        context = ray.get_runtime_context()
        devices = [str(name).strip() for name in context.get_accelerator_ids().get("GPU", [])]
        load = ray.remote(num_cpus=0, max_retries=0)(generate).options(
            scheduling_strategy=nodes.on(context.get_node_id())
        )
        self._session = Session(
            spec,
            run_id,
            attempt,
            devices,
            lambda plans: together(load, plans),
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


def removed_there(patience_s: float) -> list[str]:
    """Remove what nobody owns any more on this node; return what that was."""
    return [f"{path} on {socket.gethostname()}" for path in remove_ownerless(patience_s=patience_s)]


def together(load: Any, plans: list[Any]) -> list[Any]:
    """Run load tasks at once; where one fails none is left that still sends.

    Raises:
        LoadFailed: as `workers.load.client.generate` does, or a task's process has ended.
    """
    import ray

    running = [load.remote(plan) for plan in plans]
    try:
        results: list[Any] = ray.get(running)
    except BaseException as error:
        ray.wait(running, num_returns=len(running), timeout=ENDING_S)
        for task in running:
            if ray.wait([task], timeout=0)[1]:
                ray.cancel(task, force=True)
        ray.wait(running, num_returns=len(running), timeout=CANCEL_LIMIT_S)
        if isinstance(error, ray.exceptions.RayTaskError):
            if isinstance(error.cause, LoadFailed):
                raise error.cause from None  # as it was raised, without Ray's traceback around it
        elif isinstance(error, ray.exceptions.RayError):
            raise LoadLost(f"a load process ended early: {type(error).__name__}: {in_a_line(error)}") from None
        raise
    return results
