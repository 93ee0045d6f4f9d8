"""An interrupt is answered with the program's own exit code, wherever in Python it is met."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ANSWERED = """
import os, signal, sys
from orchestrator import interrupts

interrupts.raise_on_all()
try:
    exec({code!r})
except KeyboardInterrupt:
    interrupts.ignore()
    {again}
    sys.exit(130)
"""
KILL = "os.kill(os.getpid(), signal.SIGTERM)"


@pytest.mark.parametrize("code", [KILL, f"with interrupts.deferred():\n    {KILL}"], ids=["at once", "deferred"])
def test_its_exit_code_holds_though_it_came_while_code_ran_from_a_string(tmp_path: Path, code: str) -> None:
    """As the imports do that make data classes."""
    assert exit_code(tmp_path, ANSWERED.format(code=code, again="")) == 130


def test_another_that_comes_when_it_is_answered_already_changes_nothing(tmp_path: Path) -> None:
    """`timeout` and terminals send one twice."""
    assert exit_code(tmp_path, ANSWERED.format(code=KILL, again=KILL)) == 130


def exit_code(directory: Path, program: str) -> int:
    (directory / "answered.py").write_text(program)
    path = os.pathsep.join([str(directory), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run([sys.executable, "-m", "answered"], env=environment, timeout=60, check=False).returncode
