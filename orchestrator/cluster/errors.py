"""What can go wrong with a cluster or an actor: Ray's errors as ours, and in words."""

from __future__ import annotations

from typing import Any

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


async def result(reference: Any) -> Any:
    """Await what an actor's verb returns. Raises `ActorLost`, `ActorFailed`, and what the verb itself has raised."""
    import ray

    try:
        return await reference
    except ray.exceptions.RayTaskError:
        raise  # a defect of ours: not to be tried again
    except ray.exceptions.RayError as error:
        why = in_a_line(error)
        if not _in_its_making(error):
            raise ActorLost(f"{type(error).__name__}: {why}") from None
        if OF_THE_NODE in why:
            raise ActorLost(f"it could not be made: {why}") from None
        raise ActorFailed(why) from None


def in_a_line(error: Exception) -> str:
    """The first line of a message, or the last of one that is a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if "RayTaskError" in type(error).__name__ or _in_its_making(error) else lines[0]


def _in_its_making(error: Exception) -> bool:
    return bool(getattr(error, "actor_init_failed", False))
