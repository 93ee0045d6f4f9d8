"""Shards in, flat Parquet tables out. Called first of all: every other artifact comes from the tables.

Shards are read side by side, a few ahead of the one that is written, and tables grow by row groups: however many
requests a run has, only some of them are in memory.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from analysis.errors import AnalysisError
from analysis.rows.batches import column_names
from analysis.rows.tables import FROM_SESSION, IDS, NESTED, POINTS_SCHEMA, checked, last_attempts, row_schema
from analysis.writing.files import replacing
from contract.rows import PointRow, SessionRow

OF_POINT = ("session_id", "point_id")
"""Columns of every nested table, whatever its version."""
ROWS_OF_A_GROUP = 100_000
"""A table is written whenever so many rows have come together."""
READERS = min(4, os.cpu_count() or 1)
"""Threads that read shards."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Shard:
    """One point's shard, read: its row of points.parquet and, by name, its rows of each nested table."""

    row: pa.Table
    nested: dict[str, pa.Table]


def build_tables(run_dir: Path) -> list[Path]:
    """Write points.parquet, one table of each nested list and sessions.parquet from the shards; return the paths.

    Without shards nothing is written: a run that was sent with its tables alone is used as it is. Nor is anything where
    one shard cannot be read.
    """
    paths, sessions = _find(run_dir)
    if not paths and not sessions:
        if not (run_dir / "points.parquet").is_file():
            raise AnalysisError(f"{run_dir}: no shards/SESSION/*.parquet and no points.parquet, so nothing to analyse")
        _check_footers(run_dir)
        return []
    schemas = {"points": POINTS_SCHEMA, **{name: _nested_schema(name) for name in NESTED}}
    schemas["sessions"] = row_schema(SessionRow)
    written = {name: run_dir / f"{name}.parquet" for name in schemas}
    with ExitStack() as stack, ThreadPoolExecutor(READERS) as pool:
        files = {name: stack.enter_context(replacing(path)) for name, path in written.items()}
        tables = {name: stack.enter_context(GrowingTable(files[name], schemas[name])) for name in schemas}
        for session in sessions.values():
            tables["sessions"].add(session)
        for shard in _ahead(pool, lambda path: _read(path, sessions.get(path.parent)), paths):
            tables["points"].add(shard.row)
            for name in NESTED:
                tables[name].add(shard.nested[name])
    return list(written.values())


def _check_footers(run_dir: Path) -> None:
    """Refuse a nested table that was sent truncated or is another's, whether or not anything will be read from it."""
    for path in (run_dir / f"{name}.parquet" for name in NESTED):
        if path.is_file() and (missing := set(OF_POINT) - set(column_names(path))):
            raise AnalysisError(f"{path}: not a table of {path.stem} (no column {', '.join(sorted(missing))})")


class GrowingTable:
    """A Parquet file of one schema that is written a row group at a time."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        # Latencies hardly repeat: a dictionary or the bounds of their pages cost time and save nothing. Gaps lie close
        # together.
        strings = [column.name for column in schema if pa.types.is_string(column.type)]
        gaps = {f"{c.name}.list.element": "DELTA_BINARY_PACKED" for c in schema if c.type == pa.list_(pa.int64())}
        self._writer = pq.ParquetWriter(
            path, schema, use_dictionary=strings, write_statistics=strings, column_encoding=gaps or None
        )
        self._pending, self._rows = [schema.empty_table()], 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            self._write()
        self._writer.close()

    def add(self, table: pa.Table) -> None:
        """Take up rows of the file's schema."""
        self._pending.append(table)
        self._rows += table.num_rows
        if self._rows >= ROWS_OF_A_GROUP:
            self._write()

    def _write(self) -> None:
        self._writer.write_table(pa.concat_tables(self._pending))
        self._pending, self._rows = self._pending[:1], 0


def _ahead(pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield the results in the order of the items, at most two for each reader being made or waiting."""
    coming: deque[Future[Result]] = deque()
    try:
        for item in items:
            coming.append(pool.submit(work, item))
            if len(coming) >= 2 * READERS:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:
        for future in coming:
            future.cancel()


def _find(run_dir: Path) -> tuple[list[Path], dict[Path, pa.Table]]:
    """Return the shards of points in a fixed order, and the starts of each session folder that tells of them."""
    if not run_dir.is_dir():
        raise AnalysisError(f"{run_dir}: no such run directory")
    shards = run_dir / "shards"
    folders = sorted(folder for folder in shards.iterdir() if folder.is_dir()) if shards.is_dir() else []
    found = {folder: folder / "session.parquet" for folder in folders}
    sessions = {folder: _starts(path) for folder, path in found.items() if path.is_file()}
    paths = [p for folder in folders for p in sorted(folder.glob("[!.]*.parquet")) if p != found[folder]]
    return paths, sessions


def _read(path: Path, starts: pa.Table | None) -> Shard:
    point = _with_session(_point(path), starts)
    return Shard(point.select(POINTS_SCHEMA.names), {name: _flatten(point, name) for name in NESTED})


def _point(path: Path) -> pa.Table:
    """Read a point's shard."""
    table = last_attempts(checked(path, row_schema(PointRow), PointRow), PointRow)
    if table.num_rows != 1:
        raise AnalysisError(f"{path}: a shard holds one row (and earlier attempts at it), not {table.num_rows}")
    _is_of_its_path(path, table, session_id=path.parent.name, point_id=path.stem)
    return table


def _starts(path: Path) -> pa.Table:
    """Read a session's shard: a row of each of its starts."""
    table = checked(path, row_schema(SessionRow), SessionRow)
    attempts = table.column("attempt").to_pylist()
    if not attempts or len(set(attempts)) != len(attempts):
        raise AnalysisError(f"{path}: a session's shard holds one row a start, not those of starts {attempts}")
    _is_of_its_path(path, table, session_id=path.parent.name)
    return table


def _is_of_its_path(path: Path, table: pa.Table, **ids: str) -> None:
    """Refuse a shard whose ids are not those of its path: a copy under another name would be counted twice."""
    for column, expected in ids.items():
        for found in table.column(column).to_pylist():
            if found != expected:
                raise AnalysisError(f"{path}: holds {column} {found!r}, so it is not the shard its path says")


def _with_session(point: pa.Table, starts: pa.Table | None) -> pa.Table:
    """Add what is known of the server's start that measured the point: of no other start."""
    attempt = point.column("attempt")[0]
    own = starts.filter(pc.equal(starts.column("attempt"), attempt)) if starts is not None else None
    for name in FROM_SESSION:
        kind = POINTS_SCHEMA.field(name).type
        value: Any = own.column(name).combine_chunks() if own is not None and own.num_rows else pa.nulls(1, kind)
        point = point.append_column(pa.field(name, kind), value)
    return point


@cache
def _nested_schema(column: str) -> pa.Schema:
    """Return the schema of a nested list's own table: the ids of the point, then the fields of the list's rows."""
    point = row_schema(PointRow)
    item = point.field(column).type.value_type
    return pa.schema([*(point.field(name) for name in IDS), *(item.field(i) for i in range(item.num_fields))])


def _flatten(point: pa.Table, column: str) -> pa.Table:
    """Return one row per element of a list column of a table of one row, with the ids of the point before it."""
    chunks = point.column(column).chunks  # one, but for earlier attempts: joining it would copy every gap
    elements = (chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks)).flatten()
    ids = [pa.repeat(point.column(name)[0], len(elements)) for name in IDS]
    return pa.Table.from_arrays([*ids, *elements.flatten()], schema=_nested_schema(column))
