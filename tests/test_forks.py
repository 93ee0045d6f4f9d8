"""After how many forks in vain a node's servers of a kind are started cold at once."""

from dataclasses import replace
from typing import Any

from contract.rows import CAME_TO_NOTHING, FAILED, MEASURED, SessionRow
from orchestrator.forks import Forks

SESSION = SessionRow(1, "run", "session", 1, MEASURED, simulated=False, started_at="")
IN_VAIN = {"start": "cold", "start_reason": f"{CAME_TO_NOTHING}no word from it for 30 s"}
GOOD = {"start": "warm", "start_reason": None}


def problem(*seen: dict[str, Any]) -> str | None:
    forks = Forks()
    for more in seen:
        forks.see(replace(SESSION, **more))
    return forks.problem


def test_two_forks_in_vain_are_enough_where_none_was_good() -> None:
    assert problem() is None
    assert problem(IN_VAIN) is None
    assert "2 forks of this model in this mode (eager or not) have come to nothing" in (problem(IN_VAIN, IN_VAIN) or "")
    assert problem(IN_VAIN, IN_VAIN) == problem(IN_VAIN, IN_VAIN, IN_VAIN)  # said once


def test_a_good_fork_keeps_its_kind_warm_whenever_it_comes() -> None:
    assert problem(GOOD, IN_VAIN, IN_VAIN) is None
    assert problem(IN_VAIN, IN_VAIN, GOOD) is None


def test_what_says_nothing_of_forks_is_not_counted() -> None:
    refused = {"start": "cold", "start_reason": "its environment is not the one that was imported in: HF_HUB_OFFLINE"}
    met_cold_too = {**IN_VAIN, "status": FAILED, "failure_class": "out_of_memory"}
    never_asked = {"start": "cold", "start_reason": None}
    for other in (refused, met_cold_too, never_asked, {"start": None, "status": FAILED}):
        assert problem(other, other, IN_VAIN) is None
