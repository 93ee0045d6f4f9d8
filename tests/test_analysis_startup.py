"""plots/startup.svg: phases of each start that told them, and nothing where none did."""

import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq

from analysis import reduce
from analysis.rows.tables import read_tables
from contract.rows import SessionRow, StartPhase, to_table
from tests import synthetic_run as synthetic

PHASES = [
    StartPhase("fork", 0.0, 0.2),
    StartPhase("engine", 0.2, 1.1),
    StartPhase("graphs", 1.3, 3.0),
    StartPhase("listening", 4.3, 1.2),
]


def write_run(run: Path, phases: list[StartPhase], **before: float) -> Path:
    rows = synthetic.rows()[:2]
    synthetic.write_run(run, rows)
    for row in rows:
        session = replace(synthetic.session_of(row), start="warm", phases=phases, **before)
        pq.write_table(to_table([session], SessionRow), run / "shards" / row.session_id / "session.parquet")
    return run


def test_a_start_is_shown_phase_by_phase_and_the_same_again(tmp_path: Path) -> None:
    run = write_run(tmp_path, PHASES)
    assert run / "plots/startup.svg" in reduce(run)
    words = "\n".join(ET.parse(run / "plots/startup.svg").getroot().itertext())
    for expected in ("512, committed, warm", "fork", "engine", "graphs", "listening", "5.5 s", "dummy weights"):
        assert expected in words
    assert "compile" not in words
    first = (run / "plots/startup.svg").read_bytes()
    reduce(run)
    assert (run / "plots/startup.svg").read_bytes() == first
    assert read_tables(run).sessions[0].phases == PHASES


def test_what_was_waited_and_lost_is_in_the_plot(tmp_path: Path) -> None:
    run = write_run(tmp_path, PHASES, warm_wait_s=16.1, fork_lost_s=30.0)
    reduce(run)
    words = "\n".join(ET.parse(run / "plots/startup.svg").getroot().itertext())
    for expected in ("wait for the import", "lost fork", "5.5 s"):
        assert expected in words


def test_logs_that_told_nothing_give_no_plot_and_an_old_one_goes(tmp_path: Path) -> None:
    run = write_run(tmp_path, [])
    (run / "plots").mkdir()
    (run / "plots/startup.svg").write_text("old")
    reduce(run)
    assert not (run / "plots/startup.svg").exists()
