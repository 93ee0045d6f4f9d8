"""The closed loop against a server that answers well, or fails in every way we know."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import resource
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
import trustme
from aiohttp.client_reqrep import ConnectionKey
from mock_openai import Fault, MockOpenAI, serving

from contract.failures import FailureClass
from contract.lengths import LogNormal, Uniform, draw
from contract.rows import ClientRow
from contract.specs import Api, SharedPrefix
from workers.load import bodies as bodies_module
from workers.load.bodies import FEWEST_AHEAD, Bodies, Prepared, prepare
from workers.load.client import allow_connections, generate, run_load
from workers.load.ending import Ending, Stop
from workers.load.endpoint import NO_SOCKET, Endpoint
from workers.load.failed import TooFewFiles
from workers.load.limits import client_limits, connecting_s, send_delay_s
from workers.load.plan import LoadPlan, LoadResult
from workers.load.prompts import PromptFactory, TextCost, WordPrompts
from workers.load.sent import Sent, row_of
from workers.load.stalls import Stall
from workers.load.start_line import StartLine
from workers.load.stream import Asked
from workers.load.summary import summarize
from workers.load.tasks import split
from workers.load.watch import Watch
from workers.load.wire import Answer, Wire


def plan_for(server: MockOpenAI, **changes: object) -> LoadPlan:
    plan = LoadPlan(
        Endpoint(server.url, "mock"),
        concurrency=2,
        num_requests=6,
        prompt_tokens=20,
        output_tokens=8,
        first_ordinal=100,
        vocab_size=256,
        seed=7,
        timeout_s=20.0,
    )
    return replace(plan, **changes)  # type: ignore[arg-type]


def load(server: MockOpenAI, **changes: object) -> LoadResult:
    return generate(plan_for(server, **changes))


def test_every_request_is_sent_once_exactly_as_planned() -> None:
    with serving(MockOpenAI()) as server:
        result = load(server)
    factory = PromptFactory(256, 7)
    sent = sorted((body["prompt"] for body in server.bodies), key=lambda prompt: prompt[0])
    assert sent == [json.loads(b"".join(factory.json(ordinal, 0, 20))) for ordinal in range(100, 106)]
    for body in server.bodies:
        rest = {key: value for key, value in body.items() if key != "prompt"}
        assert rest == {
            "model": "mock",
            "max_tokens": 8,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }
    assert [row.ordinal for row in result.requests] == list(range(100, 106))


DRAWN = {"prompt_tokens": LogNormal(40, 30, 10, 120), "output_tokens": Uniform(1, 9)}


def test_drawn_lengths_are_sent_and_each_request_is_held_to_its_own() -> None:
    with serving(MockOpenAI()) as server:
        result = load(server, num_requests=40, **DRAWN)
    drawn = [
        (draw(DRAWN["prompt_tokens"], "prompt", 7, n), draw(DRAWN["output_tokens"], "output", 7, n)) for n in range(40)
    ]
    assert all(row.ok for row in result.requests)
    assert [(row.prompt_tokens, row.completion_tokens) for row in result.requests] == drawn
    assert sorted((len(body["prompt"]), body["max_tokens"]) for body in server.bodies) == sorted(drawn)
    assert len(set(drawn)) > 10
    with serving(MockOpenAI(fault=Fault.PROMPT_CUT)) as server:
        rows = load(server, num_requests=40, **DRAWN).requests
    assert {row.failure_class for row in rows} == {FailureClass.WRONG_TOKEN_COUNT}
    told = [row.failure_message or "" for row in rows]
    assert all(f", {prompt} were sent" in words for words, (prompt, _) in zip(told, drawn, strict=True))


def bodies(plan: LoadPlan) -> dict[int, bytes]:
    return {each.ordinal: each.body for each in prepare(plan) if each is not None}


@pytest.mark.parametrize("api", Api)
def test_a_level_sends_the_same_however_many_processes_send_it(api: Api) -> None:
    whole = plan_for(
        MockOpenAI(url="http://h"), concurrency=7, num_requests=50, api=api, shared_prefix=SharedPrefix(3, 8), **DRAWN
    )
    for processes in (2, 3, 7):
        parts = [bodies(part) for part in split(whole, processes, Path("/nowhere"))]
        assert {ordinal: body for part in parts for ordinal, body in part.items()} == bodies(whole)


def test_lengths_and_prefixes_go_by_the_number_in_the_level_not_by_what_the_server_was_asked_before() -> None:
    early, late = (
        [json.loads(body) for body in bodies(
            plan_for(MockOpenAI(url="http://h"), first_ordinal=first, shared_prefix=SharedPrefix(3, 8), **DRAWN)
        ).values()]
        for first in (0, 1001)
    )  # fmt: skip
    for one, two in zip(early, late, strict=True):
        assert (len(one["prompt"]), one["max_tokens"]) == (len(two["prompt"]), two["max_tokens"])
        assert one["prompt"][:8] == two["prompt"][:8]
        assert one["prompt"][8:] != two["prompt"][8:]


def test_a_chat_is_one_message_and_its_length_is_told_not_judged() -> None:
    with serving(MockOpenAI(tokens_of_a_word=2, template_tokens=9)) as server:
        result = load(server, api=Api.CHAT, prompt_tokens=50, text_cost=TextCost(2.0, 9.0))
        missed = load(server, api=Api.CHAT, prompt_tokens=50)
    texts = WordPrompts(7, TextCost(2.0, 9.0))
    expected = {json.loads(b"".join(texts.json(ordinal, 0, 50))) for ordinal in range(100, 106)}
    assert {body["messages"][0]["content"] for body in server.bodies[:6]} == expected
    for body in server.bodies[:6]:
        assert [message["role"] for message in body["messages"]] == ["user"]
        assert set(body) == {"model", "max_tokens", "temperature", "stream", "stream_options", "ignore_eos", "messages"}
    assert [(row.ok, row.prompt_tokens, row.completion_tokens, row.chunks) for row in result.requests] == [
        (True, 49, 8, 8)
    ] * 6
    assert [(row.ok, row.prompt_tokens) for row in missed.requests] == [(True, 109)] * 6


def test_a_chats_ttft_is_its_first_tokens_not_its_roles() -> None:
    with serving(MockOpenAI(preface_s=0.2)) as server:
        row = load(server, api=Api.CHAT, num_requests=1).requests[0]
    assert row.first_byte_s is not None
    assert row.ttft_s is not None
    assert row.first_byte_s < 0.15 < 0.2 <= row.ttft_s


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault.ERROR_MID_STREAM, FailureClass.IN_BAND_ERROR),
        (Fault.BREAKS_OFF, FailureClass.NO_DONE),
        (Fault.SHORT, FailureClass.WRONG_TOKEN_COUNT),
        (Fault.NO_FINISH_REASON, FailureClass.NO_FINISH_REASON),
        (Fault.ROLE_ONLY, FailureClass.NO_FINISH_REASON),
        (Fault.DELTA_NOT_OBJECT, FailureClass.MALFORMED_STREAM),
        (Fault.NO_USAGE, FailureClass.NO_USAGE),
        (Fault.RESET, FailureClass.CONNECTION_LOST),
        (Fault.STATUS_503, FailureClass.HTTP_ERROR),
    ],
)
def test_a_bad_answer_to_a_chat_fails_with_its_class(fault: Fault, expected: FailureClass) -> None:
    with serving(MockOpenAI(faults=[fault])) as server:
        bad, good = load(server, api=Api.CHAT, concurrency=1, num_requests=2).requests
    assert (bad.ok, bad.failure_class, good.ok) == (False, expected, True)
    if fault is Fault.ROLE_ONLY:
        assert (bad.chunks, bad.ttft_s) == (0, None)


def test_a_success_row_is_whole_and_consistent() -> None:
    with serving(MockOpenAI(tokens_per_chunk=3)) as server:
        result = load(server)
    for row in result.requests:
        assert (row.ok, row.failure_class, row.failure_message, row.http_status) == (True, None, None, 200)
        assert (row.prompt_tokens, row.completion_tokens, row.chunks, row.finish_reason) == (20, 8, 3, "length")
        assert row.ttft_s is not None
        assert row.e2e_s is not None
        assert row.sent_s >= 0
        assert 0 < row.ttft_s <= row.e2e_s
        assert row.sent_s + row.e2e_s <= result.duration_s
        assert row.tpot_s == pytest.approx((row.e2e_s - row.ttft_s) / 7)


def test_one_token_has_no_tpot() -> None:
    with serving(MockOpenAI()) as server:
        row = load(server, num_requests=1, output_tokens=1).requests[0]
    assert (row.ok, row.completion_tokens, row.tpot_s) == (True, 1, None)


def test_concurrency_is_reached_and_never_exceeded() -> None:
    with serving(MockOpenAI(gate=4)) as server:  # nothing is answered before four are in flight
        result = load(server, concurrency=4, num_requests=12)
        assert server.max_in_flight == 4
        assert len(server.connections) == 4  # and they are used again
    assert all(row.ok for row in result.requests)


def test_what_is_in_flight_is_counted_all_along_and_agrees_with_the_stamps() -> None:
    with serving(MockOpenAI(preface_s=0.15)) as server:
        result = load(server, api=Api.CHAT, concurrency=4, num_requests=12)
    (client,) = result.clients
    assert client.held_s == pytest.approx(sum(row.last_byte_s or 0 for row in result.requests), rel=0.2)
    assert {each.requests for each in client.in_flight} <= {0, 1, 2, 3, 4}
    assert max(each.requests for each in client.in_flight) == 4
    assert [each.t_s for each in client.in_flight] == sorted(each.t_s for each in client.in_flight)


def test_one_at_a_time_means_one() -> None:
    with serving(MockOpenAI()) as server:
        result = load(server, concurrency=1)
        assert server.max_in_flight == 1
    ends = [row.sent_s + (row.e2e_s or 0) for row in result.requests]
    assert all(end <= row.sent_s for end, row in zip(ends, result.requests[1:], strict=False))


def test_a_unix_socket_serves_as_well(tmp_path: Path) -> None:
    socket = str(tmp_path / "s")
    with serving(MockOpenAI(), uds=socket) as server:
        result = load(server, endpoint=Endpoint("http://localhost", "mock", uds=socket))
    assert all(row.ok for row in result.requests)


def test_tls_serves_as_well_where_the_certificate_is_trusted(tmp_path: Path) -> None:
    authority, bundle = trustme.CA(), tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(bundle))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    with serving(MockOpenAI(tls=tls)) as server:
        distrusted = load(server)
        command = [sys.executable, "-m", "workers.load", "--url", server.url, "--n", "3", "--concurrency", "2"]
        trusted = subprocess.run(
            command, env=os.environ | {"SSL_CERT_FILE": str(bundle)}, capture_output=True, text=True, check=False
        )
    assert {row.failure_class for row in distrusted.requests} == {FailureClass.CONNECTION_FAILED}
    assert "certificate verify failed" in (distrusted.requests[0].failure_message or "")
    assert trusted.returncode == 0, trusted.stderr


def test_a_body_of_several_megabytes_is_sent_whole() -> None:
    with serving(MockOpenAI()) as server:
        row = load(server, num_requests=1, prompt_tokens=300_000, vocab_size=150_000).requests[0]
    assert (row.ok, row.prompt_tokens) == (True, 300_000)


def test_text_prompts_are_unique_and_free_in_length() -> None:
    with serving(MockOpenAI()) as server:
        result = load(server, text="Explain what a GPU is.", prompt_tokens=0, vocab_size=0)
    prompts = {body["prompt"] for body in server.bodies}
    assert len(prompts) == 6
    assert all(prompt.endswith(" Explain what a GPU is.") for prompt in prompts)
    assert all(row.ok for row in result.requests)


def test_ignore_eos_is_not_sent_where_it_was_not_wanted() -> None:
    with serving(MockOpenAI(fault=Fault.STOPS_EARLY)) as server:
        free, held = load(server, ignore_eos=False), load(server)
    assert all("ignore_eos" not in body for body in server.bodies[:6])
    assert all(row.ok and row.completion_tokens == 4 for row in free.requests)
    assert all(row.failure_class == FailureClass.WRONG_TOKEN_COUNT for row in held.requests)


@pytest.mark.parametrize(
    ("fault", "expected", "words"),
    [
        (Fault.ERROR_MID_STREAM, FailureClass.IN_BAND_ERROR, "EngineCore died"),
        (Fault.NO_DONE, FailureClass.NO_DONE, "[DONE]"),
        (Fault.BREAKS_OFF, FailureClass.NO_DONE, "after 4 chunks"),
        (Fault.SHORT, FailureClass.WRONG_TOKEN_COUNT, "4 completion tokens"),
        (Fault.PROMPT_CUT, FailureClass.WRONG_TOKEN_COUNT, "19 prompt tokens"),
        (Fault.NO_USAGE, FailureClass.NO_USAGE, "usage"),
        (Fault.NO_FINISH_REASON, FailureClass.NO_FINISH_REASON, "finish_reason"),
        (Fault.ABORTED, FailureClass.UNEXPECTED_FINISH_REASON, "abort"),
        (Fault.STATUS_503, FailureClass.HTTP_ERROR, "no capacity: xxx"),
        (Fault.NOT_JSON, FailureClass.MALFORMED_STREAM, "<p>"),
        (Fault.NOT_A_STREAM, FailureClass.MALFORMED_STREAM, '"choices"'),
        (Fault.NOT_HTTP, FailureClass.MALFORMED_STREAM, "not HTTP"),
        (Fault.RESET, FailureClass.CONNECTION_LOST, "chunks"),
        (Fault.NO_ANSWER, FailureClass.CONNECTION_LOST, "after 0 chunks"),
    ],
)
def test_one_bad_answer_fails_alone_with_its_class_and_the_servers_words(
    fault: Fault, expected: FailureClass, words: str
) -> None:
    with serving(MockOpenAI(faults=[fault])) as server:
        result = load(server, concurrency=1, num_requests=3)
        assert len(server.bodies) == 3  # nothing is tried twice
    bad, *others = result.requests
    assert (bad.ok, bad.failure_class) == (False, expected)
    assert bad.failure_message is not None
    assert words in bad.failure_message
    assert len(bad.failure_message) < 600
    assert bad.http_status == {Fault.STATUS_503: 503, Fault.NOT_HTTP: None, Fault.NO_ANSWER: None}.get(fault, 200)
    assert bad.e2e_s is not None
    assert bad.sent_s + bad.e2e_s <= others[0].sent_s
    assert bad.tpot_s is None
    assert all(row.ok for row in others)


def test_a_server_that_falls_silent_runs_into_the_time_limit() -> None:
    with serving(MockOpenAI(faults=[Fault.HANG])) as server:
        bad, good = load(server, concurrency=1, num_requests=2, timeout_s=0.5).requests
        assert server.hung_up.acquire(timeout=5)  # its connection was closed, so vLLM would abort the request
    assert (bad.failure_class, bad.http_status, bad.chunks) == (FailureClass.TIMEOUT, 200, 4)
    assert bad.failure_message == "no end within 0.5 s, while streaming, after 4 chunks"
    assert good.ok


@pytest.mark.parametrize("uds", [None, "/nonexistent/socket"])
def test_nobody_there_fails_every_request(uds: str | None) -> None:
    result = load(MockOpenAI(url="http://127.0.0.1:9"), endpoint=Endpoint("http://127.0.0.1:9", "mock", uds=uds))
    assert [row.failure_class for row in result.requests] == [FailureClass.CONNECTION_FAILED] * 6
    assert all(row.http_status is None for row in result.requests)


async def test_cancelling_closes_the_connections() -> None:
    with serving(MockOpenAI(fault=Fault.HANG)) as server:
        task = asyncio.create_task(run_load(plan_for(server, concurrency=3)))
        for _ in range(3):
            assert await asyncio.to_thread(server.hanging.acquire, timeout=5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for _ in range(3):
            assert await asyncio.to_thread(server.hung_up.acquire, timeout=5)
        assert len(server.bodies) == 3  # and no further request was sent


def test_it_can_run_in_a_thread_of_its_own() -> None:
    results: list[LoadResult] = []
    with serving(MockOpenAI()) as server:
        thread = threading.Thread(target=lambda: results.append(load(server)))
        thread.start()
        thread.join(20)
    assert all(row.ok for row in results[0].requests)


@pytest.mark.parametrize(
    "changes",
    [
        {"concurrency": 0},
        {"num_requests": 0},
        {"output_tokens": 0},
        {"prompt_tokens": 0},
        {"prompt_tokens": 8, "shared_prefix": SharedPrefix(2, 8)},
        {"prompt_tokens": Uniform(8, 90), "shared_prefix": SharedPrefix(2, 8)},
        {"first_ordinal": -1},
        {"numbers": (0, 1)},
        {"timeout_s": 0.0},
        {"timeout_s": float("nan")},
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        plan_for(MockOpenAI(url="http://h"), **changes)


def test_an_open_loop_sends_when_requests_are_due_however_many_are_in_flight() -> None:
    due_s = (0.0, 0.05, 0.05, 0.1, 0.2)
    with serving(MockOpenAI(gate=4)) as server:  # nobody is answered until four are in flight
        plan = LoadPlan(Endpoint(server.url, "mock"), 1, 5, 8, 3, 0, 256, 0, 0.5, due_s=due_s)
        result = generate(plan)
    assert [row.ok for row in result.requests] == [True] * 4 + [False]
    assert server.max_in_flight == 4
    assert [row.due_s for row in result.requests] == pytest.approx(list(due_s))
    assert all(row.sent_s - (row.due_s or 0.0) >= 0 for row in result.requests)
    assert result.requests[4].sent_s >= 0.2
    assert (result.stopped_by, result.clients[0].streams) == ("requests", 4)


def slow_to_connect(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Every connection from now on takes so long, as to a far server behind TLS."""
    connect = Wire.connect

    async def slowly(wire: Wire) -> aiohttp.connector.Connection:
        await asyncio.sleep(seconds)
        return await connect(wire)

    monkeypatch.setattr(Wire, "connect", slowly)


def test_connecting_in_an_open_loop_is_a_time_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    slow_to_connect(monkeypatch, 0.2)
    with serving(MockOpenAI(gate=3)) as server:  # nobody is answered until three are in flight
        result = load(server, concurrency=1, num_requests=3, due_s=(0.0, 0.01, 0.02))
    rows = result.requests
    assert all(row.ok and row.connect_s is not None and row.due_s is not None for row in rows)
    connected, *others = [row.connect_s or 0.0 for row in rows]
    assert connected < min(others)  # one line is connected before the window
    assert min(others) > 0.15
    assert all(row.sent_s - (row.connect_s or 0.0) >= (row.due_s or 0.0) for row in rows)
    late = [row.sent_s - (row.due_s or 0.0) - (row.connect_s or 0.0) for row in rows]
    assert (send_delay_s(rows) or 0.0) <= max(late)
    assert result.clients[0].slip_max_s == pytest.approx(max(late))
    assert connecting_s(rows) == pytest.approx(max(others), rel=0.1)


async def test_what_the_event_loop_stood_while_connecting_is_the_clients_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the loop had stood for the last 0.1 of the 0.2 s that a connection took."""
    slow_to_connect(monkeypatch, 0.2)
    made: list[Watch] = []

    class Stalled(Watch):
        def stop(self, streams: int, duration_s: float) -> ClientRow:
            made.append(self)
            self.stalls = [Stall(duration_s, duration_s)]  # all the time
            return super().stop(streams, duration_s)

    monkeypatch.setattr("workers.load.client.Watch", Stalled)
    with serving(MockOpenAI(gate=2)) as server:
        result = await run_load(plan_for(server, concurrency=1, num_requests=2, due_s=(0.0, 0.01)))
    assert made
    assert [row.connect_s for row in result.requests] == pytest.approx([0.0, 0.0], abs=1e-9)
    assert (result.clients[0].slip_max_s or 0.0) > 0.15


def test_a_request_that_got_no_connection_was_not_in_flight() -> None:
    """Neither by counting nor by its stamps, so Little's law holds: that nobody accepts is the server's doing."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        port = full.getsockname()[1]
        taken = [socket.socket() for _ in range(3)]
        for each in taken:  # until the backlog is full: from then on nobody gets an answer to a connect
            each.setblocking(False)
            each.connect_ex(("127.0.0.1", port))
        plan = LoadPlan(Endpoint(f"http://127.0.0.1:{port}", "m"), 1, 3, 20, 3, 0, 256, 0, 0.7, due_s=(0.0, 0.01, 0.02))
        result = generate(plan)
        for each in taken:
            each.close()
    rows = result.requests
    assert {(row.failure_class, row.connect_s) for row in rows} == {(FailureClass.TIMEOUT, None)}
    assert all((row.e2e_s or 0.0) > 0.6 for row in rows)
    summary = summarize(rows, result.duration_s)
    assert (result.clients[0].held_s, summary.achieved_concurrency, summary.most_in_flight) == (0.0, 0.0, 0)
    assert not [words for words in client_limits(replace(result, requests=rows)) if "by their stamps" in words]


def late_by(directory: Path, seconds: float) -> StartLine:
    """A start that is so long past when this process comes to it."""
    (directory / "start").write_text(repr(time.monotonic() - seconds))
    return StartLine(str(directory), 1, 0)


def test_a_process_that_wakes_up_late_sends_an_open_loop_late(tmp_path: Path) -> None:
    due_s = (*(n / 100 for n in range(40)), 0.8)
    with serving(MockOpenAI()) as server:
        result = load(server, num_requests=41, due_s=due_s, start=late_by(tmp_path, 0.5))
    assert result.started_monotonic_s == float((tmp_path / "start").read_text())
    assert [row.due_s for row in result.requests] == pytest.approx(list(due_s))
    assert min(row.sent_s for row in result.requests) >= 0.5
    assert (result.clients[0].slip_max_s or 0.0) >= 0.49
    assert [words for words in client_limits(result) if "after they were due" in words]
    assert (result.clients[0].held_s or 0.0) <= (result.duration_s - 0.5) * result.clients[0].streams


def test_a_process_that_wakes_up_late_has_lost_a_closed_loops_concurrency(tmp_path: Path) -> None:
    with serving(MockOpenAI()) as server:
        result = load(server, num_requests=40, start=late_by(tmp_path, 5.0))
    assert all(row.ok for row in result.requests)
    assert result.duration_s >= 5.0
    assert (result.achieved_share or 1.0) < 0.95
    limits = client_limits(result)
    assert [words for words in limits if "of the streams were in flight" in words]
    assert (result.clients[0].held_s or 0.0) <= (result.duration_s - 5.0) * 2


def test_a_stream_whose_answer_broke_off_is_free_when_it_was_given_up() -> None:
    """The silence before is the server's, and no lateness of the client."""
    with serving(MockOpenAI(faults=[Fault.HANG, Fault.RESET])) as server:
        result = load(server, concurrency=1, num_requests=3, timeout_s=0.5)
    hung, reset, good = result.requests
    assert [row.ok for row in result.requests] == [False, False, True]
    slips = [later.sent_s - before.sent_s - (before.e2e_s or 0.0) for before, later in ((hung, reset), (reset, good))]
    assert result.clients[0].slip_max_s == pytest.approx(max(slips))


@pytest.mark.parametrize("number", NO_SOCKET)
def test_a_connection_that_the_clients_host_has_no_socket_for_is_not_the_servers_failure(number: int) -> None:
    key = ConnectionKey("127.0.0.1", 80, False, True, None, None, None)
    error = aiohttp.ClientConnectorError(key, OSError(number, os.strerror(number)))
    row = row_of(Sent(0, Asked(20, 8, True), Answer(0.0), error=error), 5.0, 0.0)
    assert row.failure_class == FailureClass.CLIENT_SOCKETS
    assert (row.failure_message or "").endswith("the client's limit, not the server's")
    refused = aiohttp.ClientConnectorError(key, OSError(errno.ECONNREFUSED, "refused"))
    row = row_of(Sent(0, Asked(20, 8, True), Answer(0.0), error=refused), 5.0, 0.0)
    assert row.failure_class == FailureClass.CONNECTION_FAILED


@pytest.mark.parametrize("due", [False, True])
def test_a_levels_first_request_does_not_wait_for_the_bodies_of_its_last(
    monkeypatch: pytest.MonkeyPatch, due: bool
) -> None:
    """Bodies are made as they are needed: at the end of a level there are no more than those of the streams ahead."""
    made: list[int] = []
    at_start: list[int] = []
    answered = Answer.__init__

    def prepare_counted(plan: LoadPlan) -> Iterator[Prepared | None]:
        for each in prepare(plan):
            if each is not None:
                made.append(each.ordinal)
            yield each

    def first_seen(answer: Answer, *arguments: float) -> None:
        answered(answer, *arguments)
        if arguments != (0.0,):  # that of a connection which waits
            at_start.append(len(made))

    monkeypatch.setattr(bodies_module, "prepare", prepare_counted)
    monkeypatch.setattr(Answer, "__init__", first_seen)
    with serving(MockOpenAI()) as server:
        due_s = tuple(n / 2000 for n in range(300)) if due else ()
        result = load(server, concurrency=2, num_requests=300, due_s=due_s, output_tokens=1)
    assert [row.ordinal for row in result.requests] == made == list(range(100, 400))
    assert all(row.ok for row in result.requests)
    assert at_start[0] == FEWEST_AHEAD


def test_a_levels_precision_is_judged_by_answers_not_by_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[tuple[float, float]] = []
    monkeypatch.setattr(Ending, "note", lambda _, first_s, last_s: noted.append((first_s, last_s)))
    with serving(MockOpenAI(faults=[Fault.STATUS_503, Fault.RESET, Fault.NO_ANSWER, Fault.HANG])) as server:
        rows = load(server, concurrency=1, num_requests=7, timeout_s=0.5).requests
    assert [first_s for first_s, _ in noted] == pytest.approx([row.ttft_s for row in rows if row.ok])
    assert [last_s for _, last_s in noted] == pytest.approx([row.last_byte_s for row in rows if row.ok])
    assert len(noted) == 3


async def test_bodies_are_made_ahead_again_in_idle_moments_and_no_more_after_the_end() -> None:
    plan = plan_for(MockOpenAI(url="http://h"), concurrency=4, num_requests=200)
    with contextlib.closing(Bodies(plan)) as bodies:
        taken = [next(bodies).ordinal for _ in range(FEWEST_AHEAD)]
        async with asyncio.timeout(5):
            while len(bodies._ready) < FEWEST_AHEAD:  # noqa: ASYNC110 - there is nothing to wait for
                await asyncio.sleep(0.001)
        taken += [each.ordinal for each in bodies]
        assert taken == list(range(100, 300))


@pytest.mark.parametrize(("hard", "refused"), [(50, True), (2000, False), (resource.RLIM_INFINITY, False)])
def test_a_level_that_needs_more_files_than_there_may_be_is_refused(
    monkeypatch: pytest.MonkeyPatch, hard: int, refused: bool
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (40, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    with pytest.raises(TooFewFiles, match="300 connections need 3") if refused else contextlib.nullcontext():
        allow_connections(300)
    assert asked == [(hard, hard)]


def test_an_open_loop_needs_a_moment_for_every_request() -> None:
    with pytest.raises(ValueError, match="one moment for each request"):
        LoadPlan(Endpoint("http://h", "m"), 1, 5, 8, 3, 0, 256, 0, 0.5, due_s=(0.0,))


def test_a_level_that_is_ended_by_time_sends_no_more_and_keeps_what_it_has_sent() -> None:
    with serving(MockOpenAI()) as server:
        plan = LoadPlan(Endpoint(server.url, "mock"), 2, 100_000 // 50, 8, 1, 0, 256, 0, 5.0, stop=Stop(0.15))
        result = generate(plan)
    assert result.stopped_by == "time"
    assert 2 <= len(result.requests) < 2000
    assert all(row.ok for row in result.requests)
    assert max(row.sent_s for row in result.requests) <= 0.2
