"""A run's tables as typed rows: the source of every artifact. `analysis.rows.shards` makes the tables.

A file is only ever read as Parquet against the schema of `contract.rows`, in which columns that an older version did
not have are empty and those that only it had are left out; anything else stops the analysis by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from analysis.errors import AnalysisError, first_line
from analysis.rows.manifest import Unfinished, read_configs, read_manifest, read_unfinished
from contract.rows import (
    SCHEMA_VERSION,
    AfterStop,
    ClientRow,
    InFlight,
    MemoryAccount,
    PointRow,
    SessionRow,
    StartPhase,
    arrow_schema,
)

if TYPE_CHECKING:
    import pandas as pd

NESTED = ("requests", "telemetry", "server_samples")
"""Lists in a point's row, each a table of its own."""
IDS = ("run_id", "session_id", "point_id", "simulated")
"""What a row of such a table carries of its point."""
IDENTITY = {PointRow: ("session_id", "point_id"), SessionRow: ("session_id", "attempt")}
"""Rows that agree in these are of one thing: of attempts at a point the last one counts, each start is a server."""


@dataclass(slots=True)
class RunPoint(PointRow, AfterStop):
    """A row of points.parquet: a `PointRow` (its nested lists left in their own tables) and its server's figures.

    Those of the session's attempt that measured it; none where nothing is known of that one.
    """

    node: str | None = None
    ready_s: float | None = None
    stop_s: float | None = None
    memory_back_s: float | None = None
    mem_after_stop_bytes: int | None = None
    left_processes: list[str] | None = None
    mem_left_to_others_bytes: int | None = None
    goodput_qps: float | None = None
    """Not in any file: it hangs on the objectives (`analysis.load.goodput`)."""
    anchor_drift: float | None = None
    """By what share of tok_s the session's anchor may have moved at most (`analysis.load.anchors`). Not in any file: it
    follows from the session's other rows."""
    anchor_drifted: float | None = None
    """By what share it did, where that is a drift. The same."""


FROM_SESSION = (
    "node", "ready_s", "stop_s", "memory_back_s", "mem_after_stop_bytes", "left_processes", "mem_left_to_others_bytes",
)  # fmt: skip
DERIVED = ("goodput_qps", "anchor_drift", "anchor_drifted")
POINTS_SCHEMA = pa.schema([column for column in arrow_schema(RunPoint) if column.name not in (*NESTED, *DERIVED)])


def _required(row_class: type) -> tuple[str, ...]:
    """Return the columns that no row leaves empty: those of a plain type, of which None is no value."""
    hints = get_type_hints(row_class)
    return tuple(column.name for column in fields(row_class) if hints[column.name] in (str, int, bool, float))


def _absent(row_class: type) -> dict[str, Any]:
    """Return what stands in each column that an older version may lack: nothing, or an empty list."""
    columns = fields(row_class)
    values = {c.name: c.default if c.default_factory is MISSING else c.default_factory() for c in columns}
    return {name: value for name, value in values.items() if value is None or value == []}


DROPPED = {PointRow: ["telemetry_cost_share"], SessionRow: []}
"""Columns that older versions had and this one has not: what they held has no place in it."""
REQUIRED = {PointRow: _required(PointRow), SessionRow: _required(SessionRow)}
ABSENT = {PointRow: _absent(RunPoint), SessionRow: _absent(SessionRow)}


@dataclass(frozen=True, slots=True)
class Tables:
    """The rows of one run, in a fixed order, and what they were planned from."""

    points: tuple[RunPoint, ...]
    sessions: tuple[SessionRow, ...]
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Content of config.json of each session's model, by session id; the manifest's, so it may be missing."""
    missing: tuple[str, ...] = ()
    """Which of `sessions.parquet` and `manifest.json` the run does not hold: much may rest on them."""
    unfinished: Unfinished | None = None
    """What was planned of a run that is not known to have come to its end."""

    @property
    def planned_without_row(self) -> int:
        """How many points an unfinished run planned from the start and has no row of."""
        if self.unfinished is None:
            return 0
        return len(self.unfinished.planned - {(point.session_id, point.point_id) for point in self.points})


def read_tables(run_dir: Path) -> Tables:
    """Return the rows of points.parquet and sessions.parquet (which may be missing), each by its last attempt.

    With them come the models' configs and what an unfinished run planned, where the run has its manifest.
    """
    points = _rows(run_dir / "points.parquet", POINTS_SCHEMA, PointRow)
    sessions_path = run_dir / "sessions.parquet"
    sessions = _rows(sessions_path, arrow_schema(SessionRow), SessionRow) if sessions_path.is_file() else []
    missing = [] if sessions_path.is_file() else [sessions_path.name]
    missing += [] if read_manifest(run_dir) else ["manifest.json"]
    return Tables(
        tuple(_point(row) for row in points),
        tuple(_session(row) for row in sessions),
        read_configs(run_dir),
        tuple(missing),
        read_unfinished(run_dir),
    )


def run_point(row: PointRow) -> RunPoint:
    """Return a row that no file holds yet, without figures of its server: those are of a session that has ended."""
    return RunPoint(**{column.name: getattr(row, column.name) for column in fields(PointRow)})


def _point(row: dict[str, Any]) -> RunPoint:
    clients = [ClientRow(**client) for client in row["clients"] or []]
    for client in clients:
        client.in_flight = [InFlight(**moment) for moment in client.in_flight or ()]  # type: ignore[arg-type]
    return RunPoint(**row | {"clients": clients})


def _session(row: dict[str, Any]) -> SessionRow:
    account = [MemoryAccount(**account) for account in row["account"] or []]
    phases = [StartPhase(**phase) for phase in row["phases"] or []]
    return SessionRow(**row | {"account": account, "phases": phases})


def _rows(path: Path, schema: pa.Schema, row_class: type) -> list[dict[str, Any]]:
    table = last_attempts(checked(path, schema, row_class), row_class)
    ids = _ids(table, row_class)
    if len(set(ids)) != len(ids):
        raise AnalysisError(f"{path}: holds a {'point' if row_class is PointRow else 'start of a session'} twice")
    rows: list[dict[str, Any]] = _numbers(table).to_pylist()
    return rows


def _numbers(table: pa.Table) -> pa.Table:
    """Return the rows with nothing where a number is none: NaN is not a value, nor infinity but of a bucket's bound."""
    for index, column in enumerate(table.schema):
        if column.type == pa.float64():
            values = table.column(index)
            known = pc.invert(pc.is_nan(values)) if column.name.endswith("_le_s") else pc.is_finite(values)
            table = table.set_column(index, column, pc.if_else(known, values, None))
    return table


def _ids(table: pa.Table, row_class: type) -> list[tuple[Any, ...]]:
    return list(zip(*(table.column(name).to_pylist() for name in IDENTITY[row_class]), strict=True))


def last_attempts(table: pa.Table, row_class: type) -> pa.Table:
    """Return the rows without those that a later attempt replaced."""
    ids, attempts = _ids(table, row_class), [attempt or 0 for attempt in table.column("attempt").to_pylist()]
    last: dict[tuple[Any, ...], int] = {}
    for key, attempt in zip(ids, attempts, strict=True):
        last[key] = max(attempt, last.get(key, attempt))
    kept = [attempt == last[key] for key, attempt in zip(ids, attempts, strict=True)]
    return table if all(kept) else table.filter(pa.array(kept, pa.bool_()))


def frame(run_dir: Path | str, name: str) -> pd.DataFrame:
    """Return one of a run's tables (`points`, `requests`, …) as a pandas frame, for notebooks."""
    import pandas as pd

    return pd.read_parquet(Path(run_dir) / f"{name}.parquet")


@cache
def row_schema(row_class: type) -> pa.Schema:
    """Return `arrow_schema`, made once."""
    return arrow_schema(row_class)


def checked(path: Path, schema: pa.Schema, row_class: type) -> pa.Table:
    """Read a Parquet file and hold it against the schema; anything that does not fit is an `AnalysisError`."""
    try:
        table = pq.ParquetFile(path).read(use_threads=False)  # shards are read side by side
    except (pa.ArrowException, OSError, ValueError) as error:
        raise AnalysisError(f"{path}: not a readable Parquet file ({first_line(error)})") from error
    versions = _versions(table)
    if not all(isinstance(version, int) and version <= SCHEMA_VERSION for version in versions):
        found = ", ".join(sorted("none" if version is None else str(version) for version in versions))
        raise AnalysisError(f"{path}: schema version {found}, this analysis reads versions up to {SCHEMA_VERSION}")
    if SCHEMA_VERSION not in versions:
        table = table.drop_columns([name for name in DROPPED[row_class] if name in table.column_names])
        table = _with_later_columns(table, schema, ABSENT[row_class])
    missing = sorted(set(schema.names) - set(table.column_names))
    unknown = sorted((Counter(table.column_names) - Counter(schema.names)).elements())
    if missing or unknown:
        raise AnalysisError(
            f"{path}: columns are not those of schema version {SCHEMA_VERSION}"
            f" (missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'})"
        )
    try:
        table = table.select(schema.names)
        table = table if table.schema == schema else table.cast(schema)
    except (pa.ArrowException, ValueError) as error:
        raise AnalysisError(f"{path}: a column has another type ({first_line(error)})") from error
    for column in REQUIRED[row_class]:
        if table.column(column).null_count:
            raise AnalysisError(f"{path}: {column} is empty")
    return table


def _versions(table: pa.Table) -> set[int | None]:
    """Return the schema versions of the rows; None for a row that has none, or a file without such a column."""
    index = table.schema.get_field_index("schema_version")  # -1 also where two columns bear the name
    if index < 0 or not pa.types.is_integer(table.schema.field(index).type):
        return {None}
    return set(table.column(index).to_pylist())


def _with_later_columns(table: pa.Table, schema: pa.Schema, absent: dict[str, Any]) -> pa.Table:
    for column in schema:
        if column.name in absent and column.name not in table.column_names:
            table = table.append_column(column, pa.array([absent[column.name]] * table.num_rows, column.type))
    return table


def moment(stamp: str | None) -> float | None:
    """Return a row's time stamp as seconds since the epoch; None for one that is missing or none."""
    try:
        read = datetime.fromisoformat(stamp or "")
    except ValueError:
        return None
    return (read if read.tzinfo else read.replace(tzinfo=UTC)).timestamp()
