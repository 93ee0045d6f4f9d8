"""Who else was on a session's cards: by window, over its whole life, and after its server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.rows.shards import build_tables
from analysis.rows.tables import read_tables
from contract.rows import MEASURED, SCHEMA_VERSION, SessionRow, to_table
from tests import synthetic_run as synthetic
from workers.devices.base import Card, CardProcess, LostDevice
from workers.strangers import Strangers

MIB = 2**20
OWN = CardProcess("GPU-0", 1, 900 * MIB, ours=True)
EARLY = CardProcess("GPU-0", 7, 300 * MIB, ours=False)
LATE = CardProcess("GPU-0", 8, 200 * MIB, ours=False)


class Cards(LostDevice):
    """Two cards that tell who is on them now."""

    def __init__(self) -> None:
        super().__init__("")
        self.cards = [Card(f"GPU-{n}", "pretended", 2**30) for n in (0, 1)]
        self.here: list[CardProcess] = []

    def processes(self, pid: int | None) -> list[CardProcess]:
        return list(self.here)


def strangers(*before: CardProcess) -> tuple[Strangers, SessionRow, Cards]:
    """Return those of a session before whose server these were there."""
    cards, row = Cards(), SessionRow(SCHEMA_VERSION, "run", "s", 1, MEASURED, False, "")
    cards.here = list(before)
    made = Strangers(cards, row)
    made.look_before()
    return made, row, cards


def words(*processes: CardProcess) -> list[str]:
    return sorted(map(str, processes))


@pytest.mark.parametrize(
    ("before", "looks", "named"),
    [
        ([EARLY], [[OWN]], []),
        ([EARLY], [[OWN, EARLY], [OWN, LATE]], [EARLY, LATE]),
        ([], [[OWN, LATE]], [LATE]),
        ([], [[OWN]], []),
        ([], [[LATE]], None),
        ([EARLY], [[LATE, EARLY]], [EARLY]),
        ([EARLY], [[LATE]], None),
        ([EARLY], [], None),
    ],
    ids=["gone", "stayed, and another", "came", "nobody", "own unseen", "own unseen, known", "gone or not", "no look"],
)
def test_a_window_names_who_was_seen_in_it(
    before: list[CardProcess], looks: list[list[CardProcess]], named: list[CardProcess] | None
) -> None:
    made, row, _ = strangers(*before)
    made.saw(looks)
    assert made.in_window(looks) == (None if named is None else words(*named))
    told = {str(process) for process in (*before, *(named or ()))}
    assert row.foreign_processes == (sorted(told) if told or named is not None else None)


def test_a_memory_reading_rests_on_the_looks_at_the_start_and_a_level_does_not() -> None:
    made, row, cards = strangers(EARLY)
    cards.here = [OWN, LATE]
    made.look_at_ready(1)
    window = [[OWN]]
    made.saw(window)
    assert made.in_memory(window) == row.foreign_processes == words(EARLY, LATE)
    assert made.in_window(window) == []


def test_a_process_that_was_the_servers_once_is_no_strangers_later() -> None:
    """It can end after NVML has named it and before the server's tree is read."""
    made, row, _ = strangers()
    worker, ended = (CardProcess("GPU-0", 2, 2**30, ours=ours) for ours in (True, False))
    looks = [[OWN, worker], [OWN, ended, LATE]]
    made.saw(looks)
    assert made.in_window(looks) == row.foreign_processes == words(LATE)
    assert made.in_window([[ended]]) == []


def test_a_stranger_that_grows_is_named_once_with_the_most_it_held() -> None:
    made, row, _ = strangers()
    made.saw([[OWN, LATE]])
    made.saw([[OWN, CardProcess("GPU-0", 8, 500 * MIB, ours=False)], [OWN, LATE]])
    assert row.foreign_processes == ["pid 8 on GPU-0: 500 MiB"]


def test_what_a_stranger_holds_after_the_stop_is_its_own() -> None:
    grown = CardProcess("GPU-0", 7, 800 * MIB, ours=False)
    elsewhere = CardProcess("GPU-1", 8, 100 * MIB, ours=False)
    made, row, cards = strangers(EARLY)
    made.saw([[OWN]])
    ended = CardProcess("GPU-1", OWN.pid, 50 * MIB, ours=False)
    cards.here = [grown, elsewhere, ended]
    made.look_after(1, [510 * MIB, 70 * MIB])
    assert row.left_processes == words(grown, elsewhere)
    assert row.mem_left_to_others_bytes == 570 * MIB  # no more of a card than is left on it
    assert row.foreign_processes == words(grown, elsewhere)


def test_what_nobody_else_holds_is_the_servers() -> None:
    made, row, cards = strangers(EARLY)
    made.saw([[OWN, EARLY]])
    cards.here = [EARLY]
    made.look_after(1, [700 * MIB, 0])
    assert (row.left_processes, row.mem_left_to_others_bytes) == (words(EARLY), 0)


def test_of_a_server_that_was_never_seen_at_work_nobody_tells_whose_memory_is_left() -> None:
    """It did not get ready: what is left could be its own process, which does not end."""
    made, row, cards = strangers()
    cards.here = [LATE]
    made.look_after(1, [200 * MIB, 0])
    assert (row.left_processes, row.mem_left_to_others_bytes, row.foreign_processes) == (None, None, None)


def test_a_process_that_was_seen_in_its_tree_stays_its_own_when_that_has_ended() -> None:
    """As of a start that failed while the process lived, and did not end with it."""
    made, row, cards = strangers()
    cards.here = [OWN, LATE]
    made.look(OWN.pid)
    cards.here = [replace(OWN, ours=False), LATE]
    made.look_after(OWN.pid, [200 * MIB, 0])
    assert row.left_processes == words(LATE)


def test_where_its_own_processes_are_not_seen_nobody_tells_whose_memory_is_left() -> None:
    made, row, cards = strangers()
    cards.here = [LATE]
    made.look_at_ready(1)
    made.look_after(1, [200 * MIB, 0])
    assert (row.left_processes, row.mem_left_to_others_bytes, row.foreign_processes) == (None, None, None)


def test_memory_that_is_not_told_is_no_memory_of_zero() -> None:
    made, row, cards = strangers()
    made.saw([[OWN]])
    cards.here = [CardProcess("GPU-0", 8, None, ours=False)]
    made.look_after(1, [200 * MIB, 0])
    assert (row.left_processes, row.mem_left_to_others_bytes) == (["pid 8 on GPU-0: unknown memory"], None)


@pytest.mark.parametrize("seen", [None, [], ["pid 8 on GPU-0: 200 MiB"]])
def test_nobody_and_nobody_can_tell_stay_two_things_in_a_file(tmp_path: Path, seen: list[str] | None) -> None:
    run = synthetic.write_tables(tmp_path, synthetic.rows()[:1])
    session = replace(synthetic.session_of(synthetic.rows()[0]), foreign_processes=seen, left_processes=seen)
    pq.write_table(to_table([session], SessionRow), run / "sessions.parquet")
    (read,) = read_tables(run).sessions
    assert (read.foreign_processes, read.left_processes) == (seen, seen)


def test_rows_of_before_version_11_are_read_without_who_was_left(tmp_path: Path) -> None:
    run = synthetic.write_run(tmp_path, synthetic.rows()[:1], {synthetic.rows()[0].session_id: 700 * MIB})
    (shard,) = run.glob("shards/*/session.parquet")
    (content,) = pq.read_table(shard).to_pylist()
    del content["left_processes"], content["mem_left_to_others_bytes"]
    pq.write_table(pa.Table.from_pylist([content | {"schema_version": 10, "foreign_processes": ["pid 8"]}]), shard)
    build_tables(run)
    tables = read_tables(run)
    (session,), (point,) = tables.sessions, tables.points
    assert (session.foreign_processes, session.left_processes, point.left_processes) == (["pid 8"], None, None)
    assert (point.memory_left_bytes, point.memory_kept_bytes) == (700 * MIB, None)
