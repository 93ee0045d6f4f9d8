"""What is kept of a server's command line, environment and log: enough to repeat it, no secrets, no paths. Pure."""

from __future__ import annotations

import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

_KEPT = re.compile(
    r"^(CUDA_|NCCL_|NVSHMEM_|TORCH_|VLLM_|HF_|OMP_|TOKENIZERS_|TORCHINDUCTOR_|TRITON_|PYTORCH_|TMPDIR|DO_NOT_TRACK|LD_PRELOAD)"
)
_SECRET = re.compile(r"TOKEN(?!IZERS)|KEY|SECRET|PASSW|CREDENTIAL|PROXY", re.IGNORECASE)
_HOME_PATH = re.compile(r"(?<![\w.])/(?:[\w.+-]+/)*site-packages/")
MASK = "***"


@dataclass(frozen=True, slots=True)
class Places:
    """Directories whose paths mean nothing elsewhere."""

    session: Path
    cache: Path | None = None

    def named(self, text: str) -> str:
        """Return a text with the directories as `<session>` and `<cache>`."""
        if self.cache is not None:
            text = text.replace(str(self.cache), "<cache>")
        return text.replace(str(self.session), "<session>")


def shown_argv(argv: list[str], places: Places) -> list[str]:
    """Return a command line with the interpreter by its name and the directories by theirs."""
    return [places.named(argument.replace(sys.executable, "python")) for argument in argv]


def shown_environment(environment: dict[str, str], places: Places) -> list[str]:
    """Return `NAME=value` of the variables that can move a number, sorted; values of secret ones masked."""
    return [
        f"{name}={MASK if _SECRET.search(name) else places.named(value)}"
        for name, value in sorted(environment.items())
        if _KEPT.match(name)
    ]


def masked(log: str, places: Places, *secrets: str | None) -> str:
    """Return a log without the session's secrets, directories and libraries by their names."""
    for secret in secrets:
        if secret:
            log = log.replace(secret, MASK)
    return _HOME_PATH.sub("", places.named(log))


def python_version() -> str:
    """Return the interpreter's version."""
    return platform.python_version()
