"""Where a start went, from the log of real servers: vLLM 0.32 on CPUs, 0.25 on GPUs with both its model runners."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.engines.vllm_phases import (
    COLD_LIMIT_S,
    ENDS,
    FORKED_LATER_LIMIT_S,
    LATER_LIMIT_S,
    LISTENING,
    WAITING,
    phases,
    reached,
    reads_weights,
    silence_limit_s,
)

CAP_S = 1800.0
"""What a start may take by default."""

CPU_COLD = [
    (6.6, "Triton is installed, but doesn't include CPU backend. Disabling Triton."),
    (10.3, "(APIServer pid=1) INFO 11-25 15:37:57 [api_utils.py:347]   █▄█▀ █     █     █     █  version 0.32.0"),
    (10.3, "(APIServer pid=1) INFO 11-25 15:37:57 [api_utils.py:286] non-default args: {'max_model_len': 512}"),
    (10.4, "(APIServer pid=1) INFO 11-25 15:37:57 [model.py:733] Resolved architecture: LlamaForCausalLM"),
    (11.1, "(APIServer pid=1) INFO 11-25 15:37:57 [compilation.py:317] Enabled custom fusions: norm_quant, act_quant"),
    (18.2, "Triton is installed, but doesn't include CPU backend. Disabling Triton."),
    (20.5, "(EngineCore pid=2) INFO 11-25 15:38:07 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: "),
    (30.6, "(Worker pid=3) INFO 11-25 15:38:17 [cpu_model_runner.py:68] Starting to load model /m..."),
    (30.7, "(Worker pid=3) INFO 11-25 15:38:17 [base_loader.py:82] Initializing model took 0.197603 seconds"),
    (
        31.7,
        "(Worker pid=3) INFO 11-25 15:38:18 [cpu_worker.py:260] Explicitly set (0.13/9.71) GiB for KV cache on node 0.",
    ),
    (
        31.8,
        "(EngineCore pid=2) INFO [kv_cache_utils.py:2327] CPU KV cache size: 32,896 tokens, Maximum concurrency for",
    ),
    (32.0, "(EngineCore pid=2) INFO [core.py:402] init engine (profile, create kv cache, warmup model) took 0.19 s"),
    (33.2, "(APIServer pid=1) INFO 11-25 15:38:20 [entry.py:140] Starting vLLM server on unix:/s"),
]
GPU_FORKED = [
    (0.2, "warm start: forked from a process that had imported vllm.entrypoints.openai.api_server"),
    (0.6, "(APIServer pid=1) INFO 11-24 10:00:00 [utils.py:299]   █▄█▀ █     █     █     █  version 0.25.1"),
    (1.1, "(APIServer pid=1) INFO 11-24 10:00:00 [model.py:1587] Using max model len 4096"),
    (
        1.5,
        "(EngineCore pid=2) INFO 11-24 10:00:01 [core.py:94] Initializing a V1 LLM engine (v0.25.1) with config: model",
    ),
    (2.2, "(EngineCore pid=2) INFO 11-24 10:00:02 [gpu_model_runner.py:4020] Starting to load model /m..."),
    (
        3.0,
        "(EngineCore pid=2) INFO 11-24 10:00:02 [gpu_model_runner.py:4118] Model loading took 7.12 GiB memory",
    ),
    (4.0, "(EngineCore pid=2) INFO 11-24 10:00:03 [backends.py:916] Dynamo bytecode transform time: 3.20 s"),
    (9.0, "(EngineCore pid=2) INFO 11-24 10:00:08 [monitor.py:34] torch.compile took 8.21 s in total"),
    (9.5, "(EngineCore pid=2) INFO 11-24 10:00:09 [gpu_worker.py:356] Available KV cache memory: 117.93 GiB"),
    (
        9.6,
        "(EngineCore pid=2) INFO 11-24 10:00:09 [kv_cache_utils.py:1312] Maximum concurrency for 4,096 tokens",
    ),
    (12.6, "(EngineCore pid=2) INFO [gpu_model_runner.py:5051] Graph capturing finished in 3 secs, took 0.55 GiB"),
    (
        12.7,
        "(EngineCore pid=2) INFO [core.py:272] init engine (profile, create kv cache, warmup model) took 10.12 seconds",
    ),
]
GPU_V2_FORKED = [
    (0.2, "warm start: forked from a process that had imported vllm.entrypoints.openai.api_server"),
    (0.3, "(APIServer pid=1) INFO 11-28 02:26:07 [api_utils.py:339]  ▄▄ ▄█ █     █     █ ▀▄▀ █  version 0.25.1"),
    (0.3, "(APIServer pid=1) INFO 11-28 02:26:07 [api_utils.py:273] non-default args: {'max_model_len': 4096}"),
    (0.4, "(APIServer pid=1) INFO 11-28 02:26:07 [model.py:619] Resolved architecture: Phi3ForCausalLM"),
    (
        0.4,
        "(APIServer pid=1) INFO 11-28 02:26:07 [kernel.py:292] Final IR op priority after setting platform defaults:",
    ),
    (0.8, "(EngineCore pid=2) INFO 11-28 02:26:08 [core.py:114] Initializing a V1 LLM engine (v0.25.1) with config: "),
    (1.2, "(EngineCore pid=2) INFO 11-28 02:26:08 [parallel_state.py:1942] rank 0 in world size 1 is assigned as DP"),
    (1.3, "(EngineCore pid=2) INFO 11-28 02:26:08 [gpu_worker.py:360] Using V2 Model Runner"),
    (1.4, "(EngineCore pid=2) INFO 11-28 02:26:08 [model_runner.py:281] Loading model from scratch..."),
    (1.6, "(EngineCore pid=2) INFO 11-28 02:26:08 [flash_attn.py:718] Using FlashAttention version 3"),
    (
        2.4,
        "(EngineCore pid=2) INFO 11-28 02:26:09 [model_runner.py:302] Model loading took 7.12 GiB and 0.619560 seconds",
    ),
    (5.4, "(EngineCore pid=2) INFO 11-28 02:26:12 [backends.py:1148] Dynamo bytecode transform time: 3.03 s"),
    (7.4, "(EngineCore pid=2) INFO 11-28 02:26:14 [decorators.py:311] Directly load AOT compilation from path <cache>"),
    (7.4, "(EngineCore pid=2) INFO 11-28 02:26:14 [monitor.py:53] torch.compile took 5.04 s in total"),
    (7.7, "(EngineCore pid=2) INFO 11-28 02:26:14 [gpu_worker.py:538] Available KV cache memory: 63.37 GiB"),
    (7.8, "(EngineCore pid=2) INFO 11-28 02:26:14 [kv_cache_utils.py:2147] Maximum concurrency for 4,096 tokens per"),
    (
        12.4,
        "(EngineCore pid=2) INFO 11-28 02:26:19 [model_runner.py:722] Graph capturing finished in 5 secs, took 0.66",
    ),
    (13.2, "(EngineCore pid=2) INFO 11-28 02:26:20 [core.py:337] init engine (profile, create kv cache, warmup"),
    (13.4, "(APIServer pid=1) INFO 11-28 02:26:20 [api_server.py:616] Starting vLLM server on unix:<session>/s"),
]
GPU_V1_EAGER = [
    (0.3, "warm start: forked from a process that had imported vllm.entrypoints.openai.api_server"),
    (0.4, "(APIServer pid=1) INFO 11-28 02:39:42 [api_utils.py:273] non-default args: {'max_model_len': 1024}"),
    (26.3, "(APIServer pid=1) INFO 11-28 02:40:08 [model.py:619] Resolved architecture: Qwen3NextForCausalLM"),
    (26.3, "(APIServer pid=1) INFO 11-28 02:40:08 [compilation.py:312] Enabled custom fusions: norm_quant, act_quant"),
    (28.0, "(EngineCore pid=2) INFO 11-28 02:40:09 [core.py:114] Initializing a V1 LLM engine (v0.25.1) with config: "),
    (28.5, "(EngineCore pid=2) INFO 11-28 02:40:10 [gpu_model_runner.py:5209] Starting to load model <cache>/shape..."),
    (29.4, "(EngineCore pid=2) INFO 11-28 02:40:11 [gpu_model_runner.py:5306] Model loading took 6.5 GiB memory and"),
    (132.5, "(EngineCore pid=2) WARNING 11-28 02:41:54 [fused_moe.py:1106] Using default MoE config."),
    (145.9, "(EngineCore pid=2) INFO 11-28 02:42:07 [gpu_worker.py:459] Initial free memory 78.66 GiB, reserved 1.0 "
     "GiB memory for KV Cache as specified by kv_cache_memory_bytes config and skipped memory profiling."),
    (146.0, "(EngineCore pid=2) INFO 11-28 02:42:07 [kv_cache_utils.py:2147] Maximum concurrency for 1,024 tokens per"),
    (153.0, "(EngineCore pid=2) INFO 11-28 02:42:14 [core.py:344] init engine (profile, create kv cache, warmup"),
]  # fmt: skip
LOGS = [CPU_COLD, GPU_FORKED, GPU_V2_FORKED, GPU_V1_EAGER]


def seconds(lines: list[tuple[float, str]], ready_s: float) -> dict[str, float]:
    return {phase.name: round(phase.seconds, 6) for phase in phases(lines, ready_s)}


def test_a_cold_start_on_cpus_is_three_imports() -> None:
    assert seconds(CPU_COLD, 33.8) == {
        "imports": 10.3, "arguments": 0.8, "engine": 9.4, "worker": 10.1, "weights": 0.1, "profile": 1.0, "kv": 0.1,
        "warm-up": 0.2, "listening": 1.8,
    }  # fmt: skip


def test_a_forked_start_on_a_gpu_has_its_fork_its_compilation_and_its_graphs() -> None:
    assert seconds(GPU_FORKED, 14.0) == {
        "fork": 0.2, "imports": 0.4, "arguments": 0.5, "engine": 0.4, "worker": 0.7, "weights": 0.8, "compile": 6.0,
        "profile": 0.5, "kv": 0.1, "graphs": 3.0, "warm-up": 0.1, "listening": 1.3,
    }  # fmt: skip


def test_the_v2_model_runner_ends_the_making_of_its_worker_in_words_of_its_own() -> None:
    assert seconds(GPU_V2_FORKED, 14.0) == {
        "fork": 0.2, "imports": 0.1, "arguments": 0.1, "engine": 0.4, "worker": 0.6, "weights": 1.0, "compile": 5.0,
        "profile": 0.3, "kv": 0.1, "graphs": 4.6, "warm-up": 0.8, "listening": 0.8,
    }  # fmt: skip


def test_a_pool_of_given_size_ends_what_comes_before_it_like_one_that_is_measured() -> None:
    assert seconds(GPU_V1_EAGER, 154.4) == {
        "fork": 0.3, "imports": 0.1, "arguments": 25.9, "engine": 1.7, "worker": 0.5, "weights": 0.9, "profile": 116.5,
        "kv": 0.1, "warm-up": 7.0, "listening": 1.4,
    }  # fmt: skip


@pytest.mark.parametrize("eager", [True, False])
def test_no_silence_that_was_seen_of_a_server_which_became_ready_is_taken_for_a_hang(eager: bool) -> None:
    lines = GPU_V1_EAGER if eager else GPU_V2_FORKED
    for seen in range(1, len(lines)):
        silent_s = lines[seen][0] - lines[seen - 1][0]
        assert silent_s < silence_limit_s(lines[:seen], True, True, "cuda", not eager, CAP_S) / 2


def test_ranks_that_write_the_same_end_a_phase_with_the_last() -> None:
    lines = [*GPU_FORKED[:6], (3.4, GPU_FORKED[5][1]), *GPU_FORKED[6:]]
    assert seconds(lines, 14.0)["weights"] == 1.2


def test_a_line_that_no_version_writes_leaves_its_time_to_the_next_phase() -> None:
    assert seconds([line for line in CPU_COLD if "Starting to load" not in line[1]], 33.8)["weights"] == 10.2
    assert seconds([], 5.0) == {LISTENING: 5.0}


def test_where_a_start_is_follows_its_log() -> None:
    assert [reached(GPU_FORKED[:seen]) for seen in (0, 1, 2, 3, 4, 12)] == [
        "fork", "imports", "arguments", "engine", "worker", LISTENING
    ]  # fmt: skip


def test_a_start_may_be_silent_for_a_few_times_what_is_usual_where_it_is() -> None:
    def limits(device: str) -> list[float]:
        return [
            silence_limit_s(GPU_FORKED[:seen], True, True, device, False, CAP_S) for seen in (0, 2, 3, 4, 5, 6, 8, 12)
        ]

    assert limits("cuda") == [20.0, 150.0, 30.0, 30.0, *[300.0] * 4]
    assert limits("cpu") == [20.0, 150.0, 90.0, 90.0, *[LATER_LIMIT_S] * 4]
    assert silence_limit_s(CPU_COLD[:2], False, True, "cpu", False, CAP_S) == COLD_LIMIT_S
    assert silence_limit_s(CPU_COLD[:9], False, True, "cpu", False, CAP_S) == LATER_LIMIT_S


def test_an_engine_that_is_told_to_be_a_new_program_has_the_time_to_import_that_a_cold_ones_has() -> None:
    def limits(forked: bool) -> list[float]:
        return [
            silence_limit_s(GPU_FORKED[:seen], forked, True, "cuda", False, CAP_S, forks_engine=False)
            for seen in range(len(GPU_FORKED) + 1)
        ]

    assert limits(forked=True)[:4] == [20.0, 20.0, 150.0, COLD_LIMIT_S]
    assert limits(forked=True)[3:] == limits(forked=False)[3:]


def test_an_engine_that_vllm_makes_a_new_program_by_itself_has_that_time_too() -> None:
    """As with --numa-bind."""
    why = "Overriding VLLM_WORKER_MULTIPROC_METHOD to 'spawn'. Reasons: NUMA binding requires spawn method"
    said = (1.2, f"(APIServer pid=1) WARNING We must use the `spawn` multiprocessing start method. {why}")
    lines = [*GPU_FORKED[:3], said, *GPU_FORKED[3:]]
    limits = [silence_limit_s(lines[:seen], True, True, "cuda", False, CAP_S) for seen in (3, 4, 5, 7)]
    assert limits == [30.0, COLD_LIMIT_S, COLD_LIMIT_S, LATER_LIMIT_S]


def test_who_gives_a_start_longer_gives_its_silence_longer() -> None:
    def limits(cap_s: float, forked: bool, device: str) -> list[float]:
        return [silence_limit_s(GPU_FORKED[:seen], forked, True, device, True, cap_s) for seen in (3, 5, 6, 11)]

    assert limits(7200.0, False, "cuda") == [1200.0, 3600.0, 3600.0, 3600.0]
    assert limits(60.0, False, "cuda") == limits(CAP_S, False, "cuda") == [300.0, 900.0, 900.0, 900.0]
    assert limits(7200.0, True, "cuda") == [30.0, 300.0, 3600.0, 300.0]
    assert limits(7200.0, True, "cpu") == [90.0, 3600.0, 3600.0, 3600.0]


def test_a_fork_may_be_silent_for_long_only_where_it_may_compile_or_capture() -> None:
    """One line of a compilation is there while it goes on, so the phase behind it may be silent, too."""
    seen = {
        reached(GPU_FORKED[:n]): silence_limit_s(GPU_FORKED[:n], True, True, "cuda", True, CAP_S) for n in range(5, 13)
    }
    assert {phase for phase, limit_s in seen.items() if limit_s == LATER_LIMIT_S} == {"compile", "profile", "graphs"}
    assert {seen[phase] for phase in ("weights", "kv", "warm-up", LISTENING)} == {FORKED_LATER_LIMIT_S}


@pytest.mark.parametrize(
    "line",
    [
        "(EngineCore pid=2) INFO 11-24 [shm_broadcast.py:681] No available shared memory broadcast block found "
        "in 60 seconds. This typically happens when some processes are hanging",
        "(APIServer pid=1) DEBUG 11-24 10:00:12 [utils.py:1263] Waiting for 1 local, 0 remote core engine proc(s) to "
        "start.",
    ],
)
def test_a_server_that_says_only_that_it_waits_does_not_go_on(line: str) -> None:
    assert WAITING.search(line)
    assert not any(WAITING.search(said) for log in LOGS for _, said in log)


@pytest.mark.parametrize("lines", [GPU_FORKED, GPU_V2_FORKED, GPU_V1_EAGER], ids=["0.25", "v2", "v1"])
@pytest.mark.parametrize("forked", [True, False])
def test_weights_that_are_downloaded_may_be_silent_for_long_and_where_nothing_is_forked_until_the_cap(
    lines: list[tuple[float, str]], forked: bool
) -> None:
    loads = next(at for at, (_, line) in enumerate(lines) if "Model loading took" in line)
    before = next(at for at, (_, line) in enumerate(lines) if "Initializing a V1 LLM" in line) + 1
    asked = [(lines[:before], False), (lines[:loads], False), (lines[:loads], True), (lines[: loads + 1], False)]
    limits = [silence_limit_s(seen, forked, dummy, "cuda", False, CAP_S) for seen, dummy in asked]
    cold = [COLD_LIMIT_S, math.inf, LATER_LIMIT_S, LATER_LIMIT_S]
    assert limits == ([90.0, LATER_LIMIT_S, FORKED_LATER_LIMIT_S, FORKED_LATER_LIMIT_S] if forked else cold)
    assert [reads_weights(seen, dummy) for seen, dummy in asked] == [False, True, False, False]


def test_a_model_that_is_made_empty_has_its_weights_to_come_where_they_are_real() -> None:
    empty = next(at for at, (_, line) in enumerate(CPU_COLD) if "Initializing model took" in line) + 1
    loaded = [
        *CPU_COLD[:empty],
        (400.0, "(Worker pid=3) INFO [default_loader.py:502] Loading weights took 2.01 seconds"),
    ]
    asked = [(CPU_COLD[: empty - 1], False), (CPU_COLD[:empty], False), (CPU_COLD[:empty], True), (loaded, False)]
    limits = [silence_limit_s(seen, False, dummy, "cpu", False, CAP_S) for seen, dummy in asked]
    assert limits == [math.inf, math.inf, LATER_LIMIT_S, LATER_LIMIT_S]
    assert [reads_weights(seen, dummy) for seen, dummy in asked] == [True, True, False, False]
    assert seconds(loaded, 401.0)["weights"] == 369.4


@given(st.lists(st.sampled_from([line for log in LOGS for _, line in log]), max_size=30))
def test_phases_are_in_order_and_add_up_to_the_whole_start(words: list[str]) -> None:
    lines = [(float(at), word) for at, word in enumerate(words)]
    found = phases(lines, 40.0)
    order = [*ENDS, LISTENING]
    assert [phase.name for phase in found] == sorted((phase.name for phase in found), key=order.index)
    assert sum(phase.seconds for phase in found) == 40.0
    assert all(phase.seconds >= 0 for phase in found)
