"""Caches of this user on this node that outlive a run: compiled kernels, and the shapes they were compiled for.

They save time. A server that has compiled differs a little from one that found it done, in memory and in its pool
(docs/measured_on_gpus.md). Used by the session, which tells its server where they are.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

VARIABLE = "VLLM_CAPACITY_CACHE_ROOT"
"""Names another directory than /var/tmp/vllm-capacity-UID."""
COMPILED = {"VLLM_CACHE_ROOT": "vllm", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""Variables and directories of what vLLM, Inductor and Triton compile. Inductor's own choice lies in TMPDIR, and
Triton's follows it once Inductor is imported; a session's TMPDIR is gone with it."""


def cache_root() -> Path | None:
    """Return the caches' root, made where need be; None where it is not this user's alone or cannot be made.

    What lies there is executed: a directory that another user made or can write to is not used.
    """
    directory = Path(os.environ.get(VARIABLE) or f"/var/tmp/vllm-capacity-{os.getuid()}")
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.lstat()
    except OSError:
        return None
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return directory if mine and os.access(directory, os.W_OK) else None


def compile_caches(root: Path | None) -> dict[str, str]:
    """Return the variables that point a server to caches below `root`, but for those that the user has set."""
    if root is None:
        return {}
    return {name: str(root / below) for name, below in COMPILED.items() if name not in os.environ}


def shape_dir(root: Path) -> Path:
    """Return where shapes lie."""
    return root / "shapes"
