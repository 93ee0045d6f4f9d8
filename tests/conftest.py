"""Fixtures that several test modules share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.command_line import Place, made_place

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """Return where one command line runs."""
    with made_place(tmp_path) as made:
        yield made
