"""What is kept of a server's command line, environment and log: enough to repeat it, no secrets, no paths. Pure."""

from __future__ import annotations

import platform
import re
import sys
from pathlib import Path

_KEPT = re.compile(
    r"^(CUDA_|NCCL_|NVSHMEM_|TORCH_|VLLM_|HF_|OMP_|TOKENIZERS_|TRITON_|PYTORCH_|TMPDIR|DO_NOT_TRACK|LD_PRELOAD)"
)
_SECRET = re.compile(r"TOKEN(?!IZERS)|KEY|SECRET|PASSW|CREDENTIAL|PROXY", re.IGNORECASE)
_HOME_PATH = re.compile(r"(?<![\w.])/(?:[\w.+-]+/)*site-packages/")
MASK = "***"
SESSION = "<session>"


def shown_argv(argv: list[str], private: Path) -> list[str]:
    """Return a command line with the interpreter by its name and the private directory as `<session>`."""
    return [argument.replace(sys.executable, "python").replace(str(private), SESSION) for argument in argv]


def shown_environment(environment: dict[str, str], private: Path) -> list[str]:
    """Return `NAME=value` of the variables that can move a number, sorted; values of secret ones masked."""
    return [
        f"{name}={MASK if _SECRET.search(name) else value.replace(str(private), SESSION)}"
        for name, value in sorted(environment.items())
        if _KEPT.match(name)
    ]


def masked(log: str, private: Path, *secrets: str | None) -> str:
    """Return a log without the session's secrets, its private directory as `<session>`, libraries by their names."""
    for secret in secrets:
        if secret:
            log = log.replace(secret, MASK)
    return _HOME_PATH.sub("", log.replace(str(private), SESSION))


def python_version() -> str:
    """Return the interpreter's version."""
    return platform.python_version()
