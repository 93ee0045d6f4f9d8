"""The simulator as a module that can be forked; forked with STUCK set it says one word and hangs, or ends."""

import os
import sys
import time

from workers.engines import sim_server

if __name__ == "__main__":
    if any(argument.endswith("warm_parent.py") for argument in sys.orig_argv):
        if os.environ.get("STUCK") == "hang":
            time.sleep(600)
        if os.environ.get("STUCK") == "end":
            sys.exit("a lock that another thread held")
    sim_server.main()
