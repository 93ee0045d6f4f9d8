"""Counters of a server that has nothing left to count. Used by `workers.measuring` around a level."""

from __future__ import annotations

import time
from collections.abc import Callable

from workers.metrics import ServerMetrics

LIMIT_S = 1.0
PAUSE_S = 0.05


def at_rest(scrape: Callable[[], ServerMetrics]) -> ServerMetrics:
    """Scrape until nothing runs or waits and the tokens stand still over two scrapes; return the last one.

    vLLM hands a step's tokens to the streams first and counts them afterwards. After `LIMIT_S` the last scrape is
    returned as it is: the server works on for requests that were given up, and `token_count_difference` shows it.
    Raises what `scrape` raises.
    """
    deadline = time.monotonic() + LIMIT_S
    seen = scrape()
    while time.monotonic() < deadline:
        time.sleep(PAUSE_S)
        before, seen = seen, scrape()
        if not seen.running and not seen.waiting and seen.generation_tokens == before.generation_tokens:
            break
    return seen
