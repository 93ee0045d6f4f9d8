"""After how many forks in vain a node's servers, or those of a kind, are started cold at once."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from contract.rows import CAME_TO_NOTHING, FAILED, MEASURED, SessionRow
from contract.specs import SessionSpec
from orchestrator.forks import Forks
from tests.test_session import spec

SESSION = SessionRow(1, "run", "session", 1, MEASURED, simulated=False, started_at="")
IN_VAIN = {"start": "cold", "start_reason": f"{CAME_TO_NOTHING}no word from it for 30 s"}
GOOD = {"start": "warm", "start_reason": None}


KIND = spec()
GRAPHS = replace(KIND, server=replace(KIND.server, enforce_eager=not KIND.server.enforce_eager))
LARGER = replace(KIND, model=replace(KIND.model, name="larger"))


def problem(
    *seen: dict[str, Any], of: SessionSpec = KIND, others: Sequence[tuple[SessionSpec, dict[str, Any]]] = ()
) -> str | None:
    """Return what stands against a fork of KIND, after `seen` of the kind `of` and `others`."""
    forks = Forks()
    for kind, more in [*others, *((of, each) for each in seen)]:
        forks.see(kind, replace(SESSION, **more))
    return forks.problem(KIND)


def test_two_forks_in_vain_of_a_kind_are_enough_for_it_and_for_no_other() -> None:
    """A broken model must not take the forks from the others of its run."""
    assert problem() is None
    assert problem(IN_VAIN) is None
    why = "on this node 2 forks of this model in this mode (eager or not) have come to nothing where a cold server was "
    assert (problem(IN_VAIN, IN_VAIN) or "").startswith(why)
    assert problem(IN_VAIN, IN_VAIN) == problem(IN_VAIN, IN_VAIN, IN_VAIN)  # said once
    assert problem(IN_VAIN, IN_VAIN, IN_VAIN, of=LARGER) is None


@pytest.mark.parametrize("other", [GRAPHS, LARGER], ids=["mode", "model"])
def test_where_forks_of_several_kinds_come_to_nothing_it_is_the_node(other: SessionSpec) -> None:
    """Each further kind that had to find that out by itself would lose two more."""
    why = (
        "on this node 2 forks of several models or modes have come to nothing where a cold server was ready, and none "
    )
    assert (problem(IN_VAIN, others=[(other, IN_VAIN)]) or "").startswith(why)
    smaller = replace(KIND, model=replace(KIND.model, name="smaller"))
    assert (problem(IN_VAIN, of=other, others=[(smaller, IN_VAIN)]) or "").startswith(why)


@pytest.mark.parametrize("other", [GRAPHS, LARGER], ids=["mode", "model"])
def test_where_a_fork_was_good_each_kind_is_counted_by_itself(other: SessionSpec) -> None:
    good = [(other, GOOD)]
    assert problem(IN_VAIN, others=good) is None
    assert problem(IN_VAIN, others=[*good, (other, IN_VAIN), (other, IN_VAIN)]) is None
    assert "2 forks of this model in this mode (eager or not) have" in (problem(IN_VAIN, IN_VAIN, others=good) or "")
    assert problem(IN_VAIN, IN_VAIN, others=good) == problem(IN_VAIN, IN_VAIN, IN_VAIN, others=good)  # said once


@pytest.mark.parametrize("other", [KIND, GRAPHS, LARGER], ids=["own", "mode", "model"])
def test_a_good_fork_lets_a_node_go_on_whenever_it_comes(other: SessionSpec) -> None:
    assert problem(IN_VAIN, IN_VAIN, GOOD, of=other) is None
    assert problem(GOOD, IN_VAIN, IN_VAIN, of=other) is None


def test_what_says_nothing_of_forks_is_not_counted() -> None:
    refused = {"start": "cold", "start_reason": "its environment is not the one that was imported in: HF_HUB_OFFLINE"}
    met_cold_too = {**IN_VAIN, "status": FAILED, "failure_class": "out_of_memory"}
    never_asked = {"start": "cold", "start_reason": None}
    for other in (refused, met_cold_too, never_asked, {"start": None, "status": FAILED}):
        assert problem(other, other, IN_VAIN) is None
