"""Why a part of a level can come to nothing that is no defect of ours, each with its class of failure.

Raised where load runs, caught by `workers.session`: `orchestrator.cluster` brings them there through Ray as they are.
"""

from __future__ import annotations

from typing import ClassVar

from contract.failures import FailureClass


class LoadFailed(Exception):
    """A part of a level came to nothing, and so did the level."""

    failure_class: ClassVar[FailureClass]


class LoadLost(LoadFailed):
    """A load process ended before its part, or did not come to begin it."""

    failure_class = FailureClass.LOAD_LOST


class TooFewFiles(LoadFailed):
    """A part needs more connections than its process may have."""

    failure_class = FailureClass.CLIENT_SOCKETS
