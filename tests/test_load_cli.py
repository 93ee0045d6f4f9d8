"""The tutorial's batch client as people run it: keys, exit codes, one-line messages."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import uvloop
from mock_openai import Fault, MockOpenAI, serving

from contract.rows import ClientRow, RequestRow
from workers.load import __main__ as command
from workers.load import progress
from workers.load.__main__ import main
from workers.load.client import run_load
from workers.load.endpoint import Endpoint
from workers.load.plan import LoadPlan, LoadResult
from workers.load.sent import Sent
from workers.load.stalls import HeldBack
from workers.load.stream import Asked
from workers.load.wire import Answer

TUTORIAL_KEYS = [
    "n",
    "concurrency",
    "sequential_s",
    "concurrent_s",
    "sequential_qps",
    "concurrent_qps",
    "sequential_tok_s",
    "concurrent_tok_s",
]
ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "workers.load"]
SMALL = ["--n", "4", "--concurrency", "2", "--max-tokens", "8"]


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Return the exit code, the printed report (empty if none) and the one line of complaint, if any."""
    try:
        code = main(arguments)
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    printed = capsys.readouterr()
    assert printed.err.count("\n") <= 1
    return code, json.loads(printed.out or "{}"), printed.err


def test_the_tutorials_command_prints_the_tutorials_keys_first() -> None:
    with serving(MockOpenAI()) as server:
        url = f"{server.url}/v1/completions"
        done = subprocess.run(
            [*COMMAND, "--url", url, *SMALL], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
        )
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert list(report)[:11] == [*TUTORIAL_KEYS, "completed", "failed", "model"]
    assert (report["n"], report["concurrency"], report["completed"], report["failed"]) == (4, 2, 8, 0)
    assert report["model"] == "mock"
    for half in ("sequential", "concurrent"):
        assert report[f"{half}_qps"] == pytest.approx(4 / report[f"{half}_s"])
        assert report[f"{half}_tok_s"] == pytest.approx(32 / report[f"{half}_s"])  # completion tokens alone
        for latency in ("e2e", "ttft"):
            p50, p95, p99 = (report[f"{half}_{p}_{latency}_s"] for p in ("p50", "p95", "p99"))
            assert 0 < p50 <= p95 <= p99 <= report[f"{half}_s"]


def test_no_prompt_is_ever_used_twice(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(MockOpenAI()) as server:
        for _ in range(2):
            assert run(capsys, "--url", server.url, *SMALL)[0] == 0
    prompts = [body["prompt"] for body in server.bodies]
    assert len(set(prompts)) == len(prompts) == 18  # each time one is tried before the load
    assert all(prompt.endswith("Explain what a GPU is in one sentence.") for prompt in prompts)


def test_one_half_is_sequential_the_other_concurrent(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(MockOpenAI()) as server:
        run(capsys, "--url", server.url, "--n", "4", "--concurrency", "1", "--max-tokens", "8")
        assert server.max_in_flight == 1
    with serving(MockOpenAI(faults=[Fault.HANG] * 6)) as server:
        run(capsys, "--url", server.url, "--n", "2", "--concurrency", "2", "--max-tokens", "8", "--timeout", "0.3")
        assert server.max_in_flight == 2


def test_key_comes_from_the_environment(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(MockOpenAI(api_key="k")) as server:
        code, _, complaint = run(capsys, "--url", server.url, *SMALL)
        assert code == 2
        assert "API key" in complaint
        monkeypatch.setenv("OPENAI_API_KEY", "k")
        assert run(capsys, "--url", server.url, *SMALL)[0] == 0
        monkeypatch.setenv("VLLM_API_KEY", "another")
        assert run(capsys, "--url", server.url, *SMALL)[0] == 2


def test_some_failures_are_reported_and_not_counted(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(MockOpenAI(faults=[Fault.NONE, Fault.STATUS_503, Fault.ERROR_MID_STREAM])) as server:
        code, report, complaint = run(capsys, "--url", server.url, *SMALL)
    assert (code, report["completed"], report["failed"], report["sequential_failed"]) == (0, 6, 2, 2)
    assert report["sequential_qps"] == pytest.approx(2 / report["sequential_s"])
    assert "2 requests failed" in complaint
    assert "no capacity" in complaint


def test_nothing_succeeded_is_exit_1_and_no_zeros(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(MockOpenAI(fault=Fault.SHORT)) as server:
        code, report, complaint = run(capsys, "--url", server.url, *SMALL)
    assert (code, report["completed"], report["failed"], report["sequential_qps"]) == (1, 0, 8, None)
    assert "wrong_token_count" in complaint


def test_answers_may_end_early_where_that_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(MockOpenAI(fault=Fault.STOPS_EARLY)) as server:
        code, report, _ = run(capsys, "--url", server.url, *SMALL, "--no-ignore-eos")
    assert (code, report["failed"]) == (0, 0)
    assert report["sequential_tok_s"] == pytest.approx(16 / report["sequential_s"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--n", "0"], "--n"),
        (["--concurrency", "x"], "--concurrency"),
        (["--max-tokens", "1.5"], "--max-tokens"),
        (["--timeout", "nan"], "--timeout"),
        (["--timeout", "-1"], "--timeout"),
        (["--model", ""], "--model: must not be empty"),
        (["--rate", "1e-308"], "would take more than a year"),
        (["--rate", "1e-7"], "would take more than a year"),
        (["--rate", "1e15"], "at most 100000 requests a second"),
        (["--api-key", "k"], "--api-key"),
        (["--url", "localhost:8000"], "http://"),
        (["--url", "http://127.0.0.1:9/v1/completions"], "cannot reach"),
    ],
)
def test_what_cannot_work_is_exit_2_and_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    code, report, complaint = run(capsys, *arguments)
    assert (code, report) == (2, {})
    assert words in complaint


def test_another_kind_of_server_and_an_unknown_model_are_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(MockOpenAI(models_body="<html>\n<body>hello</body></html>")) as server:
        code, _, complaint = run(capsys, "--url", server.url, *SMALL)
        assert (code, "no list of models" in complaint) == (2, True)
    with serving(MockOpenAI(models=("a", "b"))) as server:
        code, _, complaint = run(capsys, "--url", server.url, *SMALL, "--model", "c")
        assert (code, "serves a, b" in complaint) == (2, True)
        assert not server.bodies
        code, report, _ = run(capsys, "--url", server.url, *SMALL, "--model", "b")
        assert (code, report["model"], server.bodies[0]["model"]) == (0, "b", "b")


def test_a_server_without_a_list_of_models_serves_a_named_one(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(MockOpenAI(models_status=404)) as server:
        assert run(capsys, "--url", server.url, *SMALL)[0] == 2
        assert run(capsys, "--url", server.url, *SMALL, "--model", "m")[0] == 0


def test_chat_asks_for_chats(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(MockOpenAI()) as server:
        code, report, _ = run(capsys, "--url", f"{server.url}/v1/chat/completions", "--chat", *SMALL)
    assert (code, report["completed"], report["failed"]) == (0, 8, 0)
    messages = [body["messages"] for body in server.bodies]
    assert len({message["content"] for (message,) in messages}) == 9
    assert all(message["content"].endswith("Explain what a GPU is in one sentence.") for (message,) in messages)


@pytest.mark.parametrize("chat", [[], ["--chat"]])
@pytest.mark.parametrize(
    ("max_model_len", "tokens_of_a_word", "max_tokens", "words"),
    [
        (64, None, 64, "--max-tokens 64 leaves no room for a prompt in max_model_len 64 of mock"),
        (64, 1, 65, "--max-tokens 65 leaves no room for a prompt in max_model_len 64 of mock"),
        (80, 3, 54, "a prompt of 27 tokens and --max-tokens 54 do not fit max_model_len 80 of mock"),
        (80, 3, 53, ""),
        (None, 3, 10**6, ""),
    ],
)
def test_lengths_that_the_server_cannot_hold_are_refused_before_anything_is_sent(
    capsys: pytest.CaptureFixture[str],
    chat: list[str],
    max_model_len: int | None,
    tokens_of_a_word: int | None,
    max_tokens: int,
    words: str,
) -> None:
    with serving(
        MockOpenAI(max_model_len=max_model_len, tokens_of_a_word=tokens_of_a_word, tokens_per_chunk=10**6)
    ) as server:
        arguments = ["--url", server.url, "--n", "1", "--concurrency", "1", "--max-tokens", str(max_tokens), *chat]
        code, report, complaint = run(capsys, *arguments)
    if words:
        assert (code, report, len(server.bodies)) == (2, {}, 0)
        assert complaint == f"python -m workers.load: {words}\n"
    else:
        assert (code, report["completed"], complaint) == (0, 2, "")


@pytest.mark.parametrize("further", [[], ["--chat"], ["--rate", "100"]])
@pytest.mark.parametrize(
    ("max_model_len", "max_tokens", "words"),
    [
        (16, 7, ""),
        (16, 8, "a prompt of 9 tokens and --max-tokens 8 do not fit max_model_len 16 of mock"),
        (9, 4, "longer than max_model_len"),  # in the server's words, which refused the one request
    ],
)
def test_where_nobody_counts_a_text_one_request_of_one_token_tells_whether_it_fits(
    capsys: pytest.CaptureFixture[str], further: list[str], max_model_len: int, max_tokens: int, words: str
) -> None:
    with serving(MockOpenAI(max_model_len=max_model_len)) as server:
        code, report, complaint = run(
            capsys, "--url", server.url, "--n", "1", "--concurrency", "1", "--max-tokens", str(max_tokens), *further
        )
    assert server.bodies[0]["max_tokens"] == 1
    if words:
        assert (code, report, len(server.bodies)) == (2, {}, 1)
        assert words in complaint
    else:
        parts = 3 if "--rate" in further else 2
        assert (code, report["completed"], len(server.bodies)) == (0, parts, parts + 1)
        assert len({json.dumps(body.get("prompt", body.get("messages"))) for body in server.bodies}) == parts + 1


@pytest.mark.parametrize("fault", [Fault.STATUS_503, Fault.NOT_A_STREAM])
def test_a_server_that_counts_nothing_is_measured_all_the_same(
    capsys: pytest.CaptureFixture[str], fault: Fault
) -> None:
    with serving(MockOpenAI(max_model_len=80, faults=[fault])) as server:
        code, report, _ = run(capsys, "--url", server.url, *SMALL)
    assert (code, report["completed"]) == (0, 8)


@pytest.mark.parametrize("max_model_len", [None, 80])
@pytest.mark.parametrize("tokens_of_a_word", [None, 1])
def test_a_server_that_refuses_such_requests_gets_one(
    capsys: pytest.CaptureFixture[str], max_model_len: int | None, tokens_of_a_word: int | None
) -> None:
    """Whether its models are listed, their length with them, and texts are counted, or not."""
    mock = MockOpenAI(fault=Fault.UNKNOWN_FIELD, max_model_len=max_model_len, tokens_of_a_word=tokens_of_a_word)
    with serving(mock) as server:
        code, report, complaint = run(capsys, "--url", server.url, *SMALL)
        assert (code, report, len(server.bodies)) == (2, {}, 1)
        assert "unrecognized field: ignore_eos" in complaint
        code, report, _ = run(capsys, "--url", server.url, *SMALL, "--no-ignore-eos")
        assert (code, report["completed"]) == (0, 8)


@pytest.mark.parametrize("chat", [[], ["--chat"]])
@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("<html>\n<body>hello</body></html>", "no JSON object"),
        ("", "no JSON object"),
        ("[1]", "no JSON object"),
        ("{}", "{}"),
        ('{"choices": null}', '{"choices": null}'),
        ('{"choices": {}}', '{"choices": {}}'),
        ('{"error": {"message": "no such\\nmodel"}}', '{"error": {"message": "no such\\nmodel"}}'),
        ('{"choices": [], "error": "overloaded"}', '{"choices": [], "error": "overloaded"}'),
        (json.dumps({"error": "e" * 999}), '{"error": "' + "e" * 189),
    ],
)
def test_a_server_that_answers_200_and_no_completion_gets_one_request(
    capsys: pytest.CaptureFixture[str], body: str, words: str, chat: list[str]
) -> None:
    with serving(MockOpenAI(completions_body=body)) as server:
        code, report, complaint = run(capsys, "--url", server.url, *SMALL, *chat)
    assert (code, report, len(server.bodies)) == (2, {}, 1)
    url = f"{server.url}/v1/{'chat/completions' if chat else 'completions'}"
    no_server = "no OpenAI-compatible server?"
    assert complaint == f"python -m workers.load: {url} answered HTTP 200 and no completion ({words}): {no_server}\n"


@pytest.mark.parametrize(("status", "requests"), [(302, 1), (202, 1), (404, 1), (501, 1), (505, 1), (429, 9), (500, 9)])
def test_a_status_of_a_server_that_takes_no_such_requests_ends_it_before_the_load(
    capsys: pytest.CaptureFixture[str], status: int, requests: int
) -> None:
    with serving(MockOpenAI(completions_body="nope", completions_status=status)) as server:
        code, _, complaint = run(capsys, "--url", server.url, *SMALL)
    assert len(server.bodies) == requests
    assert code == (2 if requests == 1 else 1)
    assert f"HTTP {status}" in complaint


def test_a_server_that_streams_whatever_is_asked_for_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(MockOpenAI(always_streams=True)) as server:
        code, report, _ = run(capsys, "--url", server.url, *SMALL)
    assert (code, report["completed"], len(server.bodies)) == (0, 8, 9)


def test_an_error_of_null_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(MockOpenAI(completions_body='{"choices": [], "error": null}')) as server:
        code, _, _ = run(capsys, "--url", server.url, *SMALL)
    assert (code, len(server.bodies)) == (1, 9)


def test_a_wrong_path_is_found_by_one_request_where_no_list_of_models_tells(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(MockOpenAI()) as server:
        code, report, complaint = run(capsys, "--url", f"{server.url}/wrong", *SMALL, "--model", "mock")
        assert (code, report, server.bodies) == (2, {}, [])
        assert f"{server.url}/wrong/v1/completions answered HTTP 404" in complaint
    with serving(MockOpenAI(models_status=404, max_model_len=3)) as server:
        code, report, complaint = run(capsys, "--url", server.url, *SMALL, "--model", "m")
        assert (code, report, len(server.bodies), server.bodies[0]["max_tokens"]) == (2, {}, 1, 1)
        assert "longer than max_model_len" in complaint  # in the server's words


def test_a_busy_server_without_a_list_of_models_is_measured_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(MockOpenAI(models_status=404, faults=[Fault.STATUS_503])) as server:
        code, report, _ = run(capsys, "--url", server.url, *SMALL, "--model", "m")
    assert (code, report["completed"], report["failed"]) == (0, 8, 0)
    assert len({body["prompt"] for body in server.bodies}) == 9


def test_the_url_of_chats_asks_for_chats(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(MockOpenAI()) as server:
        code, report, _ = run(capsys, "--url", f"{server.url}/v1/chat/completions", *SMALL)
    assert (code, report["completed"]) == (0, 8)
    assert all("messages" in body for body in server.bodies)


LATE = ["a load process was late"]


def limited(result: LoadResult) -> list[str]:
    return LATE if result.clients[0].streams == 2 else []


def test_a_part_that_measured_the_client_is_called_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(MockOpenAI()) as server:
        _, report, complaint = run(capsys, "--url", server.url, *SMALL)
        assert (report["sequential_client_limited"], report["concurrent_client_limited"]) == (None, None)  # too short
        assert complaint == ""
        monkeypatch.setattr(command, "client_limits", limited)
        monkeypatch.setattr(command, "JUDGED_FROM_S", 0.0)
        _, report, complaint = run(capsys, "--url", server.url, *SMALL)
    assert (report["sequential_client_limited"], report["concurrent_client_limited"]) == ([], LATE)
    assert "concurrent: this client was the limit" in complaint
    assert "a load process was late" in complaint


def test_a_late_client_is_called_so_by_what_it_says_of_itself() -> None:
    args = argparse.Namespace(n=30, concurrency=2, rate=None)
    rows = [RequestRow(n, sent_s=n // 2 * 0.1, ok=True, e2e_s=0.1) for n in range(30)]
    calm, busy = ClientRow(2, 0.1), ClientRow(2, 0.99)
    parts = {
        name: LoadResult(rows, 1.5, 0.0, 0.0, [client]) for name, client in (("sequential", calm), ("concurrent", busy))
    }
    report = command._report(args, command._Measured("m", parts))
    assert "busy" in report["concurrent_client_limited"][0]
    assert not any("busy" in words for words in report["sequential_client_limited"])


def test_what_a_client_added_is_noted_whether_it_was_the_limit_or_not() -> None:
    e2e_s = [0.187] * 4 + [0.1] * 196
    rows = [RequestRow(n, n * 0.1, True, e2e_s=e2e_s[n], tpot_s=0.01, completion_tokens=11) for n in range(200)]
    client = ClientRow(1, 0.1, gap_p99_raised_s=0.5, slip_p99_s=0.0019, lag_p99_s=0.0123)
    late = HeldBack(e2e=((0.187, 0.1),) * 4, tpot=((0.01, 0.0097),) * 200)  # 2 % of the requests: in no p95
    assert command._client_notes("x", LoadResult(rows, 20.0, 0.0, 0.0, [client], held_back=late)) == [
        "x: stalls of load processes raised the level's p99 of E2EL by 87 ms",
        "x: stalls of load processes raised the level's p95 of TPOT by 0.3 ms",
        "x: the load client's event loop was up to 12 ms late (p99)",
    ]
    assert command._client_notes("x", LoadResult(rows, 20.0, 0.0, 0.0, [ClientRow(1, 0.1)])) == []
    assert command._client_notes("x", LoadResult(rows, 0.4, 0.0, 0.0, [client], held_back=late)) == []  # too short


@pytest.mark.parametrize(
    ("n", "note"),
    [
        (1, "p95 and p99 of 1 requests: between the two highest"),
        (20, "p95 and p99 of 20 requests: between the two highest"),
        (21, "p99 of 21 requests: between the two highest"),
        (100, "p99 of 100 requests: between the two highest"),
        (101, None),
        (0, None),
    ],
)
def test_percentiles_of_too_few_requests_say_so(n: int, note: str | None) -> None:
    """The rank of a percentile is (n - 1) q; from the last but one on, it lies between the two highest values."""
    assert command._tail_note("x", n) == (None if note is None else f"x: {note}")


def test_a_loop_slower_than_uvloop_is_noted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(MockOpenAI()) as server:
        monkeypatch.setattr(uvloop, "__version__", "0.22.1")
        _, report, _ = run(capsys, "--url", server.url, *SMALL)
    (note,) = [each for each in report["notes"] if "asyncio's loop (uvloop 0.22.1 is too old)" in each]
    assert note.endswith("install uvloop 0.23 or newer")


def test_notes_stand_in_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(MockOpenAI()) as server:
        _, report, _ = run(capsys, "--url", server.url, *SMALL)
    assert report["notes"] == [
        f"{part}: p95 and p99 of 4 requests: between the two highest" for part in ("sequential", "concurrent")
    ]


def test_a_server_that_answers_nothing_is_not_waited_for_to_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LOOK_S", 0.05)
    with serving(MockOpenAI(fault=Fault.HANG)) as server:
        arguments = ["--url", server.url, "--n", "500", "--timeout", "0.1", "--max-tokens", "8"]
        code, report, complaint = run(capsys, *arguments)
        assert len(server.bodies) < 10
    assert (code, report["completed"], report["sequential_s"], report["concurrent_qps"]) == (1, 0, None, None)
    assert f"sequential: no whole answer within 0.1 s to the first {report['failed']} requests: given up" in complaint


def test_a_server_that_falls_silent_in_the_middle_of_a_part_is_not_waited_for_to_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LOOK_S", 0.05)
    faults = [Fault.NONE, Fault.NONE, Fault.STATUS_503, Fault.NONE]  # the first is that which is tried
    with serving(MockOpenAI(faults=faults, fault=Fault.HANG)) as server:
        arguments = ["--url", server.url, "--n", "50", "--timeout", "0.2", "--max-tokens", "8"]
        code, report, complaint = run(capsys, *arguments)
        assert 7 <= len(server.bodies) < 10
    assert (code, report["completed"], report["sequential_s"], report["concurrent_qps"]) == (0, 2, None, None)
    assert report["failed"] == 4  # that with HTTP 503, too
    words = "sequential: no whole answer within 0.2 s to 3 requests in a row, after 3 answers: given up"
    assert complaint == f"python -m workers.load: {words}\n"
    assert report["notes"] == [words]


def timed_out(sent_s: float) -> Sent:
    return Sent(0, Asked(8, True), Answer(sent_s, 0), ended_s=sent_s + 10.0, error=TimeoutError())


def test_only_what_was_sent_after_the_last_answer_tells_of_silence() -> None:
    """Of many in flight at a busy server several may run out of time at once, while it answers the others."""
    count = progress._Count()
    for sent_s in (0.0, 0.0, 0.0):
        count.take(timed_out(sent_s))
    assert count.unanswered == 3
    count.take(Sent(3, Asked(8, True), Answer(2.0, 0), ended_s=11.0))
    for sent_s in (3.0, 3.0, 3.0, 10.9):
        count.take(timed_out(sent_s))
    assert count.unanswered == 0
    for sent_s in (11.0, 12.0):
        count.take(timed_out(sent_s))
    assert (count.unanswered, count.answered, len(count.ended)) == (2, 1, 10)


@pytest.mark.parametrize(
    ("answered", "further", "given_up", "kept"),
    [
        (10, [], "concurrent", ["sequential"]),
        (10, ["--rate", "10"], "concurrent", ["sequential"]),
        (20, ["--rate", "10"], "open_loop", ["sequential", "concurrent"]),
    ],
)
def test_what_was_measured_before_a_server_fell_silent_is_printed(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    answered: int,
    further: list[str],
    given_up: str,
    kept: list[str],
) -> None:
    monkeypatch.setattr(progress, "LOOK_S", 0.05)
    monkeypatch.setattr(progress, "HOPELESS", 1)
    with serving(MockOpenAI(faults=[Fault.NONE] * (1 + answered), fault=Fault.HANG)) as server:
        arguments = ["--url", server.url, *SMALL, "--n", "10", "--timeout", "0.3", *further]
        code, report, complaint = run(capsys, *arguments)
    assert (code, report["completed"]) == (0, answered)
    assert report["failed"] >= 1
    parts = ["sequential", "concurrent", *(["open_loop"] if further else [])]
    for part in parts:
        totals = [report[f"{part}_{key}"] for key in ("s", "qps", "tok_s")]
        assert all(totals) if part in kept else totals == [None] * 3
        assert (f"{part}_p50_ttft_s" in report) == (part in kept)
    assert list(report)[:8] == TUTORIAL_KEYS
    assert complaint.startswith(f"python -m workers.load: {given_up}: no whole answer within 0.3 s to the first ")
    assert report["notes"][0] in complaint


def test_a_terminal_sees_how_far_a_part_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOOK_S", 0.02)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with serving(MockOpenAI(faults=[Fault.NONE, Fault.NONE, Fault.HANG])) as server:
        arguments = ["--url", server.url, "--n", "3", "--timeout", "0.3", "--max-tokens", "8"]
        assert main(arguments) == 0
    shown = capsys.readouterr().err
    assert "sequential: 1 of 3 ended, 0 s" in shown


def test_who_reads_only_the_beginning_gets_no_traceback() -> None:
    with serving(MockOpenAI()) as server:
        shell = f"{' '.join(COMMAND)} --url {server.url} {' '.join(SMALL)} | true; echo ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_more_connections_than_open_files_are_refused_and_a_soft_limit_is_raised() -> None:
    with serving(MockOpenAI()) as server:
        command_line = f"exec {' '.join(COMMAND)} --url {server.url} --n 90 --concurrency 90 --max-tokens 1"
        for limit, code, answered in (("-Sn 64", 0, 181), ("-n 64", 2, 0)):
            server.bodies.clear()
            done = subprocess.run(
                ["bash", "-c", f"ulimit {limit}; {command_line}"],
                cwd=ROOT, capture_output=True, text=True, timeout=30, check=False,
            )  # fmt: skip
            assert (done.returncode, len(server.bodies)) == (code, answered), done.stderr
            assert ("90 connections need" in done.stderr) == bool(code)


def test_help_names_the_units(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    for word in ("TOKENS", "SECONDS", "REQUESTS", "VLLM_API_KEY", "completion tokens", "130", "SSL_CERT_FILE"):
        assert word in text


def test_interrupting_is_exit_130_without_a_traceback() -> None:
    with serving(MockOpenAI(fault=Fault.HANG)) as server:
        with subprocess.Popen(
            [*COMMAND, "--url", server.url, *SMALL],
            cwd=ROOT,
            env={key: value for key, value in os.environ.items() if not key.endswith("_API_KEY")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as client:
            assert server.hanging.acquire(timeout=20)
            client.send_signal(signal.SIGINT)
            out, err = client.communicate(timeout=20)
        assert server.hung_up.acquire(timeout=5)
    assert (client.returncode, out, err) == (130, "", "python -m workers.load: interrupted\n")


@pytest.mark.parametrize(
    ("answered", "further", "broken_off", "kept"),
    [
        (4, [], "concurrent", ["sequential"]),
        (6, ["--rate", "100"], "concurrent", ["sequential"]),
        (8, ["--rate", "100"], "open_loop", ["sequential", "concurrent"]),
    ],
)
def test_what_was_measured_before_an_interruption_is_printed(
    answered: int, further: list[str], broken_off: str, kept: list[str]
) -> None:
    with serving(MockOpenAI(faults=[Fault.NONE] * (1 + answered), fault=Fault.HANG)) as server:
        with subprocess.Popen(
            [*COMMAND, "--url", server.url, *SMALL, *further],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as client:  # fmt: skip
            assert server.hanging.acquire(timeout=20)
            client.send_signal(signal.SIGINT)
            out, err = client.communicate(timeout=20)
        assert server.hung_up.acquire(timeout=5)
    assert (client.returncode, err) == (130, f"python -m workers.load: {broken_off}: interrupted\n")
    report = json.loads(out)
    assert list(report)[:8] == TUTORIAL_KEYS
    assert (report["completed"], report["failed"]) == (4 * len(kept), 0)
    for part in ["sequential", "concurrent", *(["open_loop"] if further else [])]:
        totals = [report[f"{part}_{key}"] for key in ("s", "qps", "tok_s")]
        assert all(totals) if part in kept else totals == [None] * 3
        assert (f"{part}_p50_ttft_s" in report) == (part in kept)
    assert report["notes"][0] == f"{broken_off}: interrupted"


@pytest.mark.parametrize(("judged", "code", "note"), [(1, 130, "concurrent: interrupted"), (2, 0, None)])
def test_an_interruption_while_a_part_is_judged_does_not_lose_it(
    judged: int, code: int, note: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[LoadResult] = []

    async def interrupted(plan: LoadPlan, told: Any) -> LoadResult:
        ended.append(await run_load(plan, told))
        if len(ended) == judged:
            signal.raise_signal(signal.SIGINT)  # as it would come in the midst of work that awaits nothing
        return ended[-1]

    monkeypatch.setattr(progress, "run_load", interrupted)
    with serving(MockOpenAI()) as server:
        found, report, _ = run(capsys, "--url", server.url, *SMALL)
    assert (found, report["completed"]) == (code, 4 * judged)
    assert (note is None) or report["notes"][0] == note


def test_a_rate_adds_an_open_loop_and_leaves_the_tutorials_keys_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(MockOpenAI()) as server:
        code, report, err = run(capsys, "--url", server.url, *SMALL, "--rate", "200")
    assert (code, err) == (0, "")
    assert list(report)[:8] == TUTORIAL_KEYS
    assert (report["completed"], report["failed"], report["rate"]) == (12, 0, 200)
    assert report["open_loop_qps"] > 0
    assert report["open_loop_p99_ttft_s"] > 0
    assert report["open_loop_p99_send_delay_s"] >= 0
    assert report["open_loop_p99_connect_s"] >= 0
    assert 20 < report["open_loop_offered_qps"] < 2000  # of four arrivals
    assert len({json.dumps(body["prompt"]) for body in server.bodies}) == 13


@pytest.mark.parametrize("rate", ["0", "-1", "nan", "inf", "fast"])
def test_a_rate_that_sends_nothing_is_refused_before_anything_is_sent(
    capsys: pytest.CaptureFixture[str], rate: str
) -> None:
    with serving(MockOpenAI()) as server:
        code, report, err = run(capsys, "--url", server.url, "--rate", rate)
    assert (code, report, server.bodies) == (2, {}, [])
    assert f"must be a number of requests a second above 0, not {rate!r}" in err


@pytest.mark.parametrize(
    ("rate", "e2e_s", "lines"), [(2.0, 2.2, 5), (100.0, 2.2, 8), (0.1, 0.2, 1), (1e9, 0.2, 8), (100.0, None, 1)]
)
def test_an_open_loop_has_lines_for_what_its_rate_is_expected_to_bring(
    rate: float, e2e_s: float | None, lines: int
) -> None:
    """Rate times the time in the server, as far as there are files and requests for them."""
    plan = LoadPlan(Endpoint("http://h", "m"), 1, 32, 8, 3, 0, 256, 0, 0.5, due_s=(0.0,) * 32)
    rows = [RequestRow(n, 0.0, ok=e2e_s is not None, e2e_s=e2e_s) for n in range(32)]
    assert command._lines(plan, rate, 8, LoadResult(rows, 3.0, 0.0, 0.0, [])) == lines


def test_an_open_loops_lines_are_connected_before_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[LoadPlan] = []

    async def kept(name: str, plan: LoadPlan, parts: dict[str, LoadResult]) -> None:
        plans.append(plan)
        await progress.run_watched(name, plan, parts)

    monkeypatch.setattr(command, "run_watched", kept)
    monkeypatch.setattr(command, "_lines", lambda *_: 3)
    with serving(MockOpenAI()) as server:
        run(capsys, "--url", server.url, *SMALL, "--rate", "200")
    assert [(plan.concurrency, bool(plan.due_s)) for plan in plans] == [(1, False), (2, False), (3, True)]


UNWATCHED = "import sys; from workers.load import __main__, progress; progress.LOOK_S = 60; sys.exit(__main__.main())"


def test_an_open_loop_that_runs_out_of_files_is_limited_by_its_client() -> None:
    """All but its first requests stay in flight: more than this process may have connections. Nobody looks how far the
    part is meanwhile, so it is not given up."""
    n = 80
    with serving(MockOpenAI(faults=[Fault.NONE] * (2 * n + 3), fault=Fault.HANG)) as server:
        arguments = f"--url {server.url} --n {n} --concurrency 2 --max-tokens 2 --rate 1000 --timeout 2"
        done = subprocess.run(
            ["bash", "-c", f"ulimit -n 60; exec {shlex.join([sys.executable, '-c', UNWATCHED])} {arguments}"],
            cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    report = json.loads(done.stdout)
    assert done.returncode == 0
    (words,) = [words for words in report["open_loop_client_limited"] if "requests got no connection" in words]
    assert int(words.split()[0]) > n - 60
    assert "this client was the limit" in done.stderr
    assert not [words for words in report["concurrent_client_limited"] or () if "got no connection" in words]
