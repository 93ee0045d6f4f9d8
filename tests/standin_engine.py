"""A module that a warm parent imports and forks: says what it finds in itself, then waits, as a server does."""

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

IMPORTED_BY = os.getpid()


def found() -> dict[str, object]:
    """Return what a fork could have inherited."""
    return {
        "pid": os.getpid(),
        "imported_by": sys.modules.get(__name__, None) is not None and IMPORTED_BY,
        "argv": sys.argv[1:],
        "directory": str(Path.cwd()),
        "environment": dict(os.environ),
        "path": sys.path,
        "group": os.getpgrp(),
        "session": os.getsid(0),
        "random": random.random(),
        "temporary": tempfile.gettempdir(),
        "sigterm": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
        "sigint": signal.getsignal(signal.SIGINT) == signal.default_int_handler,
        "descriptors": sorted(fd.name for fd in Path("/proc/self/fd").iterdir()),
        "main": sys.modules["__main__"].__spec__.name,
    }


if __name__ == "__main__":
    if "--stubborn" in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.fork() == 0:
            os.setsid()
    print(json.dumps(found()), flush=True)
    if "--fail" in sys.argv:
        sys.exit(3)
    time.sleep(600)
