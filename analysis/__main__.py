"""`python -m analysis RUN`: rebuild every artifact of a run from its Parquet files. Exit 0, or 2 with one line."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from analysis.answer import answer
from analysis.artifacts import reduce
from analysis.errors import AnalysisError


def main(argv: list[str] | None = None) -> int:
    """Parse `argv`, reduce the run, print the answer and the paths written; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m analysis", description="Rebuild the artifacts of a run directory.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, for example outputs/RUN")
    run_dir: Path = parser.parse_args(argv).run
    try:
        written = reduce(run_dir)
        print(answer(run_dir))
    except (AnalysisError, OSError) as error:
        print("analysis:", *str(error).split(), file=sys.stderr)  # one line, whatever a path holds
        return 2
    for path in written:
        print(f"  {path.relative_to(run_dir)}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    sys.exit(main())
