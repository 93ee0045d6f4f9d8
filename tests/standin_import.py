"""What a stand-in for an engine imports: the pid of the process that did."""

import os

IMPORTED_BY = os.getpid()
