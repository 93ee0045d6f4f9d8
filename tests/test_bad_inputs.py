"""What a user, a disk, a server or an environment gets wrong: one table of exit code and message.

Each is refused by the program itself, in this process: nothing is started, nothing is written, nothing is traced back.
"""

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import analysis.__main__
import workers.load.__main__
from tests import synthetic_run
from tests.in_this_process import ended, orchestrate_here
from tests.mock_openai import Fault, MockOpenAI, serving

BAD, FAILED, NO_ROOM = 2, 1, 4


@dataclass(frozen=True)
class Bad:
    """What is typed (`{here}` is the directory), and what comes of it."""

    typed: str
    words: str
    code: int = BAD
    environment: dict[str, str] = field(default_factory=dict)
    make: Callable[[Path], None] | None = None


def text(name: str, content: str) -> Callable[[Path], None]:
    """Return what makes a file."""

    def make(here: Path) -> None:
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    return make


def linked(here: Path) -> None:
    text("run/manifest.json", '{"experiments": [{}]}')(here)
    (here / "run/shards").symlink_to("/tmp")


def half_a_table(here: Path) -> None:
    run = synthetic_run.write_tables(here / "run", synthetic_run.rows()[:8])
    table = run / "points.parquet"
    table.write_bytes(table.read_bytes()[: table.stat().st_size // 2])


def a_foreign_table(here: Path) -> None:
    run = synthetic_run.write_tables(here / "run", synthetic_run.rows()[:8])
    table = pq.read_table(run / "points.parquet").drop(["status"])
    pq.write_table(table, run / "points.parquet")


CONFIGURATION = [
    Bad("", "no sweep named: add +sweep=NAME"),
    Bad("+sweep=nothing", "Could not find 'sweep/nothing'"),
    Bad("+sweep=kv model=nothing", "Could not find 'model/nothing'"),
    Bad("+sweep=kv engine=nothing", "Could not find 'engine/nothing'"),
    Bad("+sweep=kv seed=[1", "seed=[1"),
    Bad("+sweep=kv server.max_mdl_len=5", "did you mean 'max_model_len'?"),
    Bad("+sweep=kv sevrer.max_model_len=5", "did you mean 'server'?"),
    Bad("+sweep=kv server.max_model_len=many", "server.max_model_len: should be"),
    Bad("+sweep=kv server.max_num_seqs=0", "got 0"),
    Bad("+sweep=kv server.gpu_memory_utilization=1.7", "should be less than or equal to 1"),
    Bad("+sweep=kv server.tensor_parallel_size=0", "got 0"),
    Bad("+sweep=kv server.transport=carrier_pigeon", "server.transport: should be 'uds' or 'tcp'"),
    Bad("+sweep=kv server.start=lukewarm", "server.start: should be 'auto', 'cold' or 'warm'"),
    Bad("+sweep=kv server.extra_args={uds:/tmp/x}", "uds is set by the tool itself"),
    Bad("+sweep=kv server.extra_args={hf_token:x}", "looks like a secret"),
    Bad("+sweep=kv server.extra_args={data_parallel_size:2}", "data_parallel_size is not supported"),
    Bad("+sweep=kv sweep.max_model_len=[]", "sweep.max_model_len: must not be empty"),
    Bad("+sweep=kv sweep.max_model_len=[-512]", "sweep.max_model_len.0: should be greater"),
    Bad("+sweep=kv sweep.max_model_len=[1024,512]", "must ascend without repeats"),
    Bad("+sweep=kv sweep.max_model_len=[16384]", "above the limit of tiny, 8192 tokens"),
    Bad("+sweep=concurrency sweep.concurrency=[0]", "got 0"),
    Bad("+sweep=concurrency load.output_tokens=0", "load.output_tokens: should be greater"),
    Bad("+sweep=concurrency load.prompt_tokens={uniform:{low:9,high:2}}", "low 9 is above high 2"),
    Bad("+sweep=concurrency load.prompt_tokens=9000", "9000"),
    Bad("+sweep=rate sweep.request_rate=[.inf]", "sweep.request_rate.0: should be"),
    Bad("+sweep=rate load.seconds=5", "end closed loops"),
    Bad("+sweep=slo", "slo: +sweep=slo searches for where objectives begin to be missed"),
    Bad("+sweep=slo slo.p95_e2e_s=-1", "slo.p95_e2e_s: should be greater than 0"),
    Bad("+sweep=knee sweep.concurrency={lowest:8,highest:8}", "highest: must be above lowest"),
    Bad("+sweep=kv budget.minutes=0", "budget.minutes: should be greater than 0"),
    Bad("+sweep=concurrency engine=sim budget.minutes=0.0001", "budget"),
    Bad("+sweep=kv engine.device=sim", "'sim' belongs to engine=sim and to nothing else"),
    Bad("+sweep=kv cluster.num_gpus=2", "this node has 0 GPU(s)", NO_ROOM),
    Bad("+sweep=kv engine=sim server.tensor_parallel_size=8", "no node has so many GPUs", NO_ROOM),
    Bad("+sweep=kv engine.device=cuda", "NVML shows no GPU", NO_ROOM),
    Bad("+sweep=kv engine=sim cluster.address=127.0.0.1:1", "nobody listens at 127.0.0.1:1", NO_ROOM),
    Bad("-m +sweep=kv engine=vllm,sim", "engine: experiments of one run must agree"),
    Bad("+sweep=kv model=hf", "model.name: is missing"),
    Bad("+sweep=kv model=hf model.name=/no/such/model", "/no/such/model"),
    Bad("resume=run +sweep=kv resume.strict=perhaps", "should be true or false"),
    Bad("resume=run server.max_num_seqs=8", "name a whole grid to add"),
]
FILES = [
    Bad("resume={here}/run", "is not a run directory"),
    Bad("resume={here}/run", "is not a run directory", make=text("run/manifest.json", "")),
    Bad("resume={here}/run", "is not a run directory", make=text("run/manifest.json", "[" * 100_000)),
    Bad("resume={here}/run", "is not a run directory", make=text("run/manifest.json", '{"experiments"')),
    Bad("resume={here}/run", "is not a run directory", make=text("run", "a file")),
    Bad("resume={here}/run", "is not a run directory", make=text("run/manifest.json", '{"experiments": []}')),
    Bad("resume={here}/run", "is not a run directory", make=text("run/manifest.json", '{"experiments": 3}')),
    Bad(
        "resume={here}/run",
        "engine: is missing",
        make=text("run/manifest.json", '{"experiments": [{"sweep": {"kind": "kv"}}]}'),
    ),
    Bad("resume={here}/run", "is a link", make=linked),
    Bad("+sweep=kv engine=sim output_root={here}/file", "is not a directory", make=text("file", "")),
    Bad("+sweep=kv engine=sim output_root={here}/file/below", "is not a directory", make=text("file", "")),
    Bad("+sweep=kv engine=sim output_root=/proc/nothing", "/proc cannot be written"),
    Bad("+sweep=kv engine=sim output_root={here}/runtime_resources/working_dir_files/_ray_pkg_1/o", "package cache"),
    Bad(
        "+sweep=kv model=hf model.name={here}/m",
        "cannot be read (Expecting property name",
        make=text("m/config.json", "{"),
    ),
    Bad("+sweep=kv model=hf model.name={here}/m", "is not a JSON object", make=text("m/config.json", "[]")),
    Bad(
        "+sweep=kv model=hf model.name={here}/m",
        "no usable 'num_hidden_layers'",
        make=text("m/config.json", '{"architectures": ["No"]}'),
    ),
    Bad("analysis {here}/run", "nothing to analyse", make=text("run/manifest.json", "{}")),
    Bad("analysis {here}/nothing", "no such run directory"),
    Bad("analysis {here}/run", "points", make=half_a_table),
    Bad("analysis {here}/run", "points", make=a_foreign_table),
    Bad("analysis whatif {here}/run concurrency=many", "is not understood", make=half_a_table),
]
ENVIRONMENT = [
    Bad("+sweep=kv engine=sim", "is not a directory", BAD, {"VLLM_CAPACITY_OUTPUT_ROOT": "{here}/f"}, text("f", "")),
    Bad("+sweep=kv engine=sim cluster=auto", "nobody listens at", NO_ROOM, {"RAY_ADDRESS": "127.0.0.1:1"}),
    Bad("+sweep=kv engine.device=cuda", "CUDA_VISIBLE_DEVICES names '99'", NO_ROOM, {"CUDA_VISIBLE_DEVICES": "99"}),
]
STREAMS = {
    Fault.ERROR_MID_STREAM: "in_band_error",
    Fault.NO_DONE: "no_done",
    Fault.BREAKS_OFF: "no_done",
    Fault.SHORT: "wrong_token_count",
    Fault.NO_USAGE: "no_usage",
    Fault.NO_FINISH_REASON: "no_finish_reason",
    Fault.STATUS_503: "http_error",
    Fault.NOT_JSON: "malformed_stream",
    Fault.NOT_A_STREAM: "malformed_stream",
    Fault.RESET: "connection_lost",
}
NO_SERVERS = {Fault.NOT_HTTP: "Bad status line", Fault.NO_ANSWER: "Server disconnected"}
"""What answers the one request that is tried before a load like no server of the API."""


@pytest.fixture(autouse=True)
def nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Any process that is started fails the test."""
    started: list[object] = []

    def refuse(self: object, command: object, *rest: object, **more: object) -> None:
        started.append(command)
        raise AssertionError(f"started: {command}")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    yield
    assert started == []


def called(typed: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Return the exit code of a program and all that it said."""
    if typed[:1] == ["analysis"]:
        return ended(lambda: analysis.__main__.main(typed[1:]), capsys)
    return orchestrate_here(monkeypatch, capsys, *typed)


@pytest.mark.parametrize("bad", [*CONFIGURATION, *FILES, *ENVIRONMENT], ids=lambda bad: bad.typed[:60] or "nothing")
def test_refused_in_words(
    bad: Bad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if bad.make:
        bad.make(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, value in bad.environment.items():
        monkeypatch.setenv(name, value.replace("{here}", str(tmp_path)))
    before = sorted(tmp_path.rglob("*"))
    code, said = called([word.replace("{here}", str(tmp_path)) for word in bad.typed.split()], monkeypatch, capsys)
    assert code == bad.code, said
    assert bad.words in said
    assert said.strip()
    assert "Traceback" not in said
    assert sorted(tmp_path.rglob("*")) == before


def load_on(fault: Fault, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str, str]:
    """Send two requests to a server with a fault; return the exit code, what was said on both ways, and its URL."""
    with serving(MockOpenAI(fault=fault)) as server:
        code = workers.load.__main__.main(
            ["--url", f"{server.url}/v1/completions", "--n", "2", "--concurrency", "1", "--max-tokens", "4"]
        )
    said = capsys.readouterr()
    return code, said.out, said.err, server.url


@pytest.mark.parametrize("fault", STREAMS)
def test_a_stream_that_is_none_is_a_failed_request_with_its_class(
    fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err, _ = load_on(fault, capsys)
    assert code == FAILED, out + err
    assert STREAMS[fault] in out + err
    assert "Traceback" not in out + err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", NO_SERVERS)
def test_what_is_no_server_of_the_api_is_refused_before_the_load(
    fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err, url = load_on(fault, capsys)
    assert code == BAD, out + err
    assert f"cannot reach {url}" in err
    assert NO_SERVERS[fault] in err
    assert "Traceback" not in out + err
    assert list(tmp_path.iterdir()) == []


def test_the_documentation_counts_the_table() -> None:
    table = len(CONFIGURATION) + len(FILES) + len(ENVIRONMENT) + len(STREAMS) + len(NO_SERVERS)
    page = (Path(__file__).parent.parent / "docs" / "reliability.md").read_text()
    assert f"is a table of {table} bad inputs" in page
