"""Tables too long to be held: some columns of them, batch by batch, and what their rows add up to by key."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import add
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from analysis.errors import AnalysisError, first_line

BATCH_ROWS = 250_000
MERGE: dict[str, Callable[[Any, Any], Any]] = {"sum": add, "count": add, "min": min, "max": max}

Values: TypeAlias = tuple[Any, ...]
Totals: TypeAlias = dict[tuple[Any, ...], Values]


def column_names(path: Path) -> list[str]:
    """Return the columns of a table, from its footer alone; raises `AnalysisError` for a file that has none."""
    try:
        return [column.name for column in pq.read_schema(path)]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise AnalysisError(f"{path}: not a table of {path.stem} ({first_line(error)})") from error


def read_batches(path: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield the columns of `schema`, in its types, at most `BATCH_ROWS` rows at once.

    Raises `AnalysisError` for a file that is no Parquet, lacks a column, or holds one that cannot be read as its type.
    """
    try:
        for batch in pq.ParquetFile(path).iter_batches(BATCH_ROWS, columns=schema.names):
            yield pa.Table.from_batches([batch]).select(schema.names).cast(schema)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise AnalysisError(f"{path}: not a table of {path.stem} ({first_line(error)})") from error


def add_up(totals: Totals, batch: pa.Table, keys: Sequence[str], asked: Sequence[tuple[str, str]]) -> None:
    """Merge the aggregates of a batch into `totals`, which hold them by the values of the key columns.

    `asked`: column and `sum`, `count`, `min` or `max`; a column holds no nulls.
    """
    added = batch.group_by(list(keys), use_threads=False).aggregate(list(asked))
    columns = [added.column(name).to_pylist() for name in (*keys, *(f"{column}_{how}" for column, how in asked))]
    for row in zip(*columns, strict=True):
        key, more = row[: len(keys)], row[len(keys) :]
        known = totals.get(key)
        totals[key] = more if known is None else merged(known, more, [how for _, how in asked])


def merged(one: Values, other: Values, hows: Sequence[str]) -> Values:
    """Return the aggregates of two parts together."""
    return tuple(MERGE[how](a, b) for a, b, how in zip(one, other, hows, strict=True))


def totals_of(batches: Iterable[pa.Table], keys: Sequence[str], asked: Sequence[tuple[str, str]]) -> Totals:
    """Return the aggregates of all batches together (`add_up`)."""
    totals: Totals = {}
    for batch in batches:
        add_up(totals, batch, keys, asked)
    return totals
