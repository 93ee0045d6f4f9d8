"""Why a server did not start, from real logs' lines."""

import pytest

from contract.failures import FailureClass
from contract.rows import Failure
from workers.launch import diagnosis

TOO_SMALL = (
    "(EngineCore pid=9) ERROR 11-24 [core.py:1] ValueError: To serve at least one request with the models's max seq "
    "len (8192), (0.03 GiB KV cache is needed, which is larger than the available KV cache memory (0.02 GiB). Based "
    "on the available memory, the estimated maximum model length is 3968. Try increasing `gpu_memory_utilization`.\n"
    "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}\n"
)


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (TOO_SMALL, FailureClass.KV_TOO_SMALL),
        ("ValueError: No available memory for the cache blocks. Try increasing", FailureClass.KV_TOO_SMALL),
        (
            "ValueError: Free memory on device cuda:0 (1.2/79.1 GiB) on startup is less than desired GPU memory "
            "utilization (0.9, 71.2 GiB).",
            FailureClass.FREE_MEMORY_LOW,
        ),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", FailureClass.OUT_OF_MEMORY),
        (
            '(Worker pid=7) ERROR   File "/x/gpu_model_runner.py", line 5, in capture_model\n'
            "(Worker pid=7) ERROR     self._capture_cudagraphs(\n"
            "(Worker pid=7) ERROR torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB\n",
            FailureClass.GRAPH_MEMORY,
        ),
        ("OSError: [Errno 98] Address already in use", FailureClass.PORT_TAKEN),
        ("api_server.py: error: unrecognized arguments: --no-such-flag", FailureClass.BAD_ARGUMENT),
        (
            "pydantic_core.ValidationError: Value error, User-specified max_model_len (9) is greater than the derived "
            "max_model_len (max_position_embeddings=8)",
            FailureClass.LENGTH_ABOVE_MODEL,
        ),
        (
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
            "  Value error, Cannot find the config file for awq [type=value_error, input_value=ArgsKwargs(...)]\n",
            FailureClass.BAD_ARGUMENT,
        ),
        ("(Worker pid=7) ERROR RuntimeError: No CUDA GPUs are available", FailureClass.CARD_FAILED),
        (
            "RuntimeError: Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling "
            "NumCudaDevices() that might have already set an error? Error 802: system not yet initialized",
            FailureClass.CARD_FAILED,
        ),
        (
            "torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be "
            "asynchronously reported at some other API call\n"
            "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n",
            FailureClass.CARD_FAILED,
        ),
        (
            "torch.AcceleratorError: CUDA error: CUDA-capable device(s) is/are busy or unavailable",
            FailureClass.CUDA_ERROR,
        ),
        ("RuntimeError: NCCL error: unhandled cuda error (run with NCCL_DEBUG=INFO)", FailureClass.CUDA_ERROR),
        (
            "NCCL version 2.27.5+cuda12.9\nRuntimeError: CUDA error: no kernel image is available for execution on the "
            "device\n",
            FailureClass.START_FAILED,
        ),
        ("NCCL version 2.27.5+cuda12.9\nRuntimeError: something new", FailureClass.START_FAILED),
        ("OSError: [Errno 28] No space left on device: '/var/tmp/vllm-capacity-0/vllm'", FailureClass.NO_SPACE),
        ("RuntimeError: Cannot find any model weights with `/models/x`", FailureClass.MODEL_MISSING),
        (
            "FileNotFoundError: No such file or directory: /models/x/model-00003-of-00004.safetensors",
            FailureClass.MODEL_MISSING,
        ),
        ("RuntimeError: something new", FailureClass.START_FAILED),
        ("", FailureClass.START_FAILED),
    ],
)
def test_the_class_is_read_from_the_log(log: str, expected: FailureClass) -> None:
    assert diagnosis.of_start(log, 1).failure_class == expected


def test_message_is_the_root_cause_and_carries_the_engines_estimate() -> None:
    failure = diagnosis.of_start(TOO_SMALL, 1)
    assert failure.message.startswith("ValueError: To serve at least one request")
    assert diagnosis.estimated_max_model_len(failure.message) == 3968


def test_what_vllm_refused_is_told_by_the_line_that_says_why() -> None:
    log = "(APIServer pid=8) pydantic_core._pydantic_core.ValidationError: 1 validation error for {}\n"
    log += "(APIServer pid=8)   Value error, Cannot find the config file for awq [type=value_error, input_value=...]\n"
    log += "(APIServer pid=8)     For further information visit https://errors.pydantic.dev/2.12/v/value_error\n"
    assert "Cannot find the config file for awq" in diagnosis.of_start(log.format("ModelConfig"), 1).message


def test_unknown_errors_keep_their_own_words_not_the_wrappers() -> None:
    log = "RuntimeError: the cause\nRuntimeError: Engine core initialization failed. See root cause above.\n"
    assert diagnosis.of_start(log, 1).message == "RuntimeError: the cause"


def test_memory_that_ran_out_while_graphs_were_captured_is_told_in_its_own_line() -> None:
    log = "File x, in capture_model\n  more\n(W) ERROR torch.OutOfMemoryError: CUDA out of memory. Tried\nlater\n"
    assert diagnosis.of_start(log, 1).message == "OutOfMemoryError: CUDA out of memory. Tried"


def test_a_worker_that_died_in_a_start_leaves_what_its_engine_met_as_the_only_word() -> None:
    log = "ERROR [core.py:1] RuntimeError: cancelled\nRuntimeError: Engine core initialization failed. See root cause\n"
    assert diagnosis.of_start(log, 1).message == "RuntimeError: cancelled"
    assert diagnosis.of_start("ERROR ValueError: the cause\n" + log, 1).message == "ValueError: the cause"


STARTED = (
    "(EngineCore pid=9) WARNING 11-27 [gdn.py:235] It is JIT-compiled. Set --gdn-prefill-backend triton to skip.\n"
    "(EngineCore pid=9) WARNING 11-27 [gdn.py:1165] ModuleNotFoundError: No module named 'flashinfer'\n"
    "(APIServer pid=8) ERROR 11-27 [http.py:9] ConnectionError: the hub does not answer, trying again\n"
    "(APIServer pid=8) INFO:     Application startup complete.\n"
)
DEAD = (
    "(APIServer pid=8) ERROR 11-27 [serving.py:494] vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered "
    "an issue. See stack trace (above) for the root cause.\n"
    "[rank0]: OSError: what a shutdown meets\n"
)
KILLED = (
    "(EngineCore pid=9) ERROR 11-27 [multiproc_executor.py:285] Worker proc VllmWorker-1 died unexpectedly, shutting "
)
KILLED += "down executor.\n"
ENDED = "(EngineCore pid=9) ERROR 11-27 [core.py:1233] {}\n"
PASSED_ON = ENDED.format(
    "RuntimeError: Worker failed with error '{}', please check the stack trace above for the root cause"
)
HTTP = "http_error: HTTP 500"


def first_completion(error: str, serves: bool = False) -> Failure:
    return diagnosis.of_first_completion(STARTED + error + DEAD * (not serves), len(STARTED), HTTP, serves)


@pytest.mark.parametrize(
    ("log", "failure_class", "said"),
    [
        (ENDED.format("ModuleNotFoundError: No module named 'flashinfer'"), FailureClass.START_FAILED, "'flashinfer'"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried\n", FailureClass.OUT_OF_MEMORY, "CUDA out of memory"),
        (ENDED.format("RuntimeError: CUDA error: launch failure"), FailureClass.CUDA_ERROR, "CUDA error: launch"),
        (ENDED.format("RuntimeError: CUDA error: uncorrectable ECC error"), FailureClass.CARD_FAILED, "ECC error"),
        ("", FailureClass.ENGINE_DEAD, "failed: http_error: HTTP 500"),
        # a worker is killed
        (KILLED + ENDED.format("RuntimeError: cancelled"), FailureClass.ENGINE_DEAD, "VllmWorker-1 died unexpectedly"),
        (ENDED.format("RuntimeError: cancelled"), FailureClass.ENGINE_DEAD, "RuntimeError: cancelled"),
        (ENDED.format("RuntimeError: Executor failed."), FailureClass.ENGINE_DEAD, "Executor failed"),
        # a worker hangs
        (
            ENDED.format("TimeoutError: RPC call to execute_model timed out."),
            FailureClass.ENGINE_DEAD,
            "RPC call to execute_model timed out.",
        ),
        # a worker has an error
        (PASSED_ON.format("no kernel"), FailureClass.START_FAILED, "Worker failed with error 'no kernel'"),
        (
            "(Worker pid=7) ERROR [multiproc.py:1] ValueError: no kernel\n" + PASSED_ON.format("no kernel"),
            FailureClass.START_FAILED,
            "ended the engine: ValueError: no kernel",
        ),
        (
            "(Worker pid=7) ERROR [multiproc.py:1] torch.AcceleratorError: CUDA error: an illegal memory access\n"
            + PASSED_ON.format("CUDA error: an illegal memory access")
            + ENDED.format("RuntimeError: cancelled"),
            FailureClass.CUDA_ERROR,
            "AcceleratorError: CUDA error: an illegal memory access",
        ),
        (
            "(Worker_TP0 pid=6) ERROR [multiproc.py:1] torch.OutOfMemoryError: CUDA out of memory. Tried\n"
            "(Worker_TP1 pid=7) ERROR [multiproc.py:1] torch.distributed.DistBackendError: NCCL error\n",
            FailureClass.OUT_OF_MEMORY,
            "OutOfMemoryError: CUDA out of memory. Tried",
        ),
    ],
)
def test_a_first_completion_that_ends_its_engine_is_not_tried_again_only_where_the_same_would_follow(
    log: str, failure_class: FailureClass, said: str
) -> None:
    failure = first_completion(log)
    assert failure.failure_class == failure_class
    assert said in failure.message
    assert HTTP in failure.message
    assert "shutdown" not in failure.message


def test_an_engine_that_its_first_completion_ends_has_the_flag_that_its_log_advised_beside_the_error() -> None:
    assert first_completion(ENDED.format("ModuleNotFoundError: No module named 'flashinfer'")).message == (
        "ready, but the first completion ended the engine: ModuleNotFoundError: No module named 'flashinfer' (its log "
        "said before: Set --gdn-prefill-backend triton to skip.); seen: http_error: HTTP 500"
    )


@pytest.mark.parametrize("stray", ["ValueError: of a plugin\n", "torch.OutOfMemoryError: CUDA out of memory. Tried\n"])
def test_an_engine_that_lives_on_was_ended_by_nothing_whatever_its_log_has(stray: str) -> None:
    failure = first_completion(stray, serves=True)
    assert failure.failure_class == FailureClass.ENGINE_DEAD
    assert failure.message.startswith("ready, but the first completion failed: http_error: HTTP 500 (the last error in")
    assert "ended" not in failure.message


@pytest.mark.parametrize("serves", [False, True])
def test_what_a_start_met_and_went_on_after_is_no_cause_of_a_later_end(serves: bool) -> None:
    assert first_completion("", serves).message == "ready, but the first completion failed: http_error: HTTP 500"
    full = STARTED + "torch.OutOfMemoryError: CUDA out of memory. Tried again with less\n"
    failure = diagnosis.of_death(full + DEAD, len(full), "7 of 8 failed")
    assert (failure.failure_class, failure.message) == (FailureClass.ENGINE_DEAD, "7 of 8 failed")


def test_a_server_that_ended_under_load_has_its_logs_error_beside_what_was_seen() -> None:
    log = STARTED + "INFO x\nWARNING ValueError: never mind\nERROR RuntimeError: the kernel\n" + DEAD
    message = diagnosis.of_death(log, len(STARTED), "7 of 8 failed").message
    assert message == "7 of 8 failed (the last error in its log: RuntimeError: the kernel)"


def test_a_server_that_ended_under_load_says_whether_it_was_for_memory() -> None:
    dead = diagnosis.of_death("INFO all is well\n", 0, "7 of 8 requests failed")
    assert (dead.failure_class, dead.message) == (FailureClass.ENGINE_DEAD, "7 of 8 requests failed")
    full = diagnosis.of_death("torch.OutOfMemoryError: CUDA out of memory. Tried\n", 0, "7 of 8 requests failed")
    assert full.failure_class == FailureClass.MEMORY_UNDER_LOAD
    assert full.message == "7 of 8 requests failed; OutOfMemoryError: CUDA out of memory. Tried"


@pytest.mark.parametrize(
    ("error", "failure_class"),
    [
        ("uncorrectable ECC error encountered", FailureClass.CARD_FAILED),
        ("an illegal memory access was encountered", FailureClass.ENGINE_DEAD),
    ],
)
def test_a_card_that_fails_under_load_is_told_from_a_kernel_that_does(error: str, failure_class: FailureClass) -> None:
    log = STARTED + f"ERROR torch.AcceleratorError: CUDA error: {error}\n" + DEAD
    assert diagnosis.of_death(log, len(STARTED), "7 of 8 failed").failure_class == failure_class
