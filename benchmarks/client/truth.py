"""Starts truth servers and ends them: what the benchmarks of this folder share."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TruthServer:
    """One `truth_server.py` that listens."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def requests(self) -> list[tuple[float, list[float]]]:
        """Return the truth once the server has stopped: (read, writes) of every request, monotonic seconds."""
        return [(read, writes) for read, writes, *_ in json.loads(self.log.read_text())]

    def by_body(self) -> dict[int, tuple[float, list[float]]]:
        """Return (arrived, writes) by the CRC-32 of the requests' bodies, which have to differ."""
        return {crc: (arrived, writes) for _, writes, crc, arrived in json.loads(self.log.read_text())}


@contextlib.contextmanager
def truth_server(directory: Path, core: int, interval_ms: float, port: int = 0) -> Iterator[TruthServer]:
    """Run a server pinned to `core`; of several in one directory each needs its own. 0: on a port of its own."""
    port_file, log = directory / f"port.{core}", directory / f"truth.{core}"
    port_file.unlink(missing_ok=True)
    words = [Path(__file__).parent / "truth_server.py", port_file, log, core, interval_ms, port]
    process = subprocess.Popen([sys.executable, *map(str, words)])
    try:
        while not port_file.exists() or not port_file.read_text():
            time.sleep(0.01)
        yield TruthServer(process, int(port_file.read_text()), log)
    finally:
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGTERM)
        process.wait(30)
