"""Empties a server's prefix cache, so that no level finds what an earlier one left. Blocking; by `workers.measuring`.

vLLM has the endpoint in developer mode only, which its servers have on private sockets alone (`engines.vllm`).
"""

from __future__ import annotations

import json
import time

from workers import probe
from workers.load.endpoint import Endpoint

LIMIT_S = 2.0
"""The last requests' blocks may be held for a moment after their answers have ended."""
PAUSE_S = 0.05


def reset(endpoint: Endpoint) -> bool | None:
    """Return whether the server says that the cache is empty now; None over TCP, where it cannot be asked.

    The status says nothing: vLLM 0.32 answers 200 and `{"success": false}` while requests hold blocks, 0.25.1 an empty
    200 whatever came of it. That, or no such endpoint, confirms nothing. Raises `probe.NoAnswer`.
    """
    if endpoint.uds is None:
        return None
    deadline = time.monotonic() + LIMIT_S
    while True:
        status, text = probe.post(endpoint, "/reset_prefix_cache", {}, LIMIT_S)
        done = _success(text) if status == 200 else None
        if done is not False or time.monotonic() > deadline:
            return done is True
        time.sleep(PAUSE_S)


def _success(text: str) -> bool | None:
    """What the body says; None for a version whose body says nothing."""
    try:
        answer = json.loads(text)
    except ValueError:
        return None
    found = answer.get("success") if isinstance(answer, dict) else None
    return found if isinstance(found, bool) else None
