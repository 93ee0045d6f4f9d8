"""What is kept of a server's command line, environment and log: enough to repeat it, no secrets, no paths. Pure."""

from __future__ import annotations

import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from workers.secrecy import MASK, hidden, is_named_secret, without_logins

_KEPT = re.compile(
    r"^(CUDA_|NCCL_|NVSHMEM_|TORCH_|VLLM_|HF_|OMP_|KMP_|GOMP_|MKL_|TOKENIZERS_|"
    r"TORCHINDUCTOR_|TRITON_|PYTORCH_|TMPDIR|DO_NOT_TRACK|LD_PRELOAD)"
)
_HOME_PATH = re.compile(r"(?<![\w.])/(?:[\w.+-]+/)*site-packages/")
_PROMPT = re.compile(r"(?P<name>prompt|prompt_token_ids): (?P<said>'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\[[^\]]*\]?)")
"""As vLLM's request logger writes them (`--enable-log-requests`); the last of a cut line is open."""


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
        f"{name}={MASK if is_named_secret(name) else without_logins(places.named(value))}"
        for name, value in sorted(environment.items())
        if _KEPT.match(name)
    ]


def masked(log: str, places: Places, *secrets: str | None) -> str:
    """Return a log without the given secrets and any URL's password, directories and libraries by their names."""
    return _HOME_PATH.sub("", places.named(hidden(log, *secrets)))


def without_prompts(log: str) -> str:
    """Return a log without the prompts in it."""
    return _PROMPT.sub(rf"\g<name>: {MASK}", log)


def python_version() -> str:
    """Return the interpreter's version."""
    return platform.python_version()
