"""The simulator as a module that can be forked; forked with STUCK set it says one word and hangs, or ends.

With STARTS_AS `silent` it says nothing and never listens, with `slow` it says a word ten times a second for three
seconds before it listens, with `stubborn` it does not heed SIGTERM and never listens."""

import os
import signal
import sys
import time

from workers.engines import sim_server

if __name__ == "__main__":
    starts_as = os.environ.get("STARTS_AS")
    if starts_as == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("starting", flush=True)
    if starts_as in ("silent", "stubborn"):
        time.sleep(600)
    if starts_as == "slow":
        for _ in range(30):
            print("loading", flush=True)
            time.sleep(0.1)
    if any(argument.endswith("warm_parent.py") for argument in sys.orig_argv):
        if os.environ.get("STUCK") == "hang":
            time.sleep(600)
        if os.environ.get("STUCK") == "end":
            sys.exit("a lock that another thread held")
    sim_server.main()
