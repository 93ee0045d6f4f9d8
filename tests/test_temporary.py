"""Private directories: what a killed process has left in one is removed by the next, and nobody else's is."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from workers.temporary import own, private_directory, remove_ownerless


def test_only_directories_whose_owner_is_dead_are_removed_and_what_works_in_them_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    alive, unmarked, dead = (private_directory("x-", 1) for _ in range(3))
    held = own(alive)
    os.close(own(dead))
    (tmp_path / "x-link").symlink_to(dead)
    works = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], cwd=dead)
    assert remove_ownerless("x-") == [dead]
    assert works.wait(10) == -9
    assert (alive.exists(), unmarked.exists(), dead.exists()) == (True, True, False)
    os.close(held)
