"""benchmarks/warm_kills_vllm.py: whom chance picks, and when."""

import random
import signal

from benchmarks.warm_kills_vllm import TO_BEGIN_WITH, VICTIMS, plans

ROUNDS = 200


def test_a_parent_lives_through_all_rounds_but_the_last_which_kill_it_in_a_fork_and_later() -> None:
    drawn = plans(ROUNDS, random.Random(0))
    assert len(drawn) == ROUNDS
    last = [plan for plan in drawn if plan.victim == "parent"]
    assert drawn[-len(last) :] == last
    assert len(last) <= ROUNDS / 10
    assert {plan.in_fork for plan in last} == {True, False}


def test_a_usual_start_is_known_before_anybody_is_struck_and_everybody_is_drawn_all_over_it() -> None:
    drawn = plans(ROUNDS, random.Random(0))
    assert {plan.victim for plan in drawn[:TO_BEGIN_WITH]} == {"nobody"}
    assert {plan.victim for plan in drawn} == {*VICTIMS, "parent"}
    for victim in VICTIMS:
        moments = [plan.moment for plan in drawn if plan.victim == victim]
        assert min(moments) < 0.2
        assert max(moments) > 0.8


def test_who_has_to_die_for_a_round_to_end_is_not_only_stopped() -> None:
    drawn = plans(ROUNDS, random.Random(0))
    assert {plan.ways for plan in drawn if plan.victim == "server"} > {(signal.SIGSTOP,), (signal.SIGKILL,)}
    for plan in drawn:
        if plan.victim in ("owner", "parent"):
            assert plan.ways[-1] != signal.SIGSTOP
