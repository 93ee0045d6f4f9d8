"""The picture of the account: all of a server's memory, and once more what weights and pool dwarf."""

from __future__ import annotations

from dataclasses import replace

import pytest
from matplotlib.figure import Figure

from analysis.memory.account_plot import draw_account
from analysis.memory.kv_account import Accounts
from analysis.memory.kv_fit import kv_results
from tests import synthetic_run as synthetic

GIB = 2**30


def test_parts_and_the_residual_above_them_reach_the_cards_memory_in_both_panels() -> None:
    tables = synthetic.tables_of(row for row in synthetic.rows() if row.kind == "memory")
    (result,) = kv_results(tables.points)
    accounts, figure = Accounts(tables.sessions), Figure()
    draw_account(result, accounts, figure)
    whole, rest = figure.axes[:2], figure.axes[2:]
    series = [result.committed[0].series, result.capacity[0]]
    for above, below, one in zip(whole, rest, series, strict=True):
        ready = [account for reading in one.measured if (account := accounts.at(reading, "ready"))]
        for axes, without in ((above, ()), (below, ("weights", "kv"))):
            left = [account.used - sum(account.parts[part] or 0 for part in without) for account in ready]
            assert axes.lines[0].get_ydata() == pytest.approx([size / GIB for size in left])
            *parts, residual = axes.containers
            assert residual.get_label() == "residual"
            assert [bar.get_height() for bar in residual] == pytest.approx([a.residual / GIB for a in ready])
            tops = [bar.get_y() + bar.get_height() for bar in residual]
            assert tops == pytest.approx([size / GIB for size in left])
            assert [bar.get_y() for bar in residual] == pytest.approx(
                [sum(bar.get_height() for bar in bars) for bars in zip(*parts, strict=True)]
            )


def test_a_reading_has_the_account_of_its_own_start() -> None:
    tables = synthetic.tables_of(row for row in synthetic.rows() if row.kind == "memory")
    (result,) = kv_results(tables.points)
    reading = result.capacity[0].measured[0]
    later = [replace(session, attempt=session.attempt + 1, account=[]) for session in tables.sessions]
    known = Accounts(tables.sessions).at(reading, "ready")
    assert known is not None
    assert Accounts([*tables.sessions, *later]).at(reading, "ready") == known
    assert Accounts(later).at(reading, "ready") is None
