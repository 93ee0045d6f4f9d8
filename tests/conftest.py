"""Fixtures that several test modules share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_line import Place, made_place


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """Return where one command line runs."""
    with made_place(tmp_path) as made:
        yield made
