"""The benchmark against vLLM's own client: neither side may gain by coming first."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import chdir, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.against_vllm_bench import Client, Load, Peer, _compare, _our_turn, peer_process, started
from benchmarks.replay import Replay, prepare
from benchmarks.rounds import Stamps, pace
from benchmarks.turns import FIGURES, Figure, ServerView, Turn, difference, in_turns, ratio, report
from contract.rows import MEASURED
from tests.mock_openai import MockOpenAI, serving
from tests.test_session import spec, together
from workers import probe
from workers.histogram import Histogram
from workers.load.endpoint import Endpoint
from workers.load.plan import LoadPlan
from workers.load.stream import Asked
from workers.metrics import ServerMetrics
from workers.session import Session

NO_VIEW = ServerView(None, None, None, 0.0)


def test_sides_take_turns_in_coming_first_and_the_first_pair_is_thrown_away() -> None:
    order: list[str] = []

    def side(name: str) -> Callable[[int], Turn]:
        def turn(number: int) -> Turn:
            order.append(name)
            return Turn(number, 0.0, 0.0, 0.0, NO_VIEW, None)

        return turn

    ours, theirs = in_turns(3, side("a"), side("b"))
    assert "".join(order) == "abbaabba"
    assert [turn.tok_s for turn in ours] == [turn.tok_s for turn in theirs] == [1, 2, 3]
    order.clear()
    *_, replays = in_turns(2, side("a"), side("b"), side("c"))
    assert "".join(order) == "abccbaabc", "the first bodies are heard before they are replayed"
    assert [turn.tok_s for turn in replays] == [1, 2]


def test_ctrl_c_leaves_the_rounds_that_were_whole(capsys: pytest.CaptureFixture[str]) -> None:
    load = Load(64, 128, 16, 16)
    for rounds, said in ((3, "ours against theirs:\n  tok_s: 101.50 (101.00 to 102.00) against 201.50"), (1, "")):

        def ours(number: int) -> Turn:
            return Turn(100.0 + number, 1.0, 1.0, 1.0, NO_VIEW, None)

        def theirs(number: int, last: int = rounds) -> Turn:
            if number == last:
                raise KeyboardInterrupt
            return Turn(200.0 + number, 1.0, 1.0, 1.0, NO_VIEW, None)

        with pytest.raises(SystemExit, match=f"interrupted after {rounds - 1} whole rounds"):
            _compare(8, load, [ours, theirs], ["ours", "theirs"])
        out = capsys.readouterr().out
        assert said in out
        assert bool(out) == bool(said)


def test_a_ratio_is_that_of_the_pairs_so_what_both_sides_share_is_in_no_interval() -> None:
    """Drift of the server by 50 % from pair to pair, and a side that is 2 % faster in each."""
    exact = ratio([102.0, 153.0, 204.0], [100.0, 150.0, 200.0])
    assert exact is not None
    assert (exact.low, exact.centre, exact.high) == pytest.approx((1.02, 1.02, 1.02))


def test_a_ratios_interval_is_students() -> None:
    """Logarithms -0.01, 0, 0.01: sd 0.01, t(0.95, 2) = 2.920."""
    of = ratio([math.exp(-0.01), 1.0, math.exp(0.01)], [1.0, 1.0, 1.0])
    assert of is not None
    margin = 2.920 * 0.01 / math.sqrt(3)
    assert (of.low, of.centre, of.high) == pytest.approx((math.exp(-margin), 1.0, math.exp(margin)), rel=1e-5)


def test_one_pair_and_a_figure_of_nothing_have_no_ratio() -> None:
    assert ratio([1.0], [1.0]) is None
    assert ratio([0.0, 1.0], [1.0, 1.0]) is None


def test_the_servers_view_of_a_turn_is_what_it_gained() -> None:
    before = ServerMetrics(prefix_queries=100, prefix_hits=10, ttft_s=Histogram(5.0, 10), queue_s=Histogram(0.0, 10))
    after = ServerMetrics(prefix_queries=300, prefix_hits=20, ttft_s=Histogram(6.0, 14), queue_s=Histogram(0.4, 14))
    assert ServerView.between(before, after) == ServerView(0.25, 0.1, None, 0.05)


def test_mean_ttft_is_told_in_four_parts_that_add_up_to_it() -> None:
    turn = Turn(1.0, 0.1, 0.01, 0.5, ServerView(0.4, 0.1, 0.05, 0.0), None)
    parts = [figure.of(turn) for figure in FIGURES if figure.name.startswith("of mean_ttft_s ")]
    assert parts == pytest.approx([0.1, 0.25, 0.1, 0.05])
    assert sum(part for part in parts if part is not None) == pytest.approx(turn.mean_ttft_s)
    assert ServerView(0.4, None, 0.05, 0.0).before_engine_s is None


# --- pace ---


def two_streams(delays_s: list[tuple[float, float]], ttft_s: float = 0.1, answer_s: float = 1.0) -> list[Stamps]:
    """Three rounds of two streams: each sends its next request so long after its answer's last token."""
    made = []
    for stream in (0, 1):
        sent_s = 0.0
        for delays in [*delays_s, (0.0, 0.0)]:
            made.append(Stamps(sent_s, sent_s + ttft_s, sent_s + ttft_s + answer_s))
            sent_s = made[-1].end_s + delays[stream]
    return made


def test_pace_by_hand() -> None:
    """Delays 10 and 30 ms, then 20 and 80: ends at 1.1, 1.1, then 2.21, 2.23; sends at 1.11, 1.13, then 2.23, 2.31."""
    found = pace(two_streams([(0.010, 0.030), (0.020, 0.080)]), 2)
    assert found is not None
    assert found.turnaround_s == pytest.approx(0.025)  # of 10, 20, 30 and 80
    assert found.mean_turnaround_s == pytest.approx(0.035)
    assert found.idle_s == pytest.approx(0.125)
    assert found.mean_idle_s == pytest.approx(0.135)
    assert found.start_s == 0
    assert found.spread_s == pytest.approx(0.050)  # rounds of 20 and 80; the first, of 0, is not one of them


def test_the_first_rounds_sends_are_told_apart() -> None:
    stamps = [Stamps(0.0, 0.5, 1.0), Stamps(0.02, 0.5, 1.0), Stamps(1.0, 1.5, 2.0), Stamps(1.09, 1.5, 2.0)]
    found = pace(stamps, 2)
    assert found is not None
    assert found.start_s == 0.02
    assert found.spread_s == pytest.approx(0.09)


def test_requests_come_in_any_order_for_the_peer_tells_them_as_they_end() -> None:
    stamps = two_streams([(0.010, 0.030), (0.020, 0.080)])
    assert pace(stamps[::-1], 2) == pace(stamps, 2)


def test_one_in_flight_has_no_spread_and_a_single_round_no_pace() -> None:
    one = [Stamps(0.0, 0.1, 1.0), Stamps(1.002, 1.1, 2.0), Stamps(2.004, 2.2, 3.0)]
    found = pace(one, 1)
    assert found is not None
    assert found.turnaround_s == pytest.approx(0.003)
    assert found.spread_s == 0
    assert pace(one, 3) is None
    of_a_part = pace(one, 2)
    assert of_a_part is not None
    assert of_a_part.spread_s is None, "one request is no round of two"


@given(
    first_s=st.floats(0.0, 0.05), other_s=st.floats(0.0, 0.05), held_s=st.floats(0.05, 0.2), requests=st.integers(2, 9)
)
def test_a_difference_of_pace_alone_moves_turnaround_and_ttft_by_the_same_and_idle_not_at_all(
    first_s: float, other_s: float, held_s: float, requests: int
) -> None:
    """A server that is busy until `held_s` after an end answers then, whoever sent when."""

    def client(delay_s: float) -> list[Stamps]:
        made = [Stamps(0.0, held_s, held_s + 1)]
        for _ in range(requests):
            end_s = made[-1].end_s
            made.append(Stamps(end_s + delay_s, end_s + held_s, end_s + held_s + 1))
        return made

    one, other = pace(client(first_s), 1), pace(client(other_s), 1)
    assert one is not None
    assert other is not None
    assert one.idle_s == pytest.approx(other.idle_s)
    assert one.turnaround_s - other.turnaround_s == pytest.approx(first_s - other_s, abs=1e-9)


@given(st.lists(st.tuples(st.floats(0.0, 0.05), st.floats(0.0, 0.05)), min_size=1, max_size=6), st.floats(0.01, 0.3))
def test_mean_idle_is_mean_turnaround_and_mean_ttft(delays_s: list[tuple[float, float]], ttft_s: float) -> None:
    found = pace(two_streams(delays_s, ttft_s), 2)
    assert found is not None
    assert found.mean_idle_s == pytest.approx(found.mean_turnaround_s + ttft_s)
    assert found.turnaround_s >= -1e-9


# --- figures ---


def test_a_difference_is_of_the_pairs_in_their_unit() -> None:
    """Differences 1, 2 and 3 ms with a drift of both sides: mean 2, sd 1, t(0.95, 2) = 2.920."""
    of = difference([1.0, 12.0, 103.0], [0.0, 10.0, 100.0])
    assert of is not None
    margin = 2.920 / math.sqrt(3)
    assert (of.low, of.centre, of.high) == pytest.approx((2 - margin, 2.0, 2 + margin), rel=1e-4)
    assert difference([1.0], [0.0]) is None


def turn_of(stamps: list[Stamps], in_flight: int, hits: float = 0.0) -> Turn:
    return Turn(1.0, 0.1, 0.01, 0.1, ServerView(None, None, None, hits), pace(stamps, in_flight))


def test_what_can_be_nothing_is_told_as_a_difference_and_idle_as_a_ratio() -> None:
    slow = [turn_of(two_streams([(0.010, 0.030)]), 2), turn_of(two_streams([(0.010, 0.030)]), 2, hits=0.07)]
    prompt = [turn_of(two_streams([(0.0, 0.0)]), 2)] * 2
    lines = {line.split(":")[0]: line for line in report(slow, prompt)}
    assert lines["turnaround, median"].endswith("ms, +20.00 ms (90 % interval +20.00 to +20.00)")
    assert "20.00 (20.00 to 20.00) against 0.00 (0.00 to 0.00) ms" in lines["spread of a later round's sends, median"]
    assert "ratio 1.2000" in lines["idle, median"]
    assert lines["server_ttft_mean_s"] == "server_ttft_mean_s: not known of every turn"
    assert lines["prefix-cache hits"].startswith("prefix-cache hits: 3.50 (0.00 to 7.00) against 0.00 (0.00 to 0.00) %")


def test_a_level_of_one_round_has_no_pace_to_print() -> None:
    figure = Figure("idle", lambda turn: turn.pace.idle_s if turn.pace else None)
    assert figure.line([turn_of([Stamps(0, 1, 2)], 1)], [turn_of([Stamps(0, 1, 2)], 1)]) == (
        "idle: not known of every turn"
    )


# --- replay ---

BODY = {"model": "m", "repetition_penalty": 1.0, "max_tokens": 7, "logprobs": None, "stream": True, "ignore_eos": True}


def plan(requests: int, first_ordinal: int = 0) -> LoadPlan:
    return LoadPlan(Endpoint("http://localhost", "m"), 1, requests, 8, 7, first_ordinal, 100, 0, 1.0)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=6, max_size=20), max_size=20))
def test_no_replayed_text_begins_like_another_and_all_have_the_bytes_they_had(texts: list[str]) -> None:
    """So it is with texts that begin alike, too, or are one character again and again, as the peer draws some."""
    replay = Replay([BODY | {"prompt": text} for text in texts])
    replayed = [body["prompt"].encode() for _ in range(2) for body in replay.numbered()]
    assert [len(text) for text in replayed] == 2 * [len(text.encode()) for text in texts]
    assert len({text[:6] for text in replayed}) == len(replayed), "six bytes are within a block of 16 tokens"


def test_a_replayed_body_is_the_peers_but_for_its_texts_beginning() -> None:
    replay = Replay([BODY | {"prompt": "one two three four five"}] * 2)
    _, request = prepare(replay.numbered(), plan(2, first_ordinal=40))
    body = json.loads(request.body)
    assert body.pop("prompt") == "000001o three four five"
    assert body == BODY
    assert (request.ordinal, request.asked) == (41, Asked(7, True))


def test_our_client_is_a_process_of_its_own_that_sends_what_it_is_given() -> None:
    with serving(MockOpenAI()) as server, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        bodies = [BODY | {"prompt": "one two three"}, BODY | {"prompt": "six seven eight"}]
        client = started(Client(pool, replay=Replay(bodies)))
        endpoint = Endpoint(server.url, "mock")
        results = client([replace(plan(count), endpoint=endpoint) for count in (1, 2)])
        prompts = [body["prompt"] for body in server.bodies]
    assert [len(result.requests) for result in results] == [1, 2]
    assert isinstance(prompts[0], list)
    assert prompts[1:] == ["000000o three", "000001ven eight"]


def test_a_replays_warm_up_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer's prompts in it would be what the level's own then find in the cache."""
    from workers.load import bodies

    sent: list[bytes] = []
    monkeypatch.setattr(
        "benchmarks.against_vllm_bench.generate",
        lambda plan: sent.extend(each.body for each in bodies.prepare(plan) if each is not None),
    )
    replay = Replay([BODY | {"prompt": "one two three"}, BODY | {"prompt": "six seven eight"}])
    with ThreadPoolExecutor(1) as pool:
        client = Client(pool, replay=replay)
        client([plan(1)])
        client([plan(2)])
    prompts = [json.loads(body)["prompt"] for body in sent]
    assert [type(prompt) for prompt in prompts] == [list, str, str]


# --- the peer's process ---

SERVE = """
import json, os, types
from pathlib import Path
NOTED, POSTED = [], []
async def plain(request_func_input, session, pbar=None):
    async with session.post(url="u", json={"prompt": request_func_input, "max_tokens": 2}, headers={}):
        pass
    at = float(len(NOTED))
    NOTED.append(request_func_input)
    return types.SimpleNamespace(start_time=at, ttft=0.25, latency=0.75)
ASYNC_REQUEST_FUNCS = {"openai": plain, "vllm": plain}
class Response:
    async def __aenter__(self): return self
    async def __aexit__(self, *_): pass
class Session:
    def post(self, *, url, json, headers):
        POSTED.append(json["prompt"])
        return Response()
def add_cli_args(parser):
    for name in ASKED: parser.add_argument(name)
    parser.add_argument("--ignore-eos", action="store_true")
    parser.add_argument("--disable-tqdm", action="store_true")
async def main_async(args):
    request, session, many = ASYNC_REQUEST_FUNCS[args.backend], Session(), int(args.num_prompts)
    POSTED.clear()
    for _ in range(2): await request(request_func_input=f"{args.seed}, 0", session=session, pbar=None)
    print("Warmup run completed.")
    for number in range(many):
        await request(request_func_input=f"{args.seed}, {number}", session=session, pbar=None)
    Path("posted").write_text(json.dumps(POSTED))
    return {"completed": many, "total_input_tokens": 8 * many, "total_output_tokens": 2 * many,
            "output_throughput": 5.0, "median_ttft_ms": 250.0, "mean_ttft_ms": 260.0, "median_tpot_ms": 500.0,
            "unserializable": object()}
""".replace(
    "ASKED",
    "'--backend --random-input-len --random-output-len --num-prompts --max-concurrency --num-warmups --seed "
    "--temperature'.split()",
)
"""In the place of `vllm.benchmarks.serve`: the names that both 0.25 and 0.32 have."""


@contextmanager
def a_peer(directory: Path, serve: str) -> Iterator[Peer]:
    package = directory / "vllm" / "benchmarks"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package.parent / "__init__.py").touch()
    (package / "serve.py").write_text(serve)
    measuring = SimpleNamespace(scrape=lambda: ServerMetrics(generation_tokens=0), watched=nullcontext)
    session: Any = SimpleNamespace(measuring=measuring)
    with (
        tempfile.TemporaryFile() as errors,
        chdir(directory),
        peer_process({**os.environ, "PYTHONPATH": str(directory)}, errors) as process,
    ):
        yield Peer(session, process, errors, {"backend": "openai"})


def test_our_turn_is_sent_to_and_seen_on_the_socket_that_is_compared() -> None:
    ours, another = (Session(spec("tcp"), "r", 1, [card], together) for card in ("0", "1"))
    try:
        for each in (ours, another):
            assert each.start().status == MEASURED
        before = probe.server_metrics(ours.endpoint).generation_tokens
        assert before == 1, "its first completion"
        turn = _our_turn("another", ours, Load(2, 6, prompt_tokens=16, output_tokens=4), another.endpoint, 1)
        assert probe.server_metrics(ours.endpoint).generation_tokens == before
        sent = (probe.server_metrics(another.endpoint).generation_tokens or 0) - before
        assert sent >= (6 + 2) * 4, "its warm-up, too"
        assert turn.server.ttft_s is not None
    finally:
        for each in (ours, another):
            each.stop()


def test_of_the_peer_the_measured_requests_alone_are_told(tmp_path: Path) -> None:
    """Its second turn is heard by itself, too."""
    with a_peer(tmp_path, SERVE) as peer:
        for number in (0, 1):
            turn = peer.turn(Load(1, 3, prompt_tokens=8, output_tokens=2), number)
            assert [body["prompt"] for body in peer.replay.bodies] == [f"{1000 + number}, {each}" for each in range(3)]
            assert (turn.tok_s, turn.p50_ttft_s) == (5.0, 0.25)
            warm_ups = json.loads(Path(tmp_path, "posted").read_text())[:2]
            assert warm_ups == [f"w{2 * number + each:05}"[:6] + f"{1000 + number}, 0"[6:] for each in range(2)]
            assert turn.pace is not None
            assert (turn.pace.turnaround_s, turn.pace.idle_s) == (0.25, 0.5)
        process: subprocess.Popen[str] = peer.process
    assert process.returncode is not None, "it is gone with its turns"


def test_a_version_whose_requests_are_not_heard_is_said(tmp_path: Path) -> None:
    deaf = SERVE.replace("ASYNC_REQUEST_FUNCS[args.backend]", "plain")
    with a_peer(tmp_path, deaf) as peer, pytest.raises(SystemExit, match="0 of the peer's requests were heard"):
        peer.turn(Load(1, 3, prompt_tokens=8, output_tokens=2), 0)
