"""Tables that are longer than memory: written by row groups in the order of their shards, added up in batches."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.rows import batches, shards
from analysis.rows.batches import read_batches, totals_of
from tests import synthetic_run as synthetic

ROWS = st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 2), st.integers(-9, 9)), max_size=30)


def test_requests_come_in_row_groups_and_in_the_order_of_their_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "ROWS_OF_A_GROUP", 100)
    rows = [row for row in synthetic.rows() if row.kind == "load"]
    shards.build_tables(synthetic.write_run(tmp_path, rows))
    file = pq.ParquetFile(tmp_path / "requests.parquet")
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert all(size >= 100 for size in sizes[:-1])
    assert max(sizes) < 100 + max(len(row.requests) for row in rows)
    ordered = sorted(rows, key=lambda row: (row.session_id, f"{row.point_id}.parquet"))
    expected = [(row.point_id, request.ordinal, request.e2e_s) for row in ordered for request in row.requests]
    found = file.read().to_pydict()
    assert list(zip(found["point_id"], found["ordinal"], found["e2e_s"], strict=True)) == expected


def test_results_keep_their_order_and_few_are_held() -> None:
    held = most = 0
    lock = threading.Lock()

    def work(number: int) -> int:
        nonlocal held, most
        with lock:
            held += 1
            most = max(most, held)
        return number

    with ThreadPoolExecutor(shards.READERS) as pool:
        for number, result in enumerate(shards._ahead(pool, work, range(200))):
            assert number == result
            with lock:
                held -= 1
    assert most <= 2 * shards.READERS


def test_an_unreadable_shard_ends_it_before_anything_is_replaced(tmp_path: Path) -> None:
    run = synthetic.write_run(tmp_path, synthetic.rows())
    shards.build_tables(run)
    before = {path: path.read_bytes() for path in run.glob("*.parquet")}
    last = max((run / "shards/session-load").glob("*.parquet"), key=lambda path: path.name)
    last = last if last.name != "session.parquet" else min((run / "shards/session-load").glob("*.parquet"))
    last.write_bytes(b"PAR1")
    with pytest.raises(shards.AnalysisError):
        shards.build_tables(run)
    assert {path: path.read_bytes() for path in run.glob("*.parquet")} == before
    assert not list(run.glob(".*.tmp"))


@given(ROWS, st.integers(1, 7))
def test_aggregates_do_not_hang_on_the_batches(rows: list[tuple[str, int, int]], size: int) -> None:
    table = pa.table(
        {name: pa.array(values, kind) for name, values, kind in zip(
            ("k", "l", "v"), zip(*rows, strict=True) if rows else ([], [], []), (pa.string(), pa.int64(), pa.int64()),
            strict=True,
        )}
    )  # fmt: skip
    expected: dict[tuple[str, int], tuple[int, ...]] = {}
    for key in {(k, l_) for k, l_, _ in rows}:
        values = [v for k, l_, v in rows if (k, l_) == key]
        expected[key] = (sum(values), len(values), min(values), max(values))
    parts = [table.slice(start, size) for start in range(0, table.num_rows, size)]
    assert totals_of(parts, ["k", "l"], [("v", how) for how in ("sum", "count", "min", "max")]) == expected


def test_a_table_is_read_in_batches_of_the_types_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "BATCH_ROWS", 10)
    pq.write_table(pa.table({"t": pa.array(range(25), pa.int32()), "other": ["x"] * 25}), tmp_path / "t.parquet")
    schema = pa.schema([("t", pa.float64())])
    read = list(read_batches(tmp_path / "t.parquet", schema))
    assert [batch.num_rows for batch in read] == [10, 10, 5]
    assert pa.concat_tables(read) == pa.table({"t": pa.array(range(25), pa.float64())})
