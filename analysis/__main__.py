"""`python -m analysis RUN` and its sisters compare, drift and whatif. Exit 0; 1 for drift; 2 with one line why not."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.artifacts import reduce
from analysis.comparing.compare import compare, draw
from analysis.comparing.drift import THRESHOLD, drift
from analysis.comparing.whatif import Question, what_if
from analysis.errors import AnalysisError
from analysis.pages.answer import answer

DRIFTED = 1
BAD_INPUT = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Parse `argv`, do what it says, print the result; return the exit code."""
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    try:
        code: int = arguments.command(arguments)
    except (AnalysisError, OSError) as error:
        print("analysis:", *str(error).split(), file=sys.stderr)  # one line, whatever a path holds
        return BAD_INPUT
    return code


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m analysis",
        description="What run directories say.",
        epilog="`python -m analysis RUN` is short for `artifacts RUN`; a run named like a command is ./NAME.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, words: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=words, description=words)
        added.add_argument("--json", action="store_true", help="print the same as JSON")
        added.set_defaults(command=run)
        return added

    artifacts = command("artifacts", _artifacts, "rebuild the artifacts of a run from its Parquet files")
    artifacts.add_argument("run", type=Path, metavar="RUN", help="run directory, for example outputs/RUN")
    several = command("compare", _compare, "differences of runs from the first, with intervals")
    several.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="two or more run directories")
    several.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw all runs into one plot")
    drifted = command("drift", _drift, "exit 1 if a run is worse than a baseline by more than noise and a threshold")
    drifted.add_argument("baseline", type=Path, metavar="BASELINE", help="run directory")
    drifted.add_argument("run", type=Path, metavar="RUN", help="run directory")
    drifted.add_argument("--threshold", type=_share, default=THRESHOLD, metavar="SHARE", help="default: %(default)s")
    asked = command("whatif", _whatif, "what would fit into the KV pool that a run measured, and what is known of it")
    asked.add_argument("run", type=Path, metavar="RUN", help="run directory")
    asked.add_argument("question", nargs="+", metavar="NAME=NUMBER", help="max_model_len=8192 concurrency=16")
    known = [*commands.choices, "-h", "--help"]
    return parser.parse_args(argv if not argv or argv[0] in known else ["artifacts", *argv])


def _share(words: str) -> float:
    share = float(words)
    if not 0 < share < 10:
        raise ValueError(f"{words} is no share")
    return share


def _artifacts(arguments: argparse.Namespace) -> int:
    written = [str(path.relative_to(arguments.run)) for path in reduce(arguments.run)]
    words = answer(arguments.run)
    if arguments.json:
        _print_json({"run": str(arguments.run), "answer": words.splitlines()[:-1], "files": written})
    else:
        print("\n".join([words, *(f"  {path}" for path in written)]))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    if len(arguments.runs) < 2:
        raise AnalysisError("compare: needs two runs or more")
    if arguments.plot is not None and arguments.plot.suffix != ".svg":
        raise AnalysisError(f"--plot: {arguments.plot} does not end in .svg, which is what is drawn")
    comparison = compare(arguments.runs)
    if arguments.plot is not None:
        draw(comparison, arguments.plot)
    _show(comparison, arguments.json)
    return 0


def _drift(arguments: argparse.Namespace) -> int:
    found = drift(arguments.baseline, arguments.run, arguments.threshold)
    _show(found, arguments.json)
    return DRIFTED if found.worse else 0


def _whatif(arguments: argparse.Namespace) -> int:
    _show(what_if(arguments.run, Question.parse(arguments.question)), arguments.json)
    return 0


def _show(result: Any, as_json: bool) -> None:
    if as_json:
        _print_json(result.as_json())
    else:
        print(result.text())


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    sys.exit(main())
