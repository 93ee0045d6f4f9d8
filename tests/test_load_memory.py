"""What answers take until they are judged: known, asked before anything is sent, and never more than the host has."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mock_openai import MockOpenAI, serving
from test_session import LEVEL, spec

from contract.failures import FailureClass
from contract.lengths import Uniform
from contract.rows import FAILED, MEASURED
from workers.load import memory
from workers.load.__main__ import main
from workers.load.client import generate
from workers.load.plan import LoadPlan, LoadResult
from workers.load.reads import BEGIN_BYTES, BYTES_A_READ, Reads, Room
from workers.load.sent import Sent, row_of
from workers.load.stream import Asked, digest
from workers.load.wire import Answer
from workers.session import Session

EVENT = (
    b'data: {"id":"cmpl-8d2b1f0c9a7e4d35a1b2c3d4e5f60718","object":"text_completion","created":1795567241,'
    b'"model":"phi-3-mini-4k","choices":[{"index":0,"text":" 8081","logprobs":null,"finish_reason":null,'
    b'"stop_reason":null,"token_ids":null,"prompt_logprobs":null,"prompt_token_ids":null}],"usage":null}\n\n'
)
READ = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
"""As vLLM 0.32 writes a token."""


def test_a_token_takes_what_it_is_said_to_take() -> None:
    """Its read is kept until the window has closed; of its row only the gap is left."""
    sent = Sent(0, Asked(2000, ignore_eos=True), Answer(0.0, status=200))
    sent.answer.reads.chunked = True
    tracemalloc.start()
    for number in range(2000):
        sent.answer.reads.at_s.append(0.01 * number)
        sent.answer.reads.data.append(bytes(bytearray(READ)))
    kept = row_of(sent, 1.0, 0.0)
    per_token = tracemalloc.get_traced_memory()[0] / 2000
    tracemalloc.stop()
    assert len(kept.gaps_us) == 1999
    assert 0.75 * memory.BYTES_A_TOKEN < per_token < memory.BYTES_A_TOKEN


def test_a_read_takes_beside_its_bytes_what_it_is_said_to_take() -> None:
    """A server may write two bytes at a time."""
    reads = Reads()
    tracemalloc.start()
    for number in range(2000):
        reads.at_s.append(0.01 * number)
        reads.data.append(bytes(bytearray(b"ab")))
    per_read = tracemalloc.get_traced_memory()[0] / 2000 - 2
    tracemalloc.stop()
    assert 0.7 * BYTES_A_READ < per_read < BYTES_A_READ


@given(st.integers(1, 10**5), st.floats(0, 1e12))
def test_one_loads_answers_that_all_take_the_most_fit_what_the_host_had_available(tokens: int, free: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "available_bytes", lambda: free)
        assert memory.most_requests(tokens) * memory.most_bytes(tokens) <= free


@given(st.integers(1, 10**5))
def test_an_answer_may_take_several_times_what_vllm_writes(tokens: int) -> None:
    """In reads of a size line, an event and a line end each, with usage and [DONE]."""
    assert (tokens + 3) * (len(READ) + 3 * BYTES_A_READ) < memory.most_bytes(tokens)


@given(st.lists(st.binary(max_size=3000), min_size=1, max_size=20))
def test_of_a_body_that_is_given_up_its_begin_is_kept(data: list[bytes]) -> None:
    reads = Reads(data, [float(at) for at in range(len(data))])
    reads.give_up()
    whole = b"".join(data)
    assert (reads.data, reads.begin, reads.size) == ([whole[:BEGIN_BYTES]], whole[:BEGIN_BYTES], len(whole))
    assert reads.at_s == [len(data) - 1]


PARTS = st.sampled_from(
    [
        b'data: {"choices": [{"index": 0, "text": "x"}]}',
        b"data: [DONE]",
        b": ",
        b"\n",
        b"\r",
        b"\r\n",
        b"\n\n",
        b"x" * 5000,
    ]
)


@given(st.lists(PARTS, max_size=30), st.lists(st.integers(0, 10**4), max_size=60), st.booleans(), st.data())
def test_merged_reads_say_what_each_said(
    parts: list[bytes], cuts: list[int], chunked: bool, data: st.DataObject
) -> None:
    """Whatever a body is and wherever it is cut: the same bytes, the same record, no read more than there were."""
    body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part for part in parts)
    body += b"0\r\n\r\n" if chunked else b""
    at = sorted({0, len(body), *(cut % (len(body) + 1) for cut in cuts)})
    pieces = [body[begin:end] for begin, end in pairwise(at)]
    each = Reads(pieces, [float(number) for number in range(len(pieces))], chunked)
    merged = Reads([], [], chunked)
    room = Room(merged, math.inf)
    for piece, at_s in zip(each.data, each.at_s, strict=True):
        merged.data.append(piece)
        merged.at_s.append(at_s)
        if data.draw(st.booleans()):
            room._merge()
    assert b"".join(merged.data) == body
    assert (merged.at_s[:1], merged.at_s[-1:]) == (each.at_s[:1], each.at_s[-1:])
    assert digest(merged) == digest(each)


@given(st.integers(1, 10**6), st.integers(1, 10**4), st.floats(0, 1e12))
def test_a_load_is_refused_when_and_only_when_its_answers_do_not_fit(requests: int, tokens: int, free: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "available_bytes", lambda: free)
        words = memory.refusal(requests, tokens)
        each = memory.BYTES_BESIDE + tokens * memory.BYTES_A_TOKEN
        fits = requests * each <= memory.SHARE * free
        assert (words is None) == fits
        assert memory.refusal(memory.most_requests(tokens), tokens) is None
        assert memory.refusal(memory.most_requests(Uniform(tokens, tokens)) + 1, tokens) is not None


def test_a_container_has_what_its_limit_leaves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    host = memory.available_bytes()
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 300000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.max").write_text("1000000\n")
    assert memory.available_bytes() == 600_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes() > 0.5 * host


@pytest.fixture
def room_for(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return what leaves room for so many answers of the level's length."""

    def leave(answers: int) -> None:
        free = (answers + 0.5) * (memory.BYTES_BESIDE + 8 * memory.BYTES_A_TOKEN) / memory.SHARE
        monkeypatch.setattr(memory, "available_bytes", lambda: free)

    return leave


def together(plans: list[LoadPlan]) -> list[LoadResult]:
    with ThreadPoolExecutor(len(plans)) as pool:
        return list(pool.map(generate, plans))


@pytest.fixture
def session() -> Iterator[Session]:
    one = Session(spec(), "run", 1, ["3"], together)
    one.start()
    yield one
    one.stop()


def test_a_level_too_large_for_the_host_fails_before_anything_is_sent(
    session: Session, room_for: Callable[[int], None]
) -> None:
    room_for(15)
    sent = session.row.requests_sent
    row = session.measure(LEVEL)
    assert (row.status, row.failure_class) == (FAILED, FailureClass.LOAD_TOO_LARGE)
    assert "16 answers of 8 tokens need" in (row.failure_message or "")
    assert session.row.requests_sent == sent
    room_for(16)
    assert session.measure(LEVEL).status == MEASURED


def test_a_long_level_ends_where_the_host_has_no_room_for_more_answers(
    session: Session, room_for: Callable[[int], None]
) -> None:
    room_for(20)
    row = session.measure(replace(LEVEL, seconds=60.0))
    assert (row.status, row.stopped_by, row.num_requests) == (MEASURED, "requests", 20)


def test_the_command_line_refuses_too(capsys: pytest.CaptureFixture[str], room_for: Callable[[int], None]) -> None:
    room_for(3)
    with serving(MockOpenAI()) as server:
        assert main(["--url", server.url, "--n", "4", "--concurrency", "2", "--max-tokens", "8"]) == 2
    assert "send 3 at the most" in capsys.readouterr().err
    assert server.bodies == []
