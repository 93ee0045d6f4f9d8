"""The command line and the environment of a vLLM server, and whether the installed vLLM knows what we write there.

vLLM is asked in a process of its own (this file run as a script), for importing it changes the process that does so.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from contract.specs import Mode, ModelSpec, ServerSpec, SessionSpec, Timeouts
from workers.engines.base import Address, environment_of_numbers, inherited_environment
from workers.engines.vllm import WARM_MODULES, VllmEngine, flag

SHAPE = ModelSpec("tiny", {"vocab_size": 512}, dummy_weights=True)
PUBLISHED = ModelSpec("phi", {"vocab_size": 32064}, dummy_weights=False, path="microsoft/phi", revision="0123abc")
SOCKET = Address(uds=Path("/run/private/s.sock"))
KEY = "e3b0c44298fc1c14"
LOOPBACK = Address(port=40123, api_key=KEY)
EVERYTHING = ServerSpec(
    4096,
    gpu_memory_utilization=0.9,
    kv_cache_memory_bytes=2**30,
    kv_cache_dtype="fp8",
    max_num_seqs=32,
    max_num_batched_tokens=768,
    tensor_parallel_size=2,
    enforce_eager=True,
    enable_prefix_caching=False,
    dtype="bfloat16",
    quantization="fp8",
)


def spec(server: ServerSpec, model: ModelSpec = SHAPE) -> SessionSpec:
    return SessionSpec("s", model, server, "vllm", "cuda", Mode.COMMITTED, server.tensor_parallel_size, 32, ())


def command(
    server: ServerSpec | None = None, model: ModelSpec = SHAPE, address: Address = SOCKET, **extra_args: Any
) -> list[str]:
    made_from = server or ServerSpec(512, extra_args=extra_args)
    return VllmEngine().command(spec(made_from, model), model.path or "/run/private/model", address)


def value(argv: list[str], option: str) -> str:
    """Return what follows an option that is there once."""
    assert argv.count(option) == 1, argv
    return argv[argv.index(option) + 1]


def test_what_a_forked_start_may_be_silent_for_hangs_on_the_device() -> None:
    lines = [(0.5, "(EngineCore pid=2) INFO 11-24 10:00:01 [core.py:94] Initializing a V1 LLM engine (v0.25.1) with")]
    on_gpu = spec(ServerSpec(512))
    limits = [VllmEngine().silence_limit_s(on, lines, True) for on in (on_gpu, replace(on_gpu, device="cpu"))]
    assert limits == [30.0, 90.0]


@pytest.mark.parametrize(("method", "limit_s"), [(None, 30.0), ("fork", 30.0), ("spawn", 300.0)])
def test_an_engine_that_the_user_has_spawned_has_the_time_to_import(
    method: str | None, limit_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD", raising=False)
    if method is not None:
        monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", method)
    lines = [(0.4, "(APIServer pid=1) INFO 11-24 10:00:00 [model.py:1587] Using max model len 4096")]
    assert VllmEngine().silence_limit_s(spec(ServerSpec(512)), lines, True) == limit_s


def test_a_fork_that_compiles_nothing_is_given_up_sooner() -> None:
    lines = [
        (1.5, "(EngineCore pid=2) INFO 11-24 10:00:02 [gpu_model_runner.py:4118] Model loading took 7.12 GiB memory")
    ]
    eager, compiling = spec(ServerSpec(512, enforce_eager=True)), spec(ServerSpec(512))
    asked = (eager, compiling, replace(eager, device="cpu"))
    assert [VllmEngine().silence_limit_s(one, lines, True) for one in asked] == [300.0, 900.0, 900.0]


def test_a_longer_start_may_be_silent_for_longer() -> None:
    slow = replace(spec(ServerSpec(512)), timeouts=Timeouts(ready_s=7200.0))
    assert VllmEngine().silence_limit_s(slow, [], False) == 1200.0


# --- where it listens, what it loads ---


def test_a_shape_on_a_socket() -> None:
    argv = command()
    assert argv[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert value(argv, "--uds") == "/run/private/s.sock"
    assert value(argv, "--model") == "/run/private/model"
    assert value(argv, "--served-model-name") == "tiny"
    assert value(argv, "--load-format") == "dummy"
    assert value(argv, "--max-model-len") == "512"
    assert not {"--port", "--host", "--revision"} & set(argv)


def test_a_port_is_on_loopback_and_its_key_is_not_on_the_command_line() -> None:
    argv = command(address=LOOPBACK)
    assert (value(argv, "--host"), value(argv, "--port")) == ("127.0.0.1", "40123")
    assert "--uds" not in argv
    assert not [argument for argument in argv if KEY in argument or "api-key" in argument]
    assert VllmEngine().environment(spec(ServerSpec(512)), LOOPBACK)["VLLM_API_KEY"] == KEY


def test_published_weights_are_loaded_at_their_revision() -> None:
    argv = command(model=PUBLISHED)
    assert value(argv, "--model") == "microsoft/phi"
    assert value(argv, "--served-model-name") == "phi"
    assert value(argv, "--revision") == "0123abc"
    assert "--load-format" not in argv


# --- what the server specification says ---


def test_what_is_left_to_vllm_is_not_on_the_command_line() -> None:
    options = [argument for argument in command() if argument.startswith("--")]
    assert options == [
        "--model", "--served-model-name", "--load-format", "--uds", "--max-model-len", "--dtype",
        "--disable-uvicorn-access-log", "--worker-extension-cls",
    ]  # fmt: skip


def test_two_ranks_are_processes_of_this_host() -> None:
    argv = command(ServerSpec(512, tensor_parallel_size=2))
    assert value(argv, "--tensor-parallel-size") == "2"
    assert value(argv, "--distributed-executor-backend") == "mp"


def test_a_committed_pool_has_its_bytes_beside_the_utilization() -> None:
    argv = command(ServerSpec(512, gpu_memory_utilization=0.92, kv_cache_memory_bytes=67108864, max_num_seqs=32))
    assert value(argv, "--kv-cache-memory-bytes") == "67108864"
    assert value(argv, "--gpu-memory-utilization") == "0.92"
    assert value(argv, "--max-num-seqs") == "32"


@pytest.mark.parametrize(("eager", "expected"), [(True, ["--enforce-eager"]), (False, [])])
def test_eager_is_said_only_where_it_is_on(eager: bool, expected: list[str]) -> None:
    argv = command(ServerSpec(512, enforce_eager=eager))
    assert [argument for argument in argv if "eager" in argument] == expected


@pytest.mark.parametrize(
    ("caching", "expected"),
    [(True, ["--enable-prefix-caching"]), (False, ["--no-enable-prefix-caching"]), (None, [])],
)
def test_prefix_caching_is_on_off_or_vllms_own(caching: bool | None, expected: list[str]) -> None:
    argv = command(ServerSpec(512, enable_prefix_caching=caching))
    assert [argument for argument in argv if "prefix-caching" in argument] == expected


# --- arguments of every kind ---


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (True, ["--some-flag"]),
        (False, ["--no-some-flag"]),
        (None, []),
        (0, ["--some-flag", "0"]),
        (16, ["--some-flag", "16"]),
        (0.5, ["--some-flag", "0.5"]),
        ("", ["--some-flag", ""]),
        ("with space", ["--some-flag", "with space"]),
        ([1, 2, 4], ["--some-flag", "1", "2", "4"]),
        (("a", "b"), ["--some-flag", "a", "b"]),
        ({"level": 3, "on": True, "off": None}, ["--some-flag", '{"level": 3, "on": true, "off": null}']),
        ([{"name": "a"}, {"name": "b"}], ["--some-flag", '{"name": "a"}', '{"name": "b"}']),
    ],
)
def test_an_argument_of_any_kind_is_written_as_vllm_reads_it(given: object, expected: list[str]) -> None:
    assert flag("some_flag", given) == expected
    argv = command(some_flag=given)
    assert argv[len(command()) :] == expected


def test_extra_arguments_win_over_ours_and_are_said_once() -> None:
    server = ServerSpec(512, max_num_seqs=8, enforce_eager=True, extra_args={"max_num_seqs": 4, "enforce_eager": None})
    argv = command(server)
    assert value(argv, "--max-num-seqs") == "4"
    assert "--enforce-eager" not in argv


# --- environment ---


def test_the_hub_is_closed_for_a_shape_and_open_for_published_weights() -> None:
    engine = VllmEngine()
    assert engine.environment(spec(ServerSpec(512)), SOCKET)["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in engine.environment(spec(ServerSpec(512), PUBLISHED), SOCKET)


@pytest.mark.parametrize("model", [SHAPE, PUBLISHED])
def test_nothing_is_reported_and_logs_are_plain(model: ModelSpec) -> None:
    pinned = VllmEngine().environment(spec(ServerSpec(512), model), SOCKET)
    assert pinned["VLLM_NO_USAGE_STATS"] == pinned["DO_NOT_TRACK"] == "1"
    assert pinned["NO_COLOR"] == "1"
    assert pinned["VLLM_LOGGING_COLOR"] == "0"


def test_a_key_in_the_users_shell_does_not_lock_a_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "for another server")
    environment = inherited_environment(None) | VllmEngine().environment(spec(ServerSpec(512)), SOCKET)
    assert not environment.get("VLLM_API_KEY")


def test_rays_variables_and_ours_stay_behind_and_the_fabrics_go_along(monkeypatch: pytest.MonkeyPatch) -> None:
    left = ("RAY_AUTH_TOKEN", "RAY_ADDRESS", "_RAY_X", "VLLM_CAPACITY_X")
    kept = ("NCCL_NVLS_ENABLE", "NVSHMEM_DISABLE_CUDA_VMM", "TORCH_SYMM_MEM_DISABLE_MULTICAST", "VLLM_PORT", "HF_HOME")
    for name in (*left, *kept):
        monkeypatch.setenv(name, "1")
    environment = inherited_environment(None)
    assert [name for name in left if name in environment] == []
    assert [name for name in kept if environment.get(name) != "1"] == []


@pytest.mark.parametrize("threads", ["7", None])
def test_the_users_own_thread_count_is_put_back(monkeypatch: pytest.MonkeyPatch, threads: str | None) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert inherited_environment(threads).get("OMP_NUM_THREADS") == threads


def test_what_numbers_hang_on_is_kept_of_it_without_secrets_and_places(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        monkeypatch.delenv(name)
    kept = {"VLLM_ATTENTION_BACKEND": "FLASHINFER", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            "VLLM_CPU_KVCACHE_SPACE": "4", "NCCL_NVLS_ENABLE": "0", "VLLM_DISABLE_COMPILE_CACHE": "1",
            "VLLM_NCCL_SO_PATH": "/l/libnccl.so", "VLLM_CUDART_SO_PATH": "/l/libcudart.so", "KMP_BLOCKTIME": "1",
            "VLLM_MAX_TOKENS_PER_EXPERT_FP4_MOE": "8", "MKL_NUM_THREADS": "2", "GOMP_CPU_AFFINITY": "0-1"}  # fmt: skip
    left = {"VLLM_CACHE_ROOT": "/a", "VLLM_ASSETS_CACHE": "/d", "CUDA_CACHE_PATH": "/e", "TRITON_CACHE_DIR": "/f",
            "HF_HOME": "/b", "CUDA_VISIBLE_DEVICES": "1", "HF_TOKEN": "hf_1", "HOME": "/c",
            "VLLM_API_KEY": "k", "VLLM_S3_SECRET": "s", "OMP_NUM_THREADS": "1", "RAY_X": "1"}  # fmt: skip
    for name, value in (kept | left).items():
        monkeypatch.setenv(name, value)
    assert environment_of_numbers(None) == tuple(sorted(f"{name}={value}" for name, value in kept.items()))
    assert "OMP_NUM_THREADS=7" in environment_of_numbers("7")


# --- the installed vLLM ---


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_installed_vllm_knows_every_flag_and_reads_what_was_meant() -> None:
    full = command(EVERYTHING, PUBLISHED, LOOPBACK)
    bare = command(compilation_config={"cudagraph_capture_sizes": [1, 2]}, async_scheduling=False, block_size=32)
    read_full, read_bare = read_by_vllm(full, bare)
    for name in (
        "max_model_len", "gpu_memory_utilization", "kv_cache_memory_bytes", "kv_cache_dtype", "max_num_seqs",
        "max_num_batched_tokens", "tensor_parallel_size", "enforce_eager", "enable_prefix_caching", "dtype",
        "quantization",
    ):  # fmt: skip
        assert read_full[name] == getattr(EVERYTHING, name), name
    assert (read_full["host"], read_full["port"], read_full["revision"]) == ("127.0.0.1", 40123, "0123abc")
    assert (read_full["distributed_executor_backend"], read_full["disable_uvicorn_access_log"]) == ("mp", True)
    assert (read_bare["uds"], read_bare["load_format"]) == (str(SOCKET.uds), "dummy")
    assert (read_bare["model"], read_bare["served_model_name"]) == ("/run/private/model", ["tiny"])
    assert (read_bare["async_scheduling"], read_bare["block_size"]) == (False, 32)
    assert "[1, 2]" in read_bare["compilation_config"]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_what_a_warm_parent_imports_is_in_the_installed_vllm() -> None:
    """One that is not there is passed over in silence, as a version's own."""
    found = importlib.util.find_spec("vllm")
    assert found is not None
    root = Path(found.origin or "").parent.parent
    paths = [root.joinpath(*name.partition(":")[0].split(".")) for name in WARM_MODULES if name.startswith("vllm.")]
    assert [str(path) for path in paths if not (path.with_suffix(".py").exists() or path.is_dir())] == []


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize(
    ("function", "files"),
    [
        ("lifespan", ["entrypoints/launchers/utils/server_utils.py", "entrypoints/serve/utils/server_utils.py"]),
        ("__init__", ["v1/engine/core.py"]),
        ("compile_or_warm_up_model", ["v1/worker/gpu_worker.py"]),
    ],
)
def test_every_process_of_the_installed_vllm_that_is_forked_freezes_its_heap_when_it_is_ready(
    function: str, files: list[str]
) -> None:
    """What the warm parent has made is left frozen for that; one that froze nothing would never collect its imports."""
    found = importlib.util.find_spec("vllm")
    assert found is not None
    (path,) = (path for name in files if (path := Path(found.origin or "").parent / name).exists())
    called = [
        each.name
        for each in ast.walk(ast.parse(path.read_text()))
        if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
        and any(isinstance(node, ast.Call) and ast.unparse(node.func) == "freeze_gc_heap" for node in ast.walk(each))
    ]
    assert function in called


def read_by_vllm(*commands: list[str]) -> list[dict[str, Any]]:
    environment = {
        **os.environ,
        **VllmEngine().environment(spec(ServerSpec(512)), SOCKET),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    arguments = json.dumps([argv[3:] for argv in commands])
    done = subprocess.run(
        [sys.executable, __file__, arguments], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


# --- what is compiled once ---


def key(server: ServerSpec, model: ModelSpec = SHAPE) -> str | None:
    return VllmEngine().compile_key(spec(server, model))


def test_servers_share_a_compile_key_where_nothing_differs_that_is_compiled() -> None:
    graphs = replace(EVERYTHING, enforce_eager=False)
    alike = {"gpu_memory_utilization": 0.8, "enable_prefix_caching": True, "transport": "tcp"}
    assert all(key(replace(graphs, **{name: value})) == key(graphs) for name, value in alike.items())  # type: ignore[arg-type]
    unlike = {"max_model_len": 2048, "max_num_batched_tokens": 512, "max_num_seqs": 16, "dtype": "float16"}
    keys = {key(replace(graphs, **{name: value})) for name, value in unlike.items()} | {key(graphs, PUBLISHED)}  # type: ignore[arg-type]
    assert len(keys | {key(graphs)}) == len(unlike) + 2


def test_an_eager_server_compiles_nothing() -> None:
    assert key(EVERYTHING) is None


# --- what vLLM says: run as a script ---


def answer(commands: list[list[str]]) -> list[dict[str, Any]]:
    """Return each command as the server's own parser reads it; an option that only abbreviates another is an error."""
    arg_parser = imported("make_arg_parser", "vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args")
    flexible = imported("FlexibleArgumentParser", "vllm.utils.argparse_utils", "vllm.utils")
    parser = arg_parser(flexible(allow_abbrev=False))
    return [vars(parser.parse_args(argv)) for argv in commands]


def imported(name: str, *modules: str) -> Any:
    """Return what versions of vLLM keep in different places."""
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"this vLLM has {name} in none of {', '.join(modules)}")


if __name__ == "__main__":
    print(json.dumps(answer(json.loads(sys.argv[1])), default=str))
