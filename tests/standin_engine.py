"""A module that a warm parent imports and forks: says what it finds in itself, then waits, as a server does."""

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests import standin_import


def found() -> dict[str, object]:
    """Return what a fork could have inherited."""
    return {
        "pid": os.getpid(),
        "imported_by": standin_import.IMPORTED_BY,
        "argv": sys.argv,
        "directory": str(Path.cwd()),
        "environment": dict(os.environ),
        "path": sys.path,
        "group": os.getpgrp(),
        "session": os.getsid(0),
        "priority": os.getpriority(os.PRIO_PROCESS, 0),
        "random": random.random(),
        "temporary": tempfile.gettempdir(),
        "signals": [str(signal.getsignal(number)) for number in sorted(signal.valid_signals())],
        "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
        "descriptors": {fd: str(Path(f"/proc/self/fd/{fd}").resolve()) for fd in range(3)},
        "more_descriptors": sorted(int(fd.name) for fd in Path("/proc/self/fd").iterdir())[4:],
        "main": sys.modules["__main__"].__spec__.name,
        "module": __name__ in sys.modules and "tests.standin_engine" in sys.modules,
    }


if __name__ == "__main__":
    if "--stubborn" in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if "--shares" in sys.argv:
            os.open(sys.argv[sys.argv.index("--shares") + 1], os.O_CREAT | os.O_RDWR, 0o600)
        if os.fork() == 0:
            os.setsid()
            Path(sys.argv[-1]).write_text(str(os.getpid()))
            time.sleep(600)
    print(json.dumps(found()), flush=True)
    time.sleep(600)
