"""What only rights over the host can show (users, namespaces), and that a test run says where it was not."""

from collections.abc import Iterable
from typing import Any, NoReturn

import pytest

NOT_SHOWN = "NOT SHOWN HERE"


def not_shown(why: str) -> NoReturn:
    """Skip a test, or all that need a fixture, and have the end of the run name it."""
    pytest.skip(f"{NOT_SHOWN}: {why}")


def lines(skipped: Iterable[Any]) -> list[str]:
    """Return the tests among skipped ones (pytest's reports) that `not_shown` has skipped, by why."""
    tests: dict[str, list[str]] = {}
    for report in skipped:
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if NOT_SHOWN in why:
            tests.setdefault(why.partition(f"{NOT_SHOWN}: ")[2], []).append(report.nodeid)
    return [line for why, names in tests.items() for line in (f"{why}:", *(f"  {name}" for name in names))]
