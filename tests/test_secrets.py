"""Secrets of the environment stand in nothing that a run writes, says or shows; nothing of a grid reaches a shell."""

import base64
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from contract.rows import FAILED, MEASURED
from orchestrator.manifest import make_manifest
from orchestrator.plan import make_plan
from orchestrator.problems import ConfigError
from tests.command_line import ROOT, Place
from tests.configs import experiment, resolved, sim_fleet
from tests.test_session import LEVEL, spec, together
from workers.load.plan import LoadPlan, LoadResult
from workers.provenance import Places, masked, shown_environment, without_prompts
from workers.secrecy import MASK, hidden, is_named_secret, secret_values
from workers.session import Session

PLACES = Places(Path("/private"))
FAKE = {
    "HF_TOKEN": "hf_fakeFAKEfake0001",
    "OPENAI_API_KEY": "sk-fakeFAKEfake0002",
    "VLLM_API_KEY": "key-fakeFAKEfake0003",
    "AWS_SECRET_ACCESS_KEY": "aws/fakeFAKE+fake0004",
    "HTTPS_PROXY": "http://someone:fakeFAKEfake0005@127.0.0.1:9",
    "VLLM_MIRROR": "https://someone:fakeFAKEfake0006@mirror.invalid/path",
    "MY_PASSWORD": "fake'FAKE\"fake\\0007",
}
LOGGED_IN = "hf_fakeFAKEfake0008"
SECRETS = ["fake0001", "fake0002", "fake0003", "fake0004", "fakeFAKEfake0005", "fakeFAKEfake0006", "\\0007", "fake0008"]
TELLTALE = """
import os, sys
if any("sim_server" in word for word in sys.orig_argv):
    print("everything I know:", dict(os.environ), flush=True)
    print("and:", open(os.environ["HF_HOME"] + "/token").read(), flush=True)
"""
"""Has the server write its whole environment and the user's token into its log, as a careless library might."""


@pytest.mark.ray
@pytest.mark.parametrize(("more", "code"), [([], 0), (["server.extra_args={fail: boom}"], 3)])
@pytest.mark.parametrize("transport", ["uds", "tcp"])
def test_no_secret_is_written_said_or_shown(
    place: Place, tmp_path: Path, transport: str, more: list[str], code: int
) -> None:
    (tmp_path / "telltale").mkdir()
    (tmp_path / "telltale" / "sitecustomize.py").write_text(TELLTALE)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text(f"{LOGGED_IN}\n")
    outputs = tmp_path / "outputs"
    environment = {**place.environment(), **FAKE, "HF_HOME": str(tmp_path / "hf")}
    environment["PYTHONPATH"] = f"{tmp_path / 'telltale'}:{ROOT}"
    command = [
        sys.executable, "-m", "orchestrator", "+sweep=concurrency", "sweep.concurrency=[1]", "engine=sim",
        "load.requests_min=4", "load.requests_per_level=1", "load.output_tokens=4", f"output_root={outputs}",
        f"server.transport={transport}", *more,
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    titles: set[str] = set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    titles.add(path.read_bytes().decode(errors="replace"))
                except OSError:
                    continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    said = process.communicate(timeout=120)[0]
    ended.set()
    watcher.join()
    assert process.returncode == code, said
    written = {str(path): path.read_bytes() for path in outputs.rglob("*") if path.is_file()}
    (log,) = [content.decode() for name, content in written.items() if name.endswith(".log")]
    assert "everything I know" in log, "the server did not try"
    assert MASK in log
    assert any("sim_server" in title for title in titles)
    for secret in SECRETS:
        assert secret not in said
        assert not [title for title in titles if secret in title]
        assert not [name for name, content in written.items() if secret.encode() in content]


@given(st.text(min_size=8).filter(str.strip), st.text(), st.text())
def test_a_secret_is_masked_wherever_it_stands(secret: str, before: str, after: str) -> None:
    values = secret_values({"SOME_API_KEY": secret})
    if values:
        assert secret not in masked(f"{before}{secret}{after}", PLACES, *values).replace(MASK, "\0") or secret in MASK


def escaped(text: str) -> list[str]:
    """A text as it stands inside what Python and JSON write, and one of them inside the other."""
    said = [repr({"k": f"{before}{text}{after}"}) for before, after in [("", "'"), ('"', "'"), ("", "")]]
    said += [ascii(text), repr(text.encode()), json.dumps([text]), json.dumps(text, ensure_ascii=False)]
    return [*said, *map(repr, said), *map(json.dumps, said)]


@given(st.text(min_size=8).filter(lambda text: len(text.strip()) >= 8))
@example('it\'s a "secret\\" \n é \U0001f600')
@example("'" * 9)
def test_a_secret_is_masked_as_python_and_json_quote_it(secret: str) -> None:
    for text in escaped(secret):
        assert MASK in hidden(text, secret)


def test_a_secret_is_masked_as_urls_write_it() -> None:
    assert hidden("GET /?key=a%2Fsecret%20key HTTP/1.1", "a/secret key") == f"GET /?key={MASK} HTTP/1.1"
    assert hidden("GET /?key=a%2Fsecret+key HTTP/1.1", "a/secret key") == f"GET /?key={MASK} HTTP/1.1"
    assert hidden("the key a/secret key", "a%2Fsecret%20key\n") == f"the key {MASK}"


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "MIRROR"])
def test_the_password_of_a_url_is_masked_alone_and_in_its_header(name: str) -> None:
    secrets = secret_values({name: "http://some%40one:p%40ss%20w%C3%B6rd@127.0.0.1:9/"})
    for said in ("some@one:p@ss wörd".encode(), "some@one:p@ss wörd".encode("latin-1")):
        header = f"Proxy-Authorization: Basic {base64.b64encode(said).decode()}"
        assert hidden(header, *secrets) == f"Proxy-Authorization: Basic {MASK}"
    assert hidden("407 for p@ss wörd", *secrets) == f"407 for {MASK}"
    assert hidden("407 for p%40ss%20w%C3%B6rd", *secrets) == f"407 for {MASK}"
    assert hidden("short", *secret_values({name: "http://someone:short@127.0.0.1:9/"})) == "short"


def test_the_password_of_every_url_in_a_variable_is_masked_alone() -> None:
    urls = "https://a:firstpass1@h1/s https://b:secondpass2@h2/s,https://c:thirdpass3@h3"
    secrets = secret_values({"PIP_EXTRA_INDEX_URL": urls})
    assert hidden("firstpass1 secondpass2 thirdpass3", *secrets) == f"{MASK} {MASK} {MASK}"


@pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY"])
def test_hosts_without_a_proxy_are_no_secret(name: str) -> None:
    said = "connect to localhost:8000 refused"
    assert hidden(said, *secret_values({name: "localhost"})) == said


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("VLLM_MAX_TOKENS_PER_EXPERT_FP4_MOE", False),
        ("VLLM_MULTI_STREAM_GEMM_TOKEN_THRESHOLD", False),
        ("VLLM_USE_FASTOKENS", False),
        ("TOKENIZERS_PARALLELISM", False),
        ("VLLM_API_KEY", True),
        ("VLLM_SOME_TOKEN", True),
        ("GITHUB_TOKENS", True),
        ("HF_TOKEN", True),
        ("https_proxy", True),
    ],
)
def test_what_vllm_counts_in_tokens_is_no_secret(name: str, secret: bool) -> None:
    assert is_named_secret(name) is secret


@pytest.mark.parametrize(
    ("variables", "path"),
    [
        ({"HF_TOKEN_PATH": "{here}/file"}, "file"),
        ({"HF_HOME": "{here}/h"}, "h/token"),
        ({"XDG_CACHE_HOME": "{here}"}, "huggingface/token"),
        ({}, ".cache/huggingface/token"),
    ],
)
def test_the_token_of_a_login_is_a_secret(
    variables: dict[str, str], path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    asked = {name: value.format(here=tmp_path) for name, value in variables.items()}
    assert LOGGED_IN not in secret_values(asked)
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(f"{LOGGED_IN}\n")
    assert LOGGED_IN in secret_values(asked)


def test_a_secret_that_holds_another_is_masked_whole() -> None:
    assert masked("abcdefghij", PLACES, "abcdefgh", "abcdefghij") == MASK


def test_short_values_and_other_variables_are_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert secret_values({"HF_TOKEN": "1", "HOME": "/home/somebody", "TOKENIZERS_PARALLELISM": "false-false"}) == []


def test_what_a_server_says_of_a_failed_request_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The body of an answer is quoted in the request's row, and the first one in the point's."""
    for name, value in FAKE.items():
        monkeypatch.setenv(name, value)
    words = f"refused {FAKE} prompt: 'private', prompt_token_ids: [1]"

    def refused(plans: list[LoadPlan]) -> list[LoadResult]:
        results = together(plans)
        if plans[0].num_requests > 1:  # not the first completion, without which no server is ready
            for result in results:
                for request in result.requests[::2]:
                    request.ok, request.failure_class, request.failure_message = False, "http_error", words
        return results

    session = Session(spec(), "run", 1, ["3"], refused)
    try:
        assert session.start().status == MEASURED
        row = session.measure(LEVEL)
    finally:
        session.stop()
    assert (row.status, row.failure_class) == (FAILED, "load_error_rate")
    said = [row.failure_message, *(request.failure_message for request in row.requests if not request.ok)]
    assert len(said) == 1 + LEVEL.num_requests // 2
    for each in said:
        assert each is not None
        assert MASK in each
        assert not [secret for secret in [*SECRETS, "private"] if secret in each]
    assert {request.failure_message for request in row.requests if request.ok} == {None}


def test_the_manifest_keeps_no_secret_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", FAKE["HF_TOKEN"])
    typed = [
        "+sweep=kv", "hydra.hf_token=abc", f"output_root=/runs/{FAKE['HF_TOKEN']}",
        f"model.path={FAKE['VLLM_MIRROR']}", "cluster.address=https://u:p@127.0.0.1:9",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["orchestrator", *typed])
    asked = experiment("kv", engine="sim")
    manifest = make_manifest("run", [asked], make_plan(resolved(asked), sim_fleet()), sim_fleet())
    assert manifest["argv"][3:] == [
        "+sweep=kv", f"hydra.hf_token={MASK}", f"output_root=/runs/{MASK}",
        f"model.path=https://{MASK}@mirror.invalid/path", f"cluster.address=https://{MASK}@127.0.0.1:9",
    ]  # fmt: skip


def test_passwords_in_urls_are_masked_under_any_name() -> None:
    shown = shown_environment({"HF_ENDPOINT": "https://me:secret@mirror/x"}, PLACES)
    assert shown == [f"HF_ENDPOINT=https://{MASK}@mirror/x"]
    assert masked("GET https://me:secret@mirror/x failed", PLACES) == f"GET https://{MASK}@mirror/x failed"


@pytest.mark.parametrize(
    "line",
    [
        "Request 1 details: prompt: 'a \\'private\\' matter', prompt_token_ids: [1, 2], prompt_embeds shape: None.",
        'Request 1 details: prompt: "a private matter", prompt_token_ids: None, prompt_embeds shape: None.',
        "Request 1 details: prompt: None, prompt_token_ids: [private, 2",
    ],
)
def test_tails_of_logs_have_no_prompts(line: str) -> None:
    left = without_prompts(line)
    assert "private" not in left
    assert left.startswith("Request 1 details: prompt: ")


# --- what a grid may say ---


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"trust_remote_code": True}, "not supported"),
        ({"tool_parser_plugin": "/tmp/x.py"}, "has vLLM run code that it names"),
        ({"scheduler_cls": "evil.Scheduler"}, "has vLLM run code that it names"),
        ({"middleware": ["evil.Middleware"]}, "has vLLM run code that it names"),
        ({"kv_transfer_config": {"kv_connector_module_path": "evil"}}, "has vLLM run code that it names"),
        ({"compilation_config": {"backend": "evil.backend"}}, "has vLLM run code that it names"),
        ({"model_class_overrides": {"A": "evil:B"}}, "has vLLM run code that it names"),
        ({"compilation_config.backend": "evil.backend"}, "is no flag's name"),
        ({"kv_transfer_config": '{"kv_connector_module_path": "evil"}'}, "is JSON text"),
        ({"trust_remote": True}, "may be short for trust_remote_code"),
        ({"no_trust": False}, "may be short for trust_remote_code"),
        ({"middlewar": ["evil.Middleware"]}, "may be short for middleware"),
        ({"hos": "0.0.0.0"}, "may be short for host"),
        ({"api_ke": "x"}, "may be short for api_key"),
        ({"enable_chunked_prefill": "--trust-remote-code"}, "would take it for a flag"),
        ({"lora_modules": ["a=b", "--worker-cls=evil.Worker"]}, "would take it for a flag"),
        ({"no_hf_token": "x"}, "secrets are read from the environment only"),
        ({"otlp_traces_endpoint": "http://me:secret@collector"}, "secrets are read from the environment only"),
    ],
)
def test_flags_that_run_code_or_hold_secrets_are_refused(flags: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        experiment("kv", server__extra_args=flags)
    assert "secret@" not in str(caught.value)


def test_ordinary_flags_of_the_same_kind_pass() -> None:
    flags = {
        "compilation_config": {"backend": "inductor", "mode": 3},
        "kv_transfer_config": {"kv_connector": "X"},
        "seed": -1,
        "tokenizer": "some/name",
    }
    assert experiment("kv", server__extra_args=flags).server.extra_args == flags


@pytest.mark.ray
def test_what_a_grid_says_reaches_no_shell(place: Place, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    words = f"'$(touch {trap}); touch {trap} `touch {trap}` && touch {trap}'"
    command = [
        sys.executable, "-m", "orchestrator", "+sweep=concurrency", "sweep.concurrency=[1]", "engine=sim",
        f"model.name={words}", f'server.extra_args={{fail: "; touch {trap}"}}', f"output_root={place.outputs / 'o'}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, env=place.environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 3, done.stdout + done.stderr
    assert not trap.exists()
    (manifest,) = place.outputs.glob("o/*/manifest.json")
    assert "touch" in json.loads(manifest.read_text())["experiments"][0]["model"]["name"]
    assert not (os.path.lexists(trap) or list(tmp_path.rglob("trap")))
