"""What a load process runs: one plan. Its imports stand between such a process's start and its first request.

`orchestrator.cluster` has Ray run it, on the server's node.
"""

from __future__ import annotations

from workers import processes
from workers.load import client
from workers.load.plan import LoadPlan, LoadResult


def generate(plan: LoadPlan) -> LoadResult:
    """Run `plan` in this process, at the niceness of a user's own. Raises as `workers.load.client.generate` does."""
    processes.niceness_reset()
    return client.generate(plan)
