"""Goodput: successes a second that met every service level objective, from the requests themselves.

A request meets an objective with its own latency, as in `vllm bench serve --goodput`; that 95 % of them do is what the
objective asks of the level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from analysis.rows.batches import read_batches, totals_of
from analysis.rows.tables import RunPoint, Tables
from analysis.rows.targets import Slo


def with_goodput(run_dir: Path, tables: Tables, slo: Slo) -> Tables:
    """Return the tables with `goodput_qps` in every point of a load that has rows of its requests; as they are where
    there is no objective."""
    limits = {column: limit for column, limit in slo.limits().items() if limit is not None}
    path = run_dir / "requests.parquet"
    if not limits or not path.is_file():
        return tables
    ids = ["session_id", "point_id"]
    schema = pa.schema(
        [*((name, pa.string()) for name in ids), ("ok", pa.bool_()), *((c, pa.float64()) for c in limits)]
    )
    good = totals_of((_with_good(batch, limits) for batch in read_batches(path, schema)), ids, [("good", "sum")])
    return replace(tables, points=_points(tables.points, {key: number for key, (number,) in good.items()}))


def _with_good(requests: pa.Table, limits: dict[str, float]) -> pa.Table:
    """Return the requests with a column `good`: one for each success that met every limit, else nothing."""
    good = pc.fill_null(requests.column("ok"), False)
    for column, limit in limits.items():
        met = pc.less_equal(requests.column(column), limit)
        good = pc.and_(good, pc.fill_null(met, column == "tpot_s"))  # an answer of one token has no TPOT to miss
    return requests.append_column("good", pc.cast(good, pa.int64()))


def _points(points: Sequence[RunPoint], good: dict[tuple[str, ...], int]) -> tuple[RunPoint, ...]:
    return tuple(
        replace(point, goodput_qps=good[point.session_id, point.point_id] / point.duration_s)
        if point.duration_s and (point.session_id, point.point_id) in good
        else point
        for point in points
    )
