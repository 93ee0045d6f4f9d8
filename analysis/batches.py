"""Tables too long to be held: some columns of them, batch by batch, and sums by key."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from operator import add
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from analysis.errors import AnalysisError, first_line

BATCH_ROWS = 250_000


def read_batches(path: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield the columns of `schema`, in its types, at most `BATCH_ROWS` rows at once.

    Raises `AnalysisError` for a file that is no Parquet, lacks a column, or holds one that cannot be read as its type.
    """
    try:
        for batch in pq.ParquetFile(path).iter_batches(BATCH_ROWS, columns=schema.names):
            yield pa.Table.from_batches([batch]).select(schema.names).cast(schema)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise AnalysisError(f"{path}: not a table of {path.stem} ({first_line(error)})") from error


def sums(batches: Iterable[pa.Table], keys: Sequence[str], values: Sequence[str]) -> dict[tuple[Any, ...], list[Any]]:
    """Return the sums of the value columns (none of them null) by the values of the key columns."""
    totals: dict[tuple[Any, ...], list[Any]] = {}
    for batch in batches:
        added = batch.group_by(list(keys), use_threads=False).aggregate([(value, "sum") for value in values])
        columns = [added.column(name).to_pylist() for name in (*keys, *(f"{value}_sum" for value in values))]
        for row in zip(*columns, strict=True):
            key, more = row[: len(keys)], row[len(keys) :]
            totals[key] = list(map(add, totals.get(key, [0] * len(values)), more))
    return totals
