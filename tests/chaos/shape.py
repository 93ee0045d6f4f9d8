"""What a finished run consists of, so that two runs of one plan can be held against each other: what there is, and how
much of it, but no measured number."""

import csv
import re
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

UNCOUNTED = ("telemetry.parquet", "server_samples.parquet", "figures.csv")
"""How many rows they have follows from how long levels took, and from what the numbers give pages to say."""
_EARLIER_LOG = re.compile(r"logs/\w+\.\d+\.log")
"""What a server said in a start that was not its last."""


@dataclass(frozen=True)
class Shape:
    """Of one run directory: its files by name, columns and number of rows of its tables, how its points ended."""

    files: frozenset[str]
    columns: dict[str, tuple[str, ...]]
    rows: dict[str, int]
    statuses: dict[str, str]


def shape_of(run: Path) -> Shape:
    """Read a run directory."""
    columns: dict[str, tuple[str, ...]] = {}
    rows: dict[str, int] = {}
    for path in sorted(run.glob("*.parquet")):
        columns[path.name] = tuple(pq.read_schema(path).names)
        rows[path.name] = pq.read_metadata(path).num_rows
    if "sessions.parquet" in rows:  # a row a start
        rows["sessions.parquet"] = len(pq.read_table(run / "sessions.parquet", columns=["session_id"])[0].unique())
    for path in sorted(run.glob("*.csv")):
        with path.open(newline="") as file:
            columns[path.name], *others = (tuple(row) for row in csv.reader(file))
        rows[path.name] = len(others)
    rows = {name: count for name, count in rows.items() if name not in UNCOUNTED}
    points = pq.read_table(run / "points.parquet", columns=["point_id", "status"]).to_pylist()
    names = (str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    files = frozenset(name for name in names if not _EARLIER_LOG.fullmatch(name))
    return Shape(files, columns, rows, {point["point_id"]: point["status"] for point in points})


def differences(undisturbed: Shape, other: Shape) -> list[str]:
    """Return what of `other` is not as in the undisturbed run, one line each."""
    found = [f"no {name}" for name in sorted(undisturbed.files - other.files)]
    found += [f"{name}, which the undisturbed run has not" for name in sorted(other.files - undisturbed.files)]
    for what in ("columns", "rows", "statuses"):
        then, now = getattr(undisturbed, what), getattr(other, what)
        found += [
            f"{what} of {name}: {now.get(name)}, not {then.get(name)}"
            for name in sorted(then.keys() | now.keys())
            if then.get(name) != now.get(name)
        ]
    return found
