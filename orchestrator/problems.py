"""What is wrong with a configuration, in words. Light: imported before anything is known to be needed."""

from __future__ import annotations


class ConfigError(Exception):
    """A configuration that cannot be run: one line a problem."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
