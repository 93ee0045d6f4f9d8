"""The tutorial's batch client as people run it: keys, exit codes, one-line messages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mock_openai import Fault, MockOpenAI, serving

from workers.load.__main__ import main

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
    assert len(set(prompts)) == len(prompts) == 16
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
    with serving(MockOpenAI(faults=[Fault.STATUS_503, Fault.ERROR_MID_STREAM])) as server:
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
    assert len({message["content"] for (message,) in messages}) == 8
    assert all(message["content"].endswith("Explain what a GPU is in one sentence.") for (message,) in messages)


@pytest.mark.parametrize("chat", [[], ["--chat"]])
@pytest.mark.parametrize(
    ("max_model_len", "tokens_of_a_word", "max_tokens", "words"),
    [
        (64, None, 64, "--max-tokens 64 leaves no room for a prompt in max_model_len 64 of mock"),
        (64, 1, 65, "--max-tokens 65 leaves no room for a prompt in max_model_len 64 of mock"),
        (80, 3, 54, "a prompt of 27 tokens and --max-tokens 54 do not fit max_model_len 80 of mock"),
        (80, 3, 53, ""),
        (80, None, 54, ""),  # nobody knows how long the prompt is
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


def test_help_names_the_units(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    for word in ("TOKENS", "SECONDS", "REQUESTS", "VLLM_API_KEY", "completion tokens", "130"):
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


def test_a_rate_adds_an_open_loop_and_leaves_the_tutorials_keys_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(MockOpenAI()) as server:
        code, report, err = run(capsys, "--url", server.url, *SMALL, "--rate", "200")
    assert (code, err) == (0, "")
    assert list(report)[:8] == TUTORIAL_KEYS
    assert (report["completed"], report["failed"], report["rate"]) == (12, 0, 200)
    assert report["open_loop_qps"] > 0
    assert report["open_loop_p99_ttft_s"] > 0
    assert len({json.dumps(body["prompt"]) for body in server.bodies}) == 12


@pytest.mark.parametrize("rate", ["0", "-1", "nan", "inf", "fast"])
def test_a_rate_that_sends_nothing_is_refused_before_anything_is_sent(
    capsys: pytest.CaptureFixture[str], rate: str
) -> None:
    with serving(MockOpenAI()) as server:
        code, report, err = run(capsys, "--url", server.url, "--rate", rate)
    assert (code, report, server.bodies) == (2, {}, [])
    assert f"must be a number of requests a second above 0, not {rate!r}" in err
