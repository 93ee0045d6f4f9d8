"""Reads our command line before Hydra does: rewrites what it would misread, takes out what is not its own. Pure.

Called by `orchestrator.__main__` only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

GROUPS = ("model", "server", "engine", "load", "cluster", "sweep")
_ASSIGNMENT = re.compile(r"(?P<key>[A-Za-z_][\w.]*)=(?P<value>.*)", re.DOTALL)
_INSPECTION = ("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc")


@dataclass(frozen=True, slots=True)
class Arguments:
    """`resume` is the run directory to go on with, or None; Hydra gets `overrides`, then `flags` and their values."""

    resume: str | None
    overrides: list[str]
    flags: list[str]
    resume_strict: str = "true"
    """`resume.strict=` as typed: whether to stop where the run was made with other versions or cards."""

    @property
    def inspects(self) -> bool:
        """Whether Hydra is asked to print something (`--cfg job`, `--help`) instead of composing a run."""
        return any(argument.split("=", 1)[0] in _INSPECTION for argument in self.flags)

    def value_of(self, key: str) -> str | None:
        """Return what the command line says of `key`, whatever prefix it carries; None where it says nothing."""
        for argument in self.overrides:
            name, assigned, value = argument.lstrip("+").partition("=")
            if assigned and name == key:
                return value
        return None


def read(argv: list[str]) -> Arguments:
    """Return the arguments with `resume=` and `resume.strict=` taken out and the rest as Hydra needs them.

    - `sweep=kv` becomes `+sweep=kv`: the group is not in the defaults list, so that `+sweep=kv` works as typed.
    - `server.max_mdl_len=5` becomes `++server.max_mdl_len=5`: Hydra would stop at the first unknown key; our schema
      reports all of them with suggestions.
    """
    resume: str | None = None
    resume_strict = "true"
    overrides: list[str] = []
    flags: list[str] = []
    for argument in argv:
        match = _ASSIGNMENT.fullmatch(argument)
        if match is None:
            (overrides if argument.startswith(("+", "~")) else flags).append(argument)
        elif match["key"] == "resume":
            resume = match["value"] or None
        elif match["key"] == "resume.strict":
            resume_strict = match["value"].lower()
        elif match["key"] == "sweep":
            overrides.append(f"+{argument}")
        elif match["key"] in GROUPS or match["key"].split(".")[0] == "hydra":
            overrides.append(argument)
        else:
            overrides.append(f"++{argument}")
    return Arguments(resume, overrides, flags, resume_strict)
