"""Compares what a run has left with its plan. No finding means that nothing was lost or doubled."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from contract.failures import FailureClass
from contract.rows import FAILED, MEASURED, RESULT_STATUSES


@dataclass(frozen=True)
class Kept:
    """A shard whose point is done, as it was before the run was gone on with."""

    path: Path
    content: bytes


def kept_by(directory: Path) -> list[Kept]:
    """Return the shards that a resume must leave alone."""
    return [Kept(path, path.read_bytes()) for path in _shards(directory) if _row(path).get("status") in RESULT_STATUSES]


def findings(directory: Path, points: int, kept: list[Kept]) -> list[str]:
    """Return what is wrong with the store of a run that has ended for good: `points` were planned."""
    found = []
    manifest = json.loads((directory / "manifest.json").read_text())
    planned = {(session["id"], point["id"]) for session in manifest["sessions"] for point in session["points"]}
    if len(planned) != points:
        found.append(f"the manifest plans {len(planned)} points, not {points}")
    rows = {(path.parent.name, path.stem): _row(path) for path in _shards(directory)}
    found += [f"lost: {point} of {session} has no shard" for session, point in sorted(planned - rows.keys())]
    found += [f"a shard that nobody planned: {session}/{point}" for session, point in sorted(rows.keys() - planned)]
    for (session, point), row in sorted(rows.items()):
        if (row.get("session_id"), row.get("point_id")) != (session, point):
            found.append(f"{session}/{point}: its row is unreadable, or of another point")
        elif row["status"] == FAILED and row["failure_class"] not in set(FailureClass):
            found.append(f"{session}/{point}: failed without a class: {row['failure_class']}")
        elif row["status"] == FAILED and row["failure_class"] == FailureClass.INTERNAL:
            found.append(f"{session}/{point}: a defect of ours: {row['failure_message']}")
        elif row["status"] not in (MEASURED, FAILED):
            found.append(f"{session}/{point}: {row['status']} is neither measured nor failed")
    table = pq.read_table(directory / "points.parquet", columns=["session_id", "point_id", "status"]).to_pylist()
    times = Counter((row["session_id"], row["point_id"]) for row in table)
    found += [f"doubled: {point} is {count} times in points.parquet" for point, count in times.items() if count > 1]
    if times.keys() != rows.keys():
        found.append(f"points.parquet has {len(times)} points, the shards {len(rows)}")
    found += [
        f"measured again: {each.path.stem}" for each in kept
        if not each.path.exists() or each.path.read_bytes() != each.content
    ]  # fmt: skip
    found += [f"temporary file: {path}" for path in directory.rglob("*.tmp")]
    return found


def repeated(directory: Path, told: str, losing: bool) -> list[str]:
    """Return what was measured twice, or for nothing, though the store does not show it.

    `told` are the lines of `tests.chaos.standin.tell`, in their order. `losing`: something was done to the run that may
    cost a measurement which had just ended: whoever measured it or was to keep it was killed or stopped, say.
    """
    found = []
    kept: dict[tuple[str, str], int] = {}
    measured: Counter[tuple[str, str, int]] = Counter()
    ever_kept = set()
    for line in told.splitlines():
        what, session, point, number = line.split()
        attempt, key = int(number), (session, point)
        if what == "begun" and attempt >= kept.get(key, attempt + 1):  # one of before is an actor's that was given up
            found.append(f"measured again: {point} of {session} in start {attempt}, which start {kept[key]} had kept")
        elif what == "measured":
            measured[session, point, attempt] += 1
        elif what == "kept":
            kept[key] = attempt
            ever_kept.add((session, point, attempt))
        elif what == "halved":
            kept.pop(key, None)
    found += [f"measured {n} times in start {key[2]}: {key[1]} of {key[0]}" for key, n in measured.items() if n > 1]
    if not losing:
        found += [
            f"measured for nothing: {key[1]} of {key[0]} in start {key[2]}" for key in measured.keys() - ever_kept
        ]
    for path in _shards(directory):
        row = _row(path)
        key = (path.parent.name, path.stem, row.get("attempt"))
        if row.get("status") == MEASURED and key not in measured:
            found.append(f"measured by nobody: {key[1]} of {key[0]} in start {key[2]}")
    return found


def statuses(directory: Path) -> Counter[str]:
    """Return how many points ended how: `measured`, or the class of the failure."""
    rows = [_row(path) for path in _shards(directory)]
    return Counter(str(row.get("failure_class") or row.get("status")) for row in rows)


def starts(directory: Path) -> Counter[str]:
    """Return how many points were of servers that were started how: `warm`, `cold`, or none ever was."""
    return Counter(str(_row(path).get("start") or "none") for path in _shards(directory))


def _shards(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("shards/*/*.parquet") if path.name != "session.parquet")


def _row(path: Path) -> dict[str, object]:
    names = ["session_id", "point_id", "attempt", "status", "failure_class", "failure_message", "start"]
    try:
        rows = pq.read_table(path, columns=names).to_pylist()
    except (OSError, ValueError):
        return {}
    return rows[0] if len(rows) == 1 else {}
