"""Fixtures that several test modules share."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from orchestrator import interrupts
from tests import privileged
from tests.command_line import Place, made_place

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a script's background job, as would be all that tests interrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if missing := privileged.lines(terminalreporter.stats.get("skipped", [])):
        terminalreporter.section(f"{privileged.NOT_SHOWN}, for want of rights", red=True, bold=True)
        for line in missing:
            terminalreporter.line(line)


@pytest.fixture(autouse=True)
def no_interrupt_is_left_ignored() -> Iterator[None]:
    """Fail the test that leaves one so, and mend it: whatever a later one starts would inherit that."""
    before = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
    yield
    left = [n for n, how in before.items() if signal.getsignal(n) is signal.SIG_IGN is not how]
    for number in left:
        signal.signal(number, before[number])
    assert left == []


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """Return where one command line runs."""
    with made_place(tmp_path) as made:
        yield made
