"""Real command lines in a place of their own, where whatever they leave behind can be found."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent


@dataclass
class Place:
    """Where one command line leaves what it leaves: its TMPDIR is a mark that every process of its tree inherits."""

    outputs: Path
    mark: Path

    def environment(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        return {**os.environ, "PYTHONPATH": path, "TMPDIR": str(self.mark)}

    def leftovers(self) -> list[str]:
        """Return processes and temporary files that outlived the run."""
        return [*map(str, self.mark.iterdir()), *self._processes()]

    def servers(self) -> list[str]:
        """Return the stand-in servers that live."""
        return [each for each in self._processes() if "sim_server.py" in each and "guard.py" not in each]

    def _processes(self) -> Iterator[str]:
        for process in psutil.process_iter(["environ", "cmdline"]):
            if str(self.mark) in (process.info["environ"] or {}).get("TMPDIR", ""):
                yield " ".join(process.info["cmdline"] or [])


@contextmanager
def made_place(outputs: Path) -> Iterator[Place]:
    """Make a place whose TMPDIR is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="vct-", dir="/tmp") as mark:
        yield Place(outputs, Path(mark))


def orchestrate(place: Place, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orchestrator", *arguments, f"output_root={place.outputs}"]
    return subprocess.run(command, cwd=ROOT, env=place.environment(), capture_output=True, text=True, timeout=900)
