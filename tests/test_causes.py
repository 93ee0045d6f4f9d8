"""The table of what follows from a failure: whole, true to what counts as done, and what the documentation shows."""

from pathlib import Path

import pytest

from contract.causes import CAUSES, Again, Reach, cause, table
from contract.failures import FailureClass
from contract.next_steps import NEXT_STEPS, next_step
from contract.next_steps import table as table_of_steps
from contract.rows import MEASURED, PRUNED, RESULT_STATUSES

PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"


def test_every_class_is_in_the_table() -> None:
    assert list(CAUSES) == list(FailureClass)


def test_what_is_a_result_is_what_resume_takes_for_done() -> None:
    results = {str(failure_class) for failure_class, what in CAUSES.items() if what.is_result}
    assert results == set(RESULT_STATUSES) - {MEASURED, PRUNED}


def test_a_result_a_request_and_the_end_of_the_run_are_never_tried_again() -> None:
    final = [what for what in CAUSES.values() if what.is_result or what.reach in (Reach.REQUEST, Reach.RUN)]
    assert {what.again for what in final} == {Again.NEVER}


def test_only_a_server_that_lives_can_be_asked_again() -> None:
    assert {w.reach for w in CAUSES.values() if w.again is Again.SAME_SERVER} == {Reach.POINT}


@pytest.mark.parametrize("unknown", [None, "", "of a later version"])
def test_an_unknown_class_is_taken_for_a_defect_of_ours(unknown: str | None) -> None:
    assert cause(unknown) is CAUSES[FailureClass.INTERNAL]


def test_the_documentation_shows_the_table() -> None:
    assert table() in PAGE.read_text(), "put the output of contract.causes.table() into docs/reliability.md"


def test_the_next_steps_stand_in_the_order_of_the_classes_and_in_the_documentation() -> None:
    assert list(NEXT_STEPS) == [failure_class for failure_class in FailureClass if failure_class in NEXT_STEPS]
    assert table_of_steps() in PAGE.read_text(), (
        "put the output of contract.next_steps.table() into docs/reliability.md"
    )


def test_every_failure_that_memory_or_a_user_makes_has_a_next_step() -> None:
    asked = {what for what in FailureClass if "memory" in what or what in ("kv_too_small", "bad_argument", "stopped")}
    assert asked <= set(NEXT_STEPS)
    assert next_step("free_memory_low") == NEXT_STEPS[FailureClass.FREE_MEMORY_LOW]
    assert [next_step(words) for words in (None, "of a later version", "internal")] == [None] * 3
