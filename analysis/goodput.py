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
import pyarrow.parquet as pq

from analysis.errors import AnalysisError, first_line
from analysis.tables import RunPoint, Tables
from analysis.targets import Slo


def with_goodput(run_dir: Path, tables: Tables, slo: Slo) -> Tables:
    """Return the tables with `goodput_qps` in every point of a load; as they are where there is no objective."""
    limits = {column: limit for column, limit in slo.limits().items() if limit is not None}
    path = run_dir / "requests.parquet"
    if not limits or not path.is_file():
        return tables
    try:
        requests = pq.read_table(path, columns=["session_id", "point_id", "ok", *limits])
    except (pa.ArrowException, OSError, ValueError) as error:
        raise AnalysisError(f"{path}: not a readable table of requests ({first_line(error)})") from error
    good = requests.column("ok")
    for column, limit in limits.items():
        met = pc.less_equal(requests.column(column), limit)
        good = pc.and_(good, pc.fill_null(met, column == "tpot_s"))  # an answer of one token has no TPOT to miss
    counted = (
        requests.append_column("good", pc.cast(good, pa.int64()))
        .group_by(["session_id", "point_id"])
        .aggregate([("good", "sum")])
    )
    sums = {(row["session_id"], row["point_id"]): row["good_sum"] for row in counted.to_pylist()}
    return replace(tables, points=_points(tables.points, sums))


def _points(points: Sequence[RunPoint], sums: dict[tuple[str, str], int]) -> tuple[RunPoint, ...]:
    return tuple(
        replace(point, goodput_qps=sums.get((point.session_id, point.point_id), 0) / point.duration_s)
        if point.kind == "load" and point.duration_s
        else point
        for point in points
    )
