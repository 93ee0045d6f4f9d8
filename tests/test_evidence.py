"""What is shown of servers' logs, and of all that a session's servers have written."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from contract.failures import FailureClass
from workers.evidence import Evidence
from workers.provenance import Places

HERE = Path("/tmp/vc-session")


def server(log: str) -> Any:
    return SimpleNamespace(log_tail=lambda: log, log_text=lambda: log)


def test_a_fork_that_came_to_nothing_shows_its_key_no_more_than_the_server_after_it(tmp_path: Path) -> None:
    evidence = Evidence(Places(HERE))
    evidence.hide("first-key")
    evidence.of(server("started with first-key"))
    (tmp_path / "log").write_text("started with first-key\n")
    evidence.set_aside(tmp_path / "log")
    evidence.hide("second-key")
    evidence.of(server(f"in {HERE}: started with second-key, prompt: 'private'"))
    assert evidence.log() == "started with ***\nin <session>: started with ***, prompt: 'private'"
    assert evidence.tail() == "in <session>: started with ***, prompt: ***"
    assert not (tmp_path / "log").exists()


def test_a_server_on_a_private_socket_has_no_key_to_hide() -> None:
    evidence = Evidence(Places(HERE))
    evidence.hide(None)
    assert (evidence.tail(), evidence.log()) == ("", "")
    evidence.of(server("None of them"))
    assert (evidence.tail(), evidence.log()) == ("None of them", "None of them")


def test_a_server_that_died_is_remembered_as_dead() -> None:
    evidence = Evidence(Places(HERE))
    evidence.of(server("ready\nValueError: it broke\n"))
    evidence.ready_at = len("ready\n")
    assert not evidence.dead
    failure = evidence.death("8 of 8 requests failed")
    assert (failure.failure_class, evidence.dead) == (FailureClass.ENGINE_DEAD, True)
    assert "ValueError: it broke" in failure.message
