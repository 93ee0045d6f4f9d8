"""A session on the stand-in server, without Ray: verbs, rows, failures, and what is left afterwards."""

import errno
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from contract.arrivals import ArrivalProcess, Arrivals, Stage
from contract.failures import FailureClass
from contract.lengths import Uniform
from contract.rows import CLIENT_LIMITED, FAILED, MEASURED
from contract.specs import (
    Api,
    Mode,
    ModelSpec,
    Point,
    PointKind,
    Purpose,
    ServerSpec,
    SessionSpec,
    SharedPrefix,
    Timeouts,
)
from orchestrator.manifest import server_entry
from tests.configs import load
from workers import probe, processes, temporary
from workers.cores import FreeCores
from workers.devices.base import CardLost, CardProcess, LostDevice
from workers.engines import vllm_log
from workers.engines.sim import RUNTIME_BYTES
from workers.launch.process import ServerProcess
from workers.load.client import generate
from workers.load.endpoint import NO_SOCKET, Endpoint
from workers.load.event_loop import client_versions
from workers.load.failed import LoadFailed, LoadLost, TooFewFiles
from workers.load.plan import LoadPlan, LoadResult
from workers.load.stalls import HeldBack
from workers.load.steady import stable
from workers.session import Session
from workers.settling import settled_memory

MIB = 2**20
POOL = 32 * 512 * 4096
MEMORY = Point("m", PointKind.MEMORY, Purpose.KV_SCALING, "kv")
LEVEL = Point("l", PointKind.LOAD, Purpose.CONCURRENCY, "concurrency", 4, 16, 12, 8, warmup_requests=4)


def together(plans: list[LoadPlan]) -> list[LoadResult]:
    with ThreadPoolExecutor(len(plans)) as pool:
        return list(pool.map(generate, plans))


def spec(transport: str = "uds", **extra_args: object) -> SessionSpec:
    model = ModelSpec("tiny", load("model/tiny.yaml")["config"], dummy_weights=True)
    server = ServerSpec(512, kv_cache_memory_bytes=POOL, transport=transport, extra_args=extra_args)
    timeouts = Timeouts(ready_s=20, stop_grace_s=2, memory_back_s=2, request_s=10)
    return SessionSpec("s", model, server, "sim", "sim", Mode.COMMITTED, 1, 32, (MEMORY, LEVEL), timeouts)


class Made:
    def __init__(self) -> None:
        self.sessions: list[Session] = []

    def __call__(self, made_from: SessionSpec) -> Session:
        self.sessions.append(Session(made_from, "run", 1, ["3"], together))
        return self.sessions[-1]


@pytest.fixture
def session() -> Iterator[Made]:
    made = Made()
    yield made
    for one in made.sessions:
        one.stop()


@pytest.mark.parametrize("transport", ["uds", "tcp"])
def test_a_server_is_started_measured_and_gone(session: Made, transport: str) -> None:
    one = session(spec(transport))
    started = one.start()
    assert (started.status, started.failure_message) == (MEASURED, None)
    environment = Path(f"/proc/{started.server_pid}/environ").read_text().split("\0")
    assert "CUDA_VISIBLE_DEVICES=3" in environment
    memory, load_row = one.measure(MEMORY), one.measure(LEVEL)
    one.settle()
    end = one.stop().row
    assert memory.status == load_row.status == MEASURED
    assert memory.mem_baseline_bytes == 0
    assert memory.mem_ready_bytes == memory.mem_loaded_bytes == memory.mem_peak_bytes
    assert memory.engine_bytes_per_token == memory.formula_bytes_per_token == 4096
    assert (load_row.completed, load_row.failed, load_row.server_generation_tokens) == (16, 0, 16 * 8)
    assert (load_row.prefix_hit_ratio, load_row.token_count_difference) == (0, 0)
    assert load_row.prefix_reset is (True if transport == "uds" else None)
    assert load_row.server_steps
    assert load_row.server_step_mean_tokens
    assert (load_row.server_steps or 0) <= (load_row.server_generation_tokens or 0)  # each gave at least one
    assert load_row.server_queue_mean_s is not None
    assert load_row.server_queue_p95_le_s == 0.3
    assert 0 < (load_row.server_prefill_mean_s or 0) < (load_row.server_ttft_mean_s or 0)
    assert (load_row.server_decode_mean_s or 0) < (load_row.mean_e2e_s or 0)
    assert all(0 <= sample.t_s <= (load_row.duration_s or 0) for sample in load_row.server_samples)
    assert (memory.server_samples, memory.token_count_difference) == ([], None)
    assert [r.completion_tokens for r in load_row.requests] == [8] * 16
    assert all(0 <= t.t_s <= (load_row.duration_s or 0) for t in load_row.telemetry)
    assert load_row.simulated
    assert load_row.device_ids == ["SIM-3"]
    assert server_entry(started)["load_client"] == started.load_client == client_versions()
    assert (end.mem_after_stop_bytes, end.exit_code) == (0, 0)
    assert end.memory_back_s is not None
    accounts = [(row.moment, row.device_id, row.used_bytes, row.kv_bytes, row.outside_bytes) for row in end.account]
    used = memory.mem_ready_bytes
    by_socket = [(moment, "SIM-3", used, POOL, RUNTIME_BYTES) for moment in ("ready", "loaded", "peak")]
    read_inside = {(row.outside_at_init_bytes, row.outside_now_bytes) for row in end.account}
    assert read_inside == ({(0, RUNTIME_BYTES)} if transport == "uds" else set())
    assert accounts == (by_socket if transport == "uds" else [])
    assert not processes.is_running(started.server_pid or 0)
    assert not one._workspace.root.exists()


def test_what_the_log_says_of_compiling_and_graphs_is_in_the_row(
    session: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = vllm_log.LogFigures(graph_capture_bytes=700 * MIB, compiled=True)
    monkeypatch.setattr(vllm_log, "parse", lambda _: told)
    row = session(spec()).start()
    assert (row.graph_capture_bytes, row.compiled) == (700 * MIB, True)


def test_a_session_whose_device_cannot_be_opened_leaves_no_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(temporary, "SHORT", tmp_path)
    monkeypatch.setattr("workers.session.open_device", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Session(spec(), "run", 1, ["3"], together)
    assert list(tmp_path.iterdir()) == []


def test_memory_is_back_at_the_baseline_and_not_near_it(session: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    one = session(spec())
    one.start()
    readings = iter([[3 * MIB], [1], [0]])
    monkeypatch.setattr(one._device, "memory_by_card", lambda _: next(readings))
    end = one.stop().row
    assert next(readings, None) is None
    assert (end.mem_after_stop_bytes, end.memory_left_bytes) == (0, None)
    assert end.memory_back_s is not None
    assert end.stop_s is not None
    assert end.memory_back_s > end.stop_s


def test_memory_that_stays_above_the_baseline_is_waited_for_and_said(
    session: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = spec()
    one = session(replace(asked, timeouts=replace(asked.timeouts, memory_back_s=0.2)))
    one.start()
    readings: list[int] = []
    monkeypatch.setattr(one._device, "memory_by_card", lambda _: readings.append(MIB) or [MIB])
    end = one.stop().row
    assert len(readings) > 1
    assert (end.memory_back_s, end.memory_left_bytes) == (None, MIB)


def test_memory_that_others_give_back_on_one_card_hides_none_that_is_left_on_another(
    session: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = spec()
    one = Session(replace(asked, timeouts=replace(asked.timeouts, memory_back_s=0.2)), "run", 1, ["3", "4"], together)
    session.sessions.append(one)
    held = [4 * MIB, 0]
    monkeypatch.setattr(one._device, "memory_by_card", lambda _: list(held))
    assert one.start().mem_baseline_bytes == 4 * MIB
    held[:] = [0, MIB]
    end = one.stop().row
    assert (end.memory_back_s, end.memory_left_bytes) == (None, MIB)


# --- a card that is lost, and others on the cards ---


def lose_the_card(one: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(pid: int | None) -> list[int]:
        raise CardLost("NVML does not read GPU-0 any more: GPU is lost")

    monkeypatch.setattr(one._device, "memory_by_card", lost)


def test_a_card_that_is_lost_before_the_start_is_no_defect_of_ours(
    session: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = session(spec())
    lose_the_card(one, monkeypatch)
    assert (one.start().status, one.row.failure_class) == (FAILED, FailureClass.CARD_LOST)
    row = one.measure(MEMORY)
    assert (row.status, row.failure_class) == (FAILED, FailureClass.CARD_LOST)
    assert row.failure_message == "NVML does not read GPU-0 any more: GPU is lost"


def test_cards_that_cannot_be_opened_are_lost_and_their_session_lives(
    session: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.session.open_device", lambda *_: LostDevice("NVML does not give them"))
    one = session(spec())
    row = one.start()
    assert (row.status, row.failure_class, row.failure_message) == (FAILED, "card_lost", "NVML does not give them")
    assert (row.visible_devices, row.device_ids, row.device_name) == (["3"], [], None)
    assert one.measure(MEMORY).failure_class == FailureClass.CARD_LOST
    end = one.stop().row
    assert (end.failure_class, end.server_pid, end.ended_at is not None) == ("card_lost", None, True)


@pytest.mark.parametrize(
    ("number", "failure_class"), [(errno.ENOSPC, "no_space"), (errno.EDQUOT, "no_space"), (errno.EIO, "internal")]
)
def test_a_full_disk_of_the_node_is_no_defect_of_ours(
    session: Made, monkeypatch: pytest.MonkeyPatch, number: int, failure_class: str
) -> None:
    def full(*_: object) -> Path:
        raise OSError(number, os.strerror(number), "/var/tmp/x")

    monkeypatch.setattr("workers.session.cached_model_dir", full)
    monkeypatch.setattr("workers.session.write_model_dir", full)
    row = session(spec()).start()
    assert (row.failure_class, "/var/tmp/x" in (row.failure_message or "")) == (failure_class, True)


def test_a_card_that_is_lost_while_memory_is_read_costs_the_server(
    session: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = session(spec())
    one.start()
    lose_the_card(one, monkeypatch)
    row = one.measure(MEMORY)
    assert (row.status, row.failure_class) == (FAILED, FailureClass.CARD_LOST)
    end = one.stop().row
    assert (end.status, end.failure_class) == (FAILED, FailureClass.CARD_LOST)
    assert not processes.is_running(end.server_pid or 0)


@pytest.mark.parametrize("settles", [True, False])
def test_a_card_that_is_lost_when_all_is_measured_is_said_in_the_session(
    session: Made, monkeypatch: pytest.MonkeyPatch, settles: bool
) -> None:
    one = session(spec())
    one.start()
    lose_the_card(one, monkeypatch)
    if settles:
        one.settle()
    end = one.stop().row
    assert (end.status, end.failure_class, end.memory_back_s) == (FAILED, FailureClass.CARD_LOST, None)
    assert (end.failure_message or "").startswith("while stopping: ") is not settles


@pytest.mark.parametrize("error", [CardLost("gone"), RuntimeError("broken")])
def test_what_fails_while_stopping_does_not_replace_what_failed_first(
    session: Made, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    one = session(spec(fail="RuntimeError: something broke"))
    one.start()

    def fails(pid: int | None) -> list[int]:
        raise error

    monkeypatch.setattr(one._device, "memory_by_card", fails)
    end = one.stop().row
    assert (end.failure_class, end.failure_message) == (FailureClass.START_FAILED, "RuntimeError: something broke")


OWN = CardProcess("SIM-3", 1, MIB, ours=True)


def on_cards(one: Session, monkeypatch: pytest.MonkeyPatch, before: Sequence[CardProcess] = ()) -> list[CardProcess]:
    """Have the session's device name its own process while the server lives, and whoever is in the list."""
    here = list(before)

    def seen(pid: int | None) -> list[CardProcess]:
        lives = pid is not None and processes.is_running(pid)
        return [*([OWN] if lives else []), *here]

    monkeypatch.setattr(one._device, "processes", seen)
    return here


def test_a_stranger_is_named_in_the_rows_of_what_it_was_there_for_and_in_the_sessions(
    session: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    early, ready, loaded, late, last = (CardProcess("SIM-3", pid, MIB, ours=False) for pid in (6, 7, 8, 9, 10))
    one = session(spec())
    here = on_cards(one, monkeypatch, [early])
    coming = iter([ready, loaded])

    def read_as_somebody_comes(*asked: Any) -> list[int]:
        here[:] = [next(coming)]
        return settled_memory(*asked)

    for reader in ("session", "measuring"):
        monkeypatch.setattr(f"workers.{reader}.settled_memory", read_as_somebody_comes)
    assert one.start().foreign_processes == [str(early), str(ready)]
    assert one.measure(MEMORY).foreign_processes == [str(early), str(ready), str(loaded)]
    here[:] = []
    assert one.measure(LEVEL).foreign_processes == []
    here[:] = [late]
    assert one.measure(LEVEL).foreign_processes == [str(late)]
    here[:] = [last]
    one.settle()
    assert one.stop().row.foreign_processes == sorted(map(str, (early, ready, loaded, late, last)))


def test_a_stranger_in_a_window_that_came_to_nothing_is_in_both_rows(
    session: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = session(spec())
    here = on_cards(one, monkeypatch)
    one.start()
    stranger = CardProcess("SIM-3", 7, MIB, ours=False)

    def lost(plan: LoadPlan, processes: int) -> LoadResult:
        here[:] = [stranger]
        raise LoadLost("gone")

    monkeypatch.setattr(one, "_measuring", replace(one.measuring, send=lost))
    row = one.measure(replace(LEVEL, warmup_requests=0))
    assert (row.failure_class, row.foreign_processes) == (FailureClass.LOAD_LOST, [str(stranger)])
    assert one.row.foreign_processes == [str(stranger)]


def test_who_was_there_is_named_at_every_point_of_a_server_that_did_not_start(
    session: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = session(spec(fail="RuntimeError: something broke"))
    stranger = CardProcess("SIM-3", 7, MIB, ours=False)
    on_cards(one, monkeypatch, [stranger])
    one.start()
    assert one.measure(LEVEL).foreign_processes == [str(stranger)]


def test_memory_that_a_stranger_holds_after_the_stop_is_not_the_servers(
    session: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = spec()
    one = session(replace(asked, timeouts=replace(asked.timeouts, memory_back_s=0.2)))
    here = on_cards(one, monkeypatch)
    one.start()
    here[:] = [CardProcess("SIM-3", 16595, 2560 * MIB, ours=False)]
    monkeypatch.setattr(one._device, "memory_by_card", lambda _: [2566 * MIB])
    end = one.stop().row
    assert (end.memory_back_s, end.memory_left_bytes, end.memory_kept_bytes) == (None, 2566 * MIB, 6 * MIB)
    assert end.left_processes == ["pid 16595 on SIM-3: 2560 MiB"]
    assert end.foreign_processes == end.left_processes


def test_where_the_servers_own_processes_are_not_seen_nobody_is_called_another(
    session: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = session(spec())
    seen = [CardProcess("SIM-3", 7, MIB, ours=False)]
    monkeypatch.setattr(one._device, "processes", lambda pid: [] if pid is None else seen)
    assert one.start().foreign_processes is None
    assert one.measure(MEMORY).foreign_processes is None
    assert one.stop().row.foreign_processes is None


def test_no_prompt_is_ever_used_twice_on_a_server(session: Made) -> None:
    one = session(spec())
    one.start()
    rows = [one.measure(MEMORY), one.measure(LEVEL), one.measure(LEVEL)]
    ordinals = [request.ordinal for row in rows for request in row.requests]
    assert len(ordinals) == len(set(ordinals))
    assert one.row.requests_sent == max(ordinals) + 1


def test_a_level_keeps_what_its_server_said_all_along(session: Made) -> None:
    one = session(spec(step_s=0.05, max_num_seqs=3))
    one.start()
    row = one.measure(LEVEL)
    assert row.token_count_difference == 0
    running, waiting = [s.running for s in row.server_samples], [s.waiting_capacity for s in row.server_samples]
    assert len(running) >= 2 * (row.duration_s or 0) - 1
    assert (row.running_max, row.waiting_max, row.waiting_capacity_max, row.waiting_deferred_max) == (3, 1, 1, 0)
    assert (max(r or 0 for r in running), max(w or 0 for w in waiting)) == (3, 1)
    tokens = [s.generation_tokens or 0 for s in row.server_samples]
    assert tokens == sorted(tokens)
    assert 0 < tokens[-1] - tokens[0] <= 16 * 8
    assert (row.server_queue_mean_s or 0) > 0.05


def test_prompts_that_were_seen_before_fail_a_level_unless_that_is_allowed(
    session: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = replace(LEVEL, prompt_tokens=40, warmup_requests=0)  # rounds of which there may be more or fewer
    one = session(replace(spec("tcp"), prefix_hit_limit=0.02))  # there nobody can empty the cache between
    one.start()
    assert one.measure(point).status == MEASURED
    one.row.requests_sent = 1  # the same prompts again
    row = one.measure(point)
    assert (row.status, row.failure_class, row.prefix_hit_ratio) == (FAILED, FailureClass.PREFIX_HITS, 32 / 40)
    assert "80.00% of the prompt tokens" in (row.failure_message or "")
    assert row.tok_s
    shared = replace(point, shared_prefix=SharedPrefix(1, 16))
    one.row.requests_sent = 500
    assert one.measure(shared).status == MEASURED
    one.row.requests_sent = 500
    row = one.measure(shared)
    assert (row.status, row.failure_class, row.prefix_shared_ratio) == (FAILED, FailureClass.PREFIX_HITS, 16 / 40)
    allowing = replace(one.measuring.origin, spec=replace(one.spec, prefix_hit_limit=0.8))
    monkeypatch.setattr(one, "_measuring", replace(one.measuring, origin=allowing))
    one.row.requests_sent = 1
    assert one.measure(point).status == MEASURED


def test_drawn_lengths_shared_prefixes_and_chats_are_measured_and_told(session: Made) -> None:
    sent: list[LoadPlan] = []

    def recorded(plans: list[LoadPlan]) -> list[LoadResult]:
        sent.extend(plans)
        return together(plans)

    one = Session(spec(), "run", 1, ["3"], recorded)
    session.sessions.append(one)
    one.start()
    drawn = replace(
        LEVEL, prompt_tokens=Uniform(20, 90), output_tokens=Uniform(1, 8), shared_prefix=SharedPrefix(4, 16)
    )
    exact, fixed, chat = (one.measure(p) for p in (drawn, LEVEL, replace(drawn, api=Api.CHAT, shared_prefix=None)))
    assert (exact.completed, fixed.completed, chat.completed) == (16, 16, 16)
    assert (exact.api, exact.prompt_tokens, exact.output_tokens) == ("completions", 55, 4)
    assert (exact.prompt_lengths, exact.output_lengths) == ("uniform from 20 to 90", "uniform from 1 to 8")
    assert exact.shared_prefix == "4 shared prefixes of 16 tokens"
    assert (fixed.prompt_lengths, fixed.output_lengths, fixed.shared_prefix) == (None, None, None)
    assert (fixed.mean_prompt_tokens, fixed.mean_completion_tokens) == (12, 8)
    assert exact.mean_prompt_tokens == fmean(r.prompt_tokens or 0 for r in exact.requests)
    assert chat.api == "chat"
    kinds = [kind for kind, _ in groupby((plan.api, plan.shared_prefix) for plan in sent)]  # of warm-ups and windows
    plain, shared = (Api.COMPLETIONS, None), (Api.COMPLETIONS, SharedPrefix(4, 16))
    assert kinds == [plain, shared, plain, (Api.CHAT, None)]  # the first is the gate's
    assert (chat.text_cost_assumed, exact.text_cost_assumed) == (True, None)
    assert exact.prefix_shared_ratio == pytest.approx(16 / (exact.mean_prompt_tokens or 0))
    assert (exact.prefix_hit_ratio or 0) <= exact.prefix_shared_ratio
    assert chat.mean_prompt_tokens == exact.mean_prompt_tokens  # the stand-in counts words, and has no template
    assert exact.server_generation_tokens == sum(r.completion_tokens or 0 for r in exact.requests)


def test_a_failed_start_makes_a_failure_row_of_every_point(session: Made) -> None:
    one = session(spec(fail="ValueError: No available memory for the cache blocks."))
    assert one.start().status == FAILED
    row = one.measure(MEMORY)
    assert (row.status, row.failure_class) == ("kv_too_small", FailureClass.KV_TOO_SMALL)
    other = session(spec(fail="RuntimeError: something broke"))
    other.start()
    row = other.measure(LEVEL)
    assert (row.status, row.failure_class, row.failure_message) == (
        FAILED, FailureClass.START_FAILED, "RuntimeError: something broke",
    )  # fmt: skip
    assert "something broke" in (row.log_tail or "")
    assert row.concurrency == 4


def test_a_server_that_dies_under_load_is_a_dead_engine(session: Made) -> None:
    one = session(spec(step_s=0.2))
    pid = one.start().server_pid
    assert pid
    threading.Timer(0.5, os.kill, (pid, 9)).start()
    row = one.measure(LEVEL)
    assert (row.status, row.failure_class) == (FAILED, FailureClass.ENGINE_DEAD)
    again = one.measure(LEVEL)
    assert (again.status, again.failure_class) == (FAILED, FailureClass.ENGINE_DEAD)
    assert one.stop().row.mem_after_stop_bytes == 0


def test_a_server_that_is_silent_for_a_moment_is_asked_again(session: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    one = session(spec())
    one.start()
    get, silent = probe.get, [True, True]

    def get_in_the_end(endpoint: Endpoint, path: str) -> tuple[int, str]:
        if path == "/health" and silent:
            silent.pop()
            raise probe.NoAnswer("paused")
        return get(endpoint, path)

    monkeypatch.setattr(probe, "get", get_in_the_end)
    row = one.measure(MEMORY)
    assert (row.status, silent) == (MEASURED, [])


def test_a_server_that_answers_nothing_after_its_first_completion_is_dead(
    session: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a defect of ours: a forked one is started cold then, and any one again."""

    def silent(_: Endpoint) -> None:
        raise probe.NoAnswer("timed out")

    monkeypatch.setattr(probe, "server_metrics", silent)
    one = session(spec())
    row = one.start()
    assert (row.status, row.failure_class) == (FAILED, FailureClass.ENGINE_DEAD)
    assert row.failure_message == "ready, but since its first completion it does not answer: timed out"


@pytest.mark.parametrize(("health", "failure_class"), [(200, "load_error_rate"), (503, "engine_dead")])
def test_a_front_end_that_outlives_its_engine_is_a_dead_engine(
    session: Made, monkeypatch: pytest.MonkeyPatch, health: int, failure_class: str
) -> None:
    one = session(spec())
    one.start()
    get = probe.get

    def get_but_health(endpoint: Endpoint, path: str) -> tuple[int, str]:
        return (health, "") if path == "/health" else get(endpoint, path)

    monkeypatch.setattr(probe, "get", get_but_health)
    last = one.measure(LEVEL)  # all is answered: it may have died with the few requests that a level may lose
    assert (last.status, last.failure_class) == ((MEASURED, None) if health == 200 else (FAILED, failure_class))
    row = one.measure(replace(LEVEL, prompt_tokens=600))  # refused: longer than max_model_len
    assert (row.status, row.failure_class, row.failed) == (FAILED, failure_class, 16)
    hurried: list[bool] = []
    monkeypatch.setattr(one._process, "hurry", lambda: hurried.append(True))
    one.stop()
    assert bool(hurried) == (failure_class == "engine_dead")  # vLLM's front end was seen to wait out all of its grace


class FirstCompletionFails:
    """What a server writes while its first completion fails, and whether it lives on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, health: int) -> None:
        self.session: Session | None = None
        self._failed = False
        get = probe.get

        def get_but_health(endpoint: Endpoint, path: str, **more: Any) -> tuple[int, str]:
            return (health, "") if path == "/health" and self._failed else get(endpoint, path, **more)

        monkeypatch.setattr(probe, "get", get_but_health)

    def __call__(self, plans: list[LoadPlan]) -> list[LoadResult]:
        assert self.session is not None
        results = together(plans)
        with self.session._workspace.log.open("a") as log:
            log.write("ERROR 11-27 [x.py:1] ValueError: no kernel for prompt: 'private'\n")
        (row,) = results[0].requests
        row.ok, row.failure_class, row.failure_message = False, FailureClass.TIMEOUT, "no end within 600 s"
        self._failed = True
        return results


@pytest.mark.parametrize(
    ("health", "failure_class", "words"),
    [
        (200, FailureClass.ENGINE_DEAD, "ready, but the first completion failed: no end within 600 s (the last error"),
        (503, FailureClass.START_FAILED, "ready, but the first completion ended the engine: ValueError: no kernel for"),
    ],
)
def test_what_the_log_has_ended_an_engine_at_its_first_completion_only_where_that_is_dead(
    session: Made, monkeypatch: pytest.MonkeyPatch, health: int, failure_class: FailureClass, words: str
) -> None:
    fails = FirstCompletionFails(monkeypatch, health)
    session.sessions.append(Session(spec(), "run", 1, ["3"], fails))
    fails.session = session.sessions[-1]
    row = fails.session.start()
    assert (row.status, row.failure_class) == (FAILED, failure_class)
    message = row.failure_message or ""
    assert message.startswith(words)
    assert "no end within 600 s" in message
    assert "private" not in message  # a log's line: it may quote what was sent


def test_an_error_of_a_start_that_came_to_listen_is_not_its_later_end(
    session: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = session(spec())

    def made(*given: Any) -> ServerProcess:
        process = ServerProcess(*given)
        with one._workspace.log.open("a") as log:
            log.write("ERROR 11-27 [x.py:1] ValueError: never mind\n")
        return process

    monkeypatch.setattr("workers.session.ServerProcess", made)
    pid = one.start().server_pid
    assert pid
    os.kill(pid, 9)
    row = one.measure(LEVEL)
    assert row.failure_class == FailureClass.ENGINE_DEAD
    assert "never mind" not in (row.failure_message or "")


def test_a_server_that_ran_out_of_memory_under_load_says_so(session: Made) -> None:
    one = session(spec(step_s=0.2))
    pid = one.start().server_pid
    assert pid

    def run_out() -> None:
        with one._workspace.log.open("a") as log:
            log.write("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB\n")
        os.kill(pid, 9)

    threading.Timer(0.5, run_out).start()
    row = one.measure(LEVEL)
    assert (row.status, row.failure_class) == (FAILED, FailureClass.MEMORY_UNDER_LOAD)
    assert (row.failure_message or "").endswith("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    ("error", "failure_class"),
    [(LoadLost("killed"), FailureClass.LOAD_LOST), (TooFewFiles("few"), FailureClass.CLIENT_SOCKETS)],
)
def test_load_that_comes_to_nothing_is_not_held_against_the_server(
    session: Made, error: LoadFailed, failure_class: FailureClass
) -> None:
    lost = [False]

    def generate_or_not(plans: list[LoadPlan]) -> list[LoadResult]:
        if lost[0]:
            raise error
        return together(plans)

    one = Session(spec(), "run", 1, ["3"], generate_or_not)
    session.sessions.append(one)
    one.start()
    lost[0] = True
    row = one.measure(LEVEL)
    assert (row.status, row.failure_class) == (FAILED, failure_class)
    assert row.failure_message == f"its load came to nothing: {error}"
    lost[0] = False
    assert one.measure(LEVEL).status == MEASURED


def test_ready_timeout_is_a_failure_with_its_limit(session: Made) -> None:
    slow = spec(start_s=30)
    one = session(
        SessionSpec(**{**{f: getattr(slow, f) for f in slow.__dataclass_fields__}, "timeouts": Timeouts(0.5, 1, 1)})
    )
    assert one.start().failure_class == FailureClass.READY_TIMEOUT


def test_a_stop_waits_for_probes_and_then_closes_the_device(session: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    one = session(spec())
    probing, order = threading.Event(), list[str]()

    def contexts() -> list[int | None]:
        probing.set()
        assert one._stopping.wait(20)
        time.sleep(0.1)
        order.append("probed")
        return [None]

    close = one._device.close
    monkeypatch.setattr(one, "_contexts", contexts)
    monkeypatch.setattr(one._device, "close", lambda: (order.append("closed"), close()))
    starting = threading.Thread(target=one.start)
    starting.start()
    assert probing.wait(20)
    one.stop()
    starting.join(20)
    assert order == ["probed", "closed"]
    assert one.row.failure_class == FailureClass.STOPPED


def test_stop_pre_empts_a_start(session: Made) -> None:
    one = session(spec(start_s=30))
    thread = threading.Thread(target=one.start)
    thread.start()
    while one.row.server_pid is None:
        time.sleep(0.01)
    one.stop()
    thread.join(5)
    assert not thread.is_alive()
    assert one.row.failure_class in (FailureClass.STOPPED, FailureClass.START_FAILED)
    assert not processes.is_running(one.row.server_pid)


def test_the_key_of_a_tcp_session_is_nowhere_in_what_is_kept(session: Made) -> None:
    one = session(spec("tcp"))
    one.start()
    key = one._address.api_key
    assert key
    with one._workspace.log.open("a") as log:
        log.write(f"a server that tells its key: {key}\n")
    end = one.stop()
    assert "a server that tells its key: ***" in end.log
    kept = repr(end)
    assert key not in kept
    assert "VLLM_API_KEY=***" in end.row.environment


class SlowClients:
    """Runs a level's load and says by how much stalls held back every gap, by the number of processes."""

    def __init__(self, raised_s: dict[int, float]) -> None:
        self.raised_s = raised_s
        self.processes: list[int] = []

    def __call__(self, plans: list[LoadPlan]) -> list[LoadResult]:
        results = together([replace(plan, cores=()) for plan in plans])  # this host may have fewer
        if plans[0].concurrency * len(plans) > 1:  # not the gate's single request
            self.processes.append(len(plans))
            late_s = self.raised_s.get(len(plans), 0.0)
            for at, result in enumerate(results):
                gaps_s = [us / 1e6 for row in result.requests for us in row.gaps_us]
                late = HeldBack(gaps=tuple((gap_s, gap_s - late_s) for gap_s in gaps_s))
                results[at] = replace(result, held_back=late)
                for client in result.clients:
                    client.cpu_share, client.wait_share, client.held_s = 0.1, 0.1, None
                for row in result.requests:
                    row.due_s = row.due_s and row.sent_s  # this host may be late
        return results


def limited(made: Made, clients: SlowClients, load_processes: int | None = None) -> Session:
    made.sessions.append(Session(replace(spec(step_s=0.02), load_processes=load_processes), "run", 1, ["3"], clients))
    one = made.sessions[-1]
    one.start()
    one.row.simulated = False  # what a stand-in gives is not judged
    one.measuring.plans.free = FreeCores(tuple(range(8)), 8)
    return one


def test_a_level_that_its_client_limited_is_measured_again_with_more_processes(session: Made) -> None:
    clients = SlowClients({1: 0.5})
    row = limited(session, clients).measure(LEVEL)
    assert (row.status, len(row.clients)) == (MEASURED, 4)
    assert clients.processes[-2:] == [1, 4]  # the tries, after the warm-up's rounds
    assert len(row.warmup_tok_s) == len(clients.processes) - 2 >= 2
    (words,) = row.limited_before
    assert "more): stalls of load processes raised the level's p99 gap between chunks by 500 ms" in words
    assert (row.completed, row.failed) == (16, 0)


@pytest.mark.parametrize(
    ("cores", "at_once", "load_processes", "failure_class", "words"),
    [
        (64, 64, None, FailureClass.CLIENT_STREAMS_FEW, "4 processes (the level has too few streams for more)"),
        (2, 2, None, FailureClass.CLIENT_CORES_FEW, "1 processes (the host has no cores for more)"),
        (64, 2, None, FailureClass.CLIENT_CORES_FEW, "1 processes (the CPU quota has no cores for more)"),
        (64, 64, 1, FailureClass.CLIENT_PROCESSES_FIXED, "1 processes (load.processes fixes their number)"),
        (64, 64, 8, FailureClass.CLIENT_STREAMS_FEW, "4 processes (the level has too few streams for more)"),
    ],
)
def test_a_level_that_stays_limited_by_its_client_says_why_and_keeps_its_numbers(
    session: Made, cores: int, at_once: int, load_processes: int | None, failure_class: FailureClass, words: str
) -> None:
    one = limited(session, SlowClients(dict.fromkeys(range(1, 5), 0.5)), load_processes)
    one.measuring.plans.free = FreeCores(tuple(range(cores)), at_once)
    row = one.measure(LEVEL)
    assert (row.status, row.failure_class) == (CLIENT_LIMITED, failure_class)
    assert f"the limit with {words}: stalls of load processes raised" in (row.failure_message or "")
    assert row.gap_p99_raised_s == pytest.approx(0.5)
    assert row.tok_s
    assert len(row.requests) == 16


NO_FILES = NO_SOCKET[errno.ENFILE]


class ClientsWithoutFiles(SlowClients):
    """One process has no socket for half of its requests; several have, but for where they have not either."""

    def __init__(self, failed_otherwise: int, several: bool = True) -> None:
        super().__init__({})
        self.failed_otherwise = failed_otherwise
        self.several = several

    def __call__(self, plans: list[LoadPlan]) -> list[LoadResult]:
        results = super().__call__(plans)
        rows = [row for result in results for row in result.requests]
        if len(rows) == LEVEL.num_requests and not (self.several and len(plans) > 1):
            for row in rows[:8]:
                row.ok, row.failure_class, row.failure_message = False, FailureClass.CLIENT_SOCKETS, NO_FILES
            for row in rows[8 : 8 + self.failed_otherwise]:
                row.ok, row.failure_class, row.failure_message = False, FailureClass.TIMEOUT, "no end"
        return results


def test_requests_that_the_clients_host_had_no_socket_for_are_not_the_servers_failures(session: Made) -> None:
    row = limited(session, ClientsWithoutFiles(0)).measure(LEVEL)
    assert (row.status, len(row.clients), row.failed) == (MEASURED, 4, 0)
    (words,) = row.limited_before
    assert f"8 requests got no connection: {NO_FILES}" in words


@pytest.mark.parametrize("cores", [2, 64])
def test_a_level_that_stays_limited_by_sockets_says_which_and_not_that_it_wants_cores(
    session: Made, cores: int
) -> None:
    one = limited(session, ClientsWithoutFiles(0, several=False))
    one.measuring.plans.free = FreeCores(tuple(range(cores)), cores)
    row = one.measure(LEVEL)
    assert (row.status, row.failure_class) == (CLIENT_LIMITED, FailureClass.CLIENT_SOCKETS)
    assert f"8 requests got no connection: {NO_FILES}" in (row.failure_message or "")
    assert (row.completed, row.failed) == (8, 8)


def test_a_level_that_failed_by_other_requests_too_has_failed(session: Made) -> None:
    row = limited(session, ClientsWithoutFiles(4)).measure(LEVEL)
    assert (row.status, row.failure_class, row.failed) == (FAILED, FailureClass.LOAD_ERROR_RATE, 12)


class WorseClients(SlowClients):
    """Its first try is limited; of the second some process is lost, or all requests fail."""

    def __init__(self, lost: bool) -> None:
        super().__init__({1: 0.5})
        self.lost = lost

    def __call__(self, plans: list[LoadPlan]) -> list[LoadResult]:
        if self.lost and len(plans) > 1:
            raise LoadLost("killed")
        results = super().__call__(plans)
        for row in (row for result in results for row in result.requests if len(plans) > 1):
            row.ok, row.failure_class, row.failure_message = False, FailureClass.TIMEOUT, "no end"
        return results


@pytest.mark.parametrize(("lost", "why"), [(True, "LoadLost: killed"), (False, "16 of 16 requests failed")])
def test_a_second_try_that_fails_leaves_the_first_with_its_numbers(session: Made, lost: bool, why: str) -> None:
    row = limited(session, WorseClients(lost)).measure(LEVEL)
    assert (row.status, row.failure_class) == (CLIENT_LIMITED, FailureClass.CLIENT_PROCESSES_FEW)
    message = row.failure_message or ""
    assert "the limit with 1 processes (the host has cores for more): stalls" in message
    assert "measured again with 4 it failed: " in message
    assert why in message
    assert (row.completed, len(row.clients)) == (16, 1)
    assert row.tok_s


OPEN = replace(
    LEVEL,
    concurrency=0,
    num_requests=40,
    warmup_requests=0,
    arrivals=Arrivals(ArrivalProcess.CONSTANT, 40.0, (Stage(1),)),
)


def test_an_open_loop_without_a_warm_up_is_measured_again_with_more_processes(session: Made) -> None:
    clients = SlowClients({1: 0.5})
    row = limited(session, clients).measure(OPEN)
    assert (row.status, clients.processes) == (MEASURED, [1, 4])
    assert row.completed == 40
    assert row.limited_before
    assert row.p99_send_delay_s is not None
    assert row.p99_connect_s is not None


class SixConnections(SlowClients):
    """Whose first try had no more, whatever this host was up to."""

    def __call__(self, plans: list[LoadPlan]) -> list[LoadResult]:
        results = super().__call__(plans)
        if len(plans) == 1:
            results[0].clients[0].streams = 6
        return results


def test_a_second_try_of_an_open_loop_has_no_more_processes_than_the_first_had_connections(session: Made) -> None:
    """Its 40 requests are not in flight at once."""
    clients = SixConnections({1: 0.5})
    one = limited(session, clients)
    one.measuring.plans.free = FreeCores(tuple(range(64)), 64)
    row = one.measure(OPEN)
    assert (row.status, clients.processes, row.completed) == (MEASURED, [1, 6], 40)


@pytest.mark.parametrize(("rate", "processes"), [(10.0, 1), (400.0, 2), (1600.0, 4)])
def test_a_rate_has_processes_for_what_it_brings(session: Made, rate: float, processes: int) -> None:
    """400 answers a second of 100 tokens are 400 streams of 100 tokens a second."""
    one = limited(session, SlowClients({}))
    stages = (Stage(1, 0.5), Stage(1))
    point = replace(OPEN, output_tokens=100, num_requests=5000, arrivals=Arrivals(ArrivalProcess.POISSON, rate, stages))
    assert one.measuring.plans.processes_for(one.measuring.plans.lines(point, [])) == processes


def test_a_warm_up_that_never_settled_and_what_a_level_was_asked_for_are_told(session: Made) -> None:
    one = session(spec())
    one.start()
    timed = one.measure(replace(LEVEL, seconds=0.3, num_requests=2000))  # more than can be sent by then
    assert (timed.asked_s, timed.stopped_by) == (0.3, "time")
    assert timed.warmup_stable == stable(timed.warmup_tok_s)
    assert timed.server_hz is None or timed.server_hz > 0
    cold = one.measure(replace(LEVEL, warmup_requests=0))
    assert (cold.warmup_stable, cold.asked_s, cold.text_cost_assumed) == (None, None, None)
