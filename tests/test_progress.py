"""Lines that a run prints as it goes."""

import io
from typing import Any

import pytest

from contract.rows import CAME_TO_NOTHING, MEASURED, SCHEMA_VERSION, SessionRow
from orchestrator.progress import Progress
from tests.test_session import spec


def said_of(**start: Any) -> list[str]:
    """Return what is printed of two servers that have started so, without the clock."""
    stream = io.StringIO()
    progress = Progress(1, 1.0, stream)
    for number in range(2):
        row = SessionRow(SCHEMA_VERSION, "run", f"s{number}", 1, MEASURED, False, "", ready_s=3.81, **start)
        progress.ready(spec(), row)
    progress.close()
    return [line.partition("] ")[2] for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ({"start": "cold"}, " in 3.8 s"),
        ({"start": "warm", "warm_wait_s": 0.01}, " in 3.8 s (warm)"),
        ({"start": "warm", "warm_wait_s": 16.1}, " in 3.8 s (warm, after 16.1 s of waiting for the import)"),
        (
            {"start": "cold", "warm_wait_s": 16.1, "fork_lost_s": 900.0},
            " in 3.8 s (after 16.1 s of waiting for the import, after a fork that cost 900.0 s)",
        ),
    ],
)
def test_a_server_that_is_ready_was_forked_or_not_and_what_went_before_is_told(start: dict[str, Any], end: str) -> None:
    lines = said_of(**start)
    assert len(lines) == 2
    assert all(line.startswith("ready    ") and line.endswith(end) for line in lines)


def test_why_servers_start_cold_is_said_once() -> None:
    lines = said_of(start="cold", start_reason=f"{CAME_TO_NOTHING}no word from it for 30 s", fork_lost_s=31.0)
    assert [line.split()[0] for line in lines] == ["ready", "started", "ready"]
    assert lines[1].endswith("forked, it came to nothing: no word from it for 30 s")
