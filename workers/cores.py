"""Cores that work may use on this host: those it may run on, and how many at once by its container's CPU quota.

Used by `orchestrator.fleet` for places, and by `workers.session` for load processes. Linux only; only reads.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from workers.processes import PROC, tree

CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class FreeCores:
    """What a server leaves to others."""

    numbers: tuple[int, ...]
    """Cores that it has not bound itself to."""
    at_once: int
    """So many of them can be busy at once: a quota may allow fewer."""

    @property
    def has_quota(self) -> bool:
        """Whether a quota allows fewer than there are."""
        return self.at_once < len(self.numbers)


def usable_cores(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Return how many cores this process can keep busy: those it may run on, or its CPU quota, rounded up, where that
    is less.

    A container's limit (`docker run --cpus`, `limits.cpu` of Kubernetes) is a quota: `sched_getaffinity` shows all
    cores of the host, and whoever uses more of them at once is stopped for the rest of each period.
    """
    quotas = (max(1, math.ceil(quota)) for quota in _quotas(proc, cgroups))
    return min((len(os.sched_getaffinity(0)), *quotas))


def free_cores(pid: int) -> FreeCores:
    """Return the cores that no process in the tree of `pid` has bound itself to; all where that leaves none.

    vLLM's CPU backend binds its compute threads to cores and keeps them busy: what they use of a quota is not free.
    """
    every = os.sched_getaffinity(0)
    bound: set[int] = set()
    for member in tree(pid):
        with contextlib.suppress(ProcessLookupError):
            cores = os.sched_getaffinity(member)
            bound |= cores if cores < every else set()
    numbers, usable = tuple(sorted(every - bound or every)), usable_cores()
    left = usable - len(bound)
    return FreeCores(numbers, min(len(numbers), left if left > 0 else usable))


def _quotas(proc: Path, cgroups: Path) -> Iterator[float]:
    """Yield the quota of this process's control group, and those of the groups that it lies in, in cores.

    In a container the path may be the host's, of which only the root is to be seen: that is the container's own.
    Source: cgroups(7); cpu.max of version 2, cpu.cfs_quota_us and cpu.cfs_period_us of version 1 (Linux,
    admin-guide/cgroup-v2 and scheduler/sched-bwc).
    """
    for line in _words(proc / "self" / "cgroup", "\n"):
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = cgroups / controllers  # "" in version 2
        group = root / path.lstrip("/")
        for each in (group, *group.parents):
            if not each.is_relative_to(root):
                break
            if controllers:
                limit = [*_words(each / "cpu.cfs_quota_us"), *_words(each / "cpu.cfs_period_us")]
            else:
                limit = _words(each / "cpu.max")
            if len(limit) == 2 and limit[0] not in ("max", "-1"):
                yield int(limit[0]) / int(limit[1])


def _words(file: Path, separator: str | None = None) -> list[str]:
    try:
        return [word for word in file.read_text().split(separator) if word]
    except OSError:
        return []
