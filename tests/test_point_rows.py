"""What a row says of its load, its power and its clocks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract.arrivals import ArrivalProcess, Arrivals, Stage
from contract.rows import MEASURED, SCHEMA_VERSION, PointRow, SessionRow, TelemetryRow, to_table
from contract.specs import Mode, ModelSpec, Point, PointKind, Purpose, ServerSpec, SessionSpec
from workers.kv_figures import KvFigures
from workers.point_rows import Origin, blank, energy_j, fill_window, offered_qps, power_w
from workers.sampler import Observed


@given(st.floats(0.5, 100), st.floats(5, 60))
def test_constant_arrivals_offer_just_their_rate(rate: float, seconds: float) -> None:
    """Ten requests at 0, 1, ... 9 s are one a second, not 1.11."""
    arrivals = Arrivals(ArrivalProcess.CONSTANT, rate, (Stage(seconds),))
    assert offered_qps(arrivals, arrivals.times(arrivals.requests, "")) == pytest.approx(rate)


def test_drawn_arrivals_begin_with_a_gap() -> None:
    assert offered_qps(Arrivals(ArrivalProcess.POISSON, 1.0, (Stage(4),)), [0.5, 1.0, 3.0, 4.0]) == 1.0


def test_one_request_at_once_has_no_rate() -> None:
    assert offered_qps(Arrivals(ArrivalProcess.CONSTANT, 1.0, (Stage(1),)), [0.0]) is None


# --- power ---


def watts(**by_card: list[float | None]) -> list[TelemetryRow]:
    return [
        TelemetryRow(at / 10, card, power_w=power)
        for card, powers in by_card.items()
        for at, power in enumerate(powers)
    ]


def test_power_is_the_sum_of_the_cards_means() -> None:
    assert power_w(watts(a=[300.0, 320.0], b=[500.0, 540.0]), ["a", "b"]) == 310 + 520
    assert power_w(watts(a=[300.0, None], b=[500.0, 540.0]), ["a", "b"]) == 300 + 520  # one sample was not told


def test_power_of_two_cards_is_not_twice_that_of_the_one_that_tells() -> None:
    assert power_w(watts(a=[300.0, 320.0], b=[None, None]), ["a", "b"]) is None
    assert power_w(watts(a=[300.0, 320.0]), ["a", "b"]) is None
    assert power_w([], ["a"]) is power_w([], []) is None


# --- energy ---


def joules(**by_card: list[float | None]) -> list[TelemetryRow]:
    return [
        TelemetryRow(at / 10, card, energy_j=counter)
        for card, counters in by_card.items()
        for at, counter in enumerate(counters)
    ]


@given(st.lists(st.floats(50, 700), min_size=1, max_size=4), st.floats(0.1, 1e6), st.floats(0.5, 100))
def test_energy_of_even_power_is_watts_times_seconds(powers: list[float], since_s: float, duration_s: float) -> None:
    cards = {f"GPU-{n}": [watt * (since_s + at / 10) for at in range(6)] for n, watt in enumerate(powers)}
    found = energy_j(joules(**cards), list(cards), duration_s)  # type: ignore[arg-type]
    assert found == pytest.approx(sum(powers) * duration_s, rel=1e-3)


def test_energy_counts_from_a_counters_first_step_to_its_last() -> None:
    assert energy_j(joules(a=[5.0, 5.0, 35.0, None, 35.0, 95.0]), ["a"], 2.0) == pytest.approx(60 / 0.3 * 2)


@pytest.mark.parametrize(
    ("read", "device_ids"),
    [
        (joules(a=[1.0, 2.0, 3.0, 4.0]), ["a", "b"]),
        (joules(a=[1.0, 2.0, 3.0, 4.0], b=[None] * 4), ["a", "b"]),
        (joules(a=[900.0, 910.0, 920.0, 0.0, 10.0]), ["a"]),
        (joules(a=[900.0, 0.0, 10.0, 20.0]), ["a"]),
        (joules(a=[1.0, 1.0, 2.0, 2.0]), ["a"]),
        ([], ["a"]),
        ([], []),
    ],
    ids=["no samples of a card", "a card does not tell", "reset", "reset first", "moved once", "no sample", "no card"],
)
def test_energy_is_known_only_of_cards_that_all_tell_and_count_on(
    read: list[TelemetryRow], device_ids: list[str]
) -> None:
    assert energy_j(read, device_ids, 10.0) is None


# --- clocks ---


@pytest.mark.parametrize(
    ("bits", "reasons"),
    [([], None), ([None, None], None), ([0, 1], []), ([None, 0x4, 0x40], ["heat, by hardware", "power cap"])],
    ids=["no sample", "not offered", "never held down", "held down"],
)
def test_a_card_that_does_not_tell_is_not_one_whose_clock_was_never_held_down(
    bits: list[int | None], reasons: list[str] | None
) -> None:
    point = Point("m", PointKind.MEMORY, Purpose.KV_SCALING, "kv")
    spec = SessionSpec(
        "s", ModelSpec("tiny", {}, dummy_weights=True), ServerSpec(512), "vllm", "cuda", Mode.COMMITTED, 1, 32, (point,)
    )
    session = SessionRow(SCHEMA_VERSION, "run", "s", 1, MEASURED, False, "")
    row = blank(Origin(spec, session, None, KvFigures(), None), point, 0.0)
    assert row.throttle_reasons is None
    fill_window(row, Observed([TelemetryRow(0.1, "GPU-0", clock_event_reasons=b) for b in bits]), 0.0, 1.0)
    assert row.throttle_reasons == reasons
    assert to_table([row], PointRow).column("throttle_reasons").to_pylist() == [reasons]
