"""What can go wrong with a cluster or an actor, and Ray's errors in words."""

from __future__ import annotations


class ActorLost(Exception):
    """The session's actor or its node is gone; another node may do."""


class NoCards(ActorLost):
    """The session's actor never came to life: cards that the queue takes for free are somebody else's."""


class ActorFailed(Exception):
    """The session's actor could not be made, for a reason that it would meet anywhere: a defect of ours."""


class ClusterError(Exception):
    """No cluster to be had, with what to do about it."""


def in_a_line(error: Exception) -> str:
    """The first line of a message, or the last of one that is a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if "RayTaskError" in type(error).__name__ or in_its_making(error) else lines[0]


def in_its_making(error: Exception) -> bool:
    return bool(getattr(error, "actor_init_failed", False))
