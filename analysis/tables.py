"""Shards in, flat Parquet tables out, and the tables back as typed rows. Source of every other artifact.

A shard is only ever read as Parquet against the schema of `contract.rows`, in which columns that an older version did
not have are empty; anything else stops the analysis by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from analysis.errors import AnalysisError, first_line
from analysis.files import write_with
from analysis.manifest import read_configs
from contract.rows import SCHEMA_VERSION, MemoryAccount, PointRow, SessionRow, arrow_schema

if TYPE_CHECKING:
    import pandas as pd

NESTED = ("requests", "telemetry", "server_samples")
"""Lists in a point's row, each a table of its own."""
IDS = ("run_id", "session_id", "point_id", "simulated")
"""What a row of such a table carries of its point."""
REQUIRED = {
    PointRow: ("schema_version", "run_id", "session_id", "point_id", "kind", "purpose", "status", "simulated"),
    SessionRow: ("schema_version", "run_id", "session_id", "status", "simulated"),
}
IDENTITY = {PointRow: ("session_id", "point_id"), SessionRow: ("session_id",)}
"""Rows that agree in these are attempts at the same thing: the last one counts."""


@dataclass(slots=True)
class RunPoint(PointRow):
    """A row of points.parquet: a `PointRow` (its nested lists left in their own tables) and its session's figures.

    Those of the session's last attempt, also for a point that an earlier one measured.
    """

    node: str | None = None
    ready_s: float | None = None
    stop_s: float | None = None
    memory_back_s: float | None = None
    mem_after_stop_bytes: int | None = None
    goodput_qps: float | None = None
    """Not in any file: it hangs on the objectives (`analysis.goodput`)."""
    anchor_drift: float | None = None
    """Not in any file: it follows from the session's other rows (`analysis.anchors`)."""


FROM_SESSION = ("node", "ready_s", "stop_s", "memory_back_s", "mem_after_stop_bytes")
DERIVED = ("goodput_qps", "anchor_drift")
POINTS_SCHEMA = pa.schema([column for column in arrow_schema(RunPoint) if column.name not in (*NESTED, *DERIVED)])


def _absent(row_class: type) -> dict[str, Any]:
    """Return what stands in each column that an older version may lack: nothing, or an empty list."""
    columns = fields(row_class)
    values = {c.name: c.default if c.default_factory is MISSING else c.default_factory() for c in columns}
    return {name: value for name, value in values.items() if value is None or value == []}


ABSENT = {PointRow: _absent(RunPoint), SessionRow: _absent(SessionRow)}


@dataclass(frozen=True, slots=True)
class Tables:
    """The rows of one run, in a fixed order, and what they were planned from."""

    points: tuple[RunPoint, ...]
    sessions: tuple[SessionRow, ...]
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Content of config.json of each session's model, by session id; the manifest's, so it may be missing."""


def build_tables(run_dir: Path) -> list[Path]:
    """Write points.parquet, one table of each nested list and sessions.parquet from the shards; return the paths.

    Without shards nothing is written: a run that was sent with its tables alone is used as it is.
    """
    folders = _folders(run_dir)
    points, sessions = _read_shards(folders)
    if not points and not sessions:
        if not (run_dir / "points.parquet").is_file():
            raise AnalysisError(f"{run_dir}: no shards/SESSION/*.parquet and no points.parquet, so nothing to analyse")
        return []
    nested_schema = arrow_schema(PointRow)
    whole = pa.concat_tables(points) if points else arrow_schema(RunPoint).empty_table()
    tables = {
        "points": whole.select(POINTS_SCHEMA.names),
        **{name: _flatten(whole, name, nested_schema) for name in NESTED},
        "sessions": pa.concat_tables(sessions) if sessions else arrow_schema(SessionRow).empty_table(),
    }
    return [_write(run_dir / f"{name}.parquet", table) for name, table in tables.items()]


def read_tables(run_dir: Path) -> Tables:
    """Return the rows of points.parquet and sessions.parquet (which may be missing), each by its last attempt.

    With them come the models' configs, where the run has its manifest.
    """
    points = _rows(run_dir / "points.parquet", POINTS_SCHEMA, PointRow)
    sessions_path = run_dir / "sessions.parquet"
    sessions = _rows(sessions_path, arrow_schema(SessionRow), SessionRow) if sessions_path.is_file() else []
    return Tables(
        tuple(RunPoint(**row) for row in points), tuple(_session(row) for row in sessions), read_configs(run_dir)
    )


def _session(row: dict[str, Any]) -> SessionRow:
    return SessionRow(**row | {"account": [MemoryAccount(**account) for account in row["account"] or []]})


def _rows(path: Path, schema: pa.Schema, row_class: type) -> list[dict[str, Any]]:
    table = _last_attempts(_checked(path, schema, row_class), row_class)
    ids = _ids(table, row_class)
    if len(set(ids)) != len(ids):
        raise AnalysisError(f"{path}: holds a {'point' if row_class is PointRow else 'session'} twice")
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _ids(table: pa.Table, row_class: type) -> list[tuple[str, ...]]:
    return list(zip(*(table.column(name).to_pylist() for name in IDENTITY[row_class]), strict=True))


def _last_attempts(table: pa.Table, row_class: type) -> pa.Table:
    """Return the rows without those that a later attempt replaced."""
    ids, attempts = _ids(table, row_class), [attempt or 0 for attempt in table.column("attempt").to_pylist()]
    last: dict[tuple[str, ...], int] = {}
    for key, attempt in zip(ids, attempts, strict=True):
        last[key] = max(attempt, last.get(key, attempt))
    kept = [attempt == last[key] for key, attempt in zip(ids, attempts, strict=True)]
    return table.filter(pa.array(kept, pa.bool_()))


def frame(run_dir: Path | str, name: str) -> pd.DataFrame:
    """Return one of a run's tables (`points`, `requests`, …) as a pandas frame, for notebooks."""
    import pandas as pd

    return pd.read_parquet(Path(run_dir) / f"{name}.parquet")


def _folders(run_dir: Path) -> list[Path]:
    if not run_dir.is_dir():
        raise AnalysisError(f"{run_dir}: no such run directory")
    shards = run_dir / "shards"
    return sorted(folder for folder in shards.iterdir() if folder.is_dir()) if shards.is_dir() else []


def _read_shards(folders: list[Path]) -> tuple[list[pa.Table], list[pa.Table]]:
    points: list[pa.Table] = []
    sessions: list[pa.Table] = []
    for folder in folders:
        session_path = folder / "session.parquet"
        session = _shard(session_path, SessionRow) if session_path.is_file() else None
        if session is not None:
            sessions.append(session)
        for path in sorted(folder.glob("[!.]*.parquet")):
            if path != session_path:
                points.append(_with_session(_shard(path, PointRow), session))
    return points, sessions


def _shard(path: Path, row_class: type) -> pa.Table:
    """Read a shard whose ids are those of its path: a copy under another name would be counted twice."""
    table = _last_attempts(_checked(path, _schema(row_class), row_class), row_class)
    if table.num_rows != 1:
        raise AnalysisError(f"{path}: a shard holds one row (and earlier attempts at it), not {table.num_rows}")
    where = {"session_id": path.parent.name} | ({"point_id": path.stem} if row_class is PointRow else {})
    for column, expected in where.items():
        found = table.column(column)[0].as_py()
        if found != expected:
            raise AnalysisError(f"{path}: holds {column} {found!r}, so it is not the shard its path says")
    return table


@cache
def _schema(row_class: type) -> pa.Schema:
    return arrow_schema(row_class)


def _checked(path: Path, schema: pa.Schema, row_class: type) -> pa.Table:
    """Read a Parquet file and hold it against the schema; anything that does not fit is an `AnalysisError`."""
    try:
        table = pq.ParquetFile(path).read()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise AnalysisError(f"{path}: not a readable Parquet file ({first_line(error)})") from error
    versions = set(table.column("schema_version").to_pylist()) if "schema_version" in table.column_names else {None}
    if not all(isinstance(version, int) and version <= SCHEMA_VERSION for version in versions):
        found = ", ".join(sorted("none" if version is None else str(version) for version in versions))
        raise AnalysisError(f"{path}: schema version {found}, this analysis reads versions up to {SCHEMA_VERSION}")
    if SCHEMA_VERSION not in versions:
        table = _with_later_columns(table, schema, ABSENT[row_class])
    missing = sorted(set(schema.names) - set(table.column_names))
    unknown = sorted(set(table.column_names) - set(schema.names))
    if missing or unknown:
        raise AnalysisError(
            f"{path}: columns are not those of schema version {SCHEMA_VERSION}"
            f" (missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'})"
        )
    try:
        table = table.select(schema.names).cast(schema)
    except (pa.ArrowException, ValueError) as error:
        raise AnalysisError(f"{path}: a column has another type ({first_line(error)})") from error
    for column in REQUIRED[row_class]:
        if table.column(column).null_count:
            raise AnalysisError(f"{path}: {column} is empty")
    return table


def _with_later_columns(table: pa.Table, schema: pa.Schema, absent: dict[str, Any]) -> pa.Table:
    for column in schema:
        if column.name in absent and column.name not in table.column_names:
            table = table.append_column(column, pa.array([absent[column.name]] * table.num_rows, column.type))
    return table


def _with_session(point: pa.Table, session: pa.Table | None) -> pa.Table:
    for name in FROM_SESSION:
        kind = POINTS_SCHEMA.field(name).type
        value: Any = session.column(name).combine_chunks() if session is not None else pa.nulls(1, kind)
        point = point.append_column(pa.field(name, kind), value)
    return point


def _flatten(points: pa.Table, column: str, schema: pa.Schema) -> pa.Table:
    """Return one row per element of a list column, with the ids of its point before it."""
    lists = points.column(column).combine_chunks()
    parents = pc.list_parent_indices(lists)
    elements = pc.list_flatten(lists)
    item = schema.field(column).type.value_type
    arrays = [points.column(name).combine_chunks().take(parents) for name in IDS]
    arrays += [pc.struct_field(elements, [index]) for index in range(item.num_fields)]
    names = [*IDS, *(item.field(index).name for index in range(item.num_fields))]
    return pa.Table.from_arrays(arrays, names=names)


def _write(path: Path, table: pa.Table) -> Path:
    return write_with(path, lambda temporary: pq.write_table(table, temporary))
