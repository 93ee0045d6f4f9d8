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
    sys.exit(130)
"""
KILL = "os.kill(os.getpid(), signal.SIGTERM)"


@pytest.mark.parametrize("code", [KILL, f"with interrupts.deferred():\n    {KILL}"], ids=["at once", "deferred"])
def test_its_exit_code_holds_though_it_came_while_code_ran_from_a_string(tmp_path: Path, code: str) -> None:
    """As the imports do that make data classes."""
    (tmp_path / "answered.py").write_text(ANSWERED.format(code=code))
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run([sys.executable, "-m", "answered"], env=os.environ | {"PYTHONPATH": path}, check=False)
    assert done.returncode == 130
