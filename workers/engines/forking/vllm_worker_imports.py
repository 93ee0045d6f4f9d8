"""What the CPU build's worker would import next, imported without full garbage collections, and so sooner.

Run by `vllm_forking` ahead of a spawned worker's program, and by path: a worker's PYTHONPATH has nothing of ours.
Afterwards the process is as if it had imported them later.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys

MAIN = "vllm.entrypoints.openai.api_server"
"""Of the server: a spawned process runs its parent's main module again."""
MODULES = (MAIN, "vllm.v1.executor.multiproc_executor", "vllm.v1.worker.cpu_worker")

NO_FULL_COLLECTION = 10**9
"""As in `warm_parent.py`, which is no package that a worker could import from."""

THRESHOLDS = gc.get_threshold()
OURS = (*THRESHOLDS[:2], NO_FULL_COLLECTION)
gc.set_threshold(*OURS)
for name in MODULES:
    with contextlib.suppress(ImportError):  # another version's place: imported when it is needed
        importlib.import_module(name)
sys.modules.pop(MAIN, None)  # it is run as `__mp_main__`, and would be taken for a second one
if gc.get_threshold() == OURS:  # an import may set its own
    gc.set_threshold(*THRESHOLDS)
