"""Command lines run in the process of the tests, whose signals stay as they are."""

from collections.abc import Callable

import pytest

import orchestrator.__main__


def orchestrate_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *typed: str
) -> tuple[int, str]:
    """Return the exit code of `python -m orchestrator`, and all that it said."""
    monkeypatch.setattr("sys.argv", ["orchestrator", *typed])
    for answer in ("raise_on_all", "ignore"):
        monkeypatch.setattr(f"orchestrator.interrupts.{answer}", lambda: None)
    return ended(orchestrator.__main__.main, capsys)


def ended(program: Callable[[], int], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Return the exit code of a program, and all that it said."""
    try:
        code = program()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    said = capsys.readouterr()
    return code, said.out + said.err
