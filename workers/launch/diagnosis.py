"""Why a server did not start or has ended, read from its log. Pure; one table of patterns, first match wins."""

from __future__ import annotations

import re

from contract.failures import FailureClass
from contract.rows import Failure

_CARD_FAILED = (
    r"\b(?:[A-Z]\w*Error): [^\n]*(?:No CUDA GPUs are available|no CUDA-capable device is detected|CUDA unknown error"
    r"|system not yet initialized|uncorrectable ECC error|uncorrectable NVLink error)[^\n]*"
)
"""What torch and CUDA say of a card that is there and of no use: no kernel or configuration brings that about. Not
`busy or unavailable`, which may be over in a moment. Source: cudaError_t of the CUDA runtime's reference."""
_CUDA_ERROR = r"\b(?:[A-Z]\w*Error): [^\n]*\b(?:CUDA error|NCCL)\b(?![^\n]*(?:no kernel image|provided PTX))[^\n]*"
"""Any other; but a kernel that the architecture or the driver cannot run would be met on every card of the kind."""
_PATTERNS: tuple[tuple[str, FailureClass], ...] = (
    (_CARD_FAILED, FailureClass.CARD_FAILED),
    (r"is larger than the available KV cache memory.*", FailureClass.KV_TOO_SMALL),
    (r"No available memory for the cache blocks.*", FailureClass.KV_TOO_SMALL),
    (r"Free memory on device .* less than desired GPU memory utilization.*", FailureClass.FREE_MEMORY_LOW),
    (r"Error in memory profiling.*", FailureClass.MEMORY_PROFILE),
    (r"greater than the derived max_model_len.*", FailureClass.LENGTH_ABOVE_MODEL),
    (r"(?s)File [^\n]*, in capture_model\n.*?CUDA out of memory[^\n]*", FailureClass.GRAPH_MEMORY),
    (r"CUDA out of memory.*", FailureClass.OUT_OF_MEMORY),
    (r"[Aa]ddress already in use.*", FailureClass.PORT_TAKEN),
    (r"error: (?:argument|unrecognized arguments|the following arguments).*", FailureClass.BAD_ARGUMENT),
    (r"ValidationError: [^\n]*\n(?:[^\n]*\n)?[^\n]*Value error, [^\n]*", FailureClass.BAD_ARGUMENT),
    (r"ValidationError: .*", FailureClass.BAD_ARGUMENT),
    (r"No module named '?vllm.*", FailureClass.NOT_INSTALLED),
    (r"(?:RepositoryNotFound|LocalEntryNotFound|GatedRepo)Error.*", FailureClass.MODEL_MISSING),
    (r"is not a local folder.*", FailureClass.MODEL_MISSING),
    (r"Cannot find any model weights with.*", FailureClass.MODEL_MISSING),
    (r"\bNo such file or directory: [^\n]*\.safetensors\b.*", FailureClass.MODEL_MISSING),
    (r"\b[A-Z]\w*Error: [^\n]*(?:No space left on device|Disk quota exceeded).*", FailureClass.NO_SPACE),
    (_CUDA_ERROR, FailureClass.CUDA_ERROR),
)
_NOISE = re.compile(r"Engine core initialization failed|Failed core proc|See root cause above|EngineDeadError")
_CONSEQUENCE = re.compile(
    r"RuntimeError: (?:cancelled\s*$|Executor failed\.|Engine core process .* died unexpectedly)"
    r"|TimeoutError: RPC call to .* timed out"
)
"""What an engine meets where one of its workers was killed or hangs: told where nothing else is."""
_PASSED_ON = re.compile(r"Worker failed with error")
"""What an engine meets where one of its workers has an error, which stands above it in the log if it has words."""
_WORKER_DIED = re.compile(r"\w*Worker\w*\b[^\n]* died unexpectedly[^\n]*")
_ERROR_LINE = re.compile(r"\b(?:[A-Z]\w*Error|[A-Z]\w*Exception): .+")
_NO_ERROR = re.compile(r"\b(?:DEBUG|INFO|WARNING)\b.*$", re.MULTILINE)
"""What vLLM logs and goes on after, tracebacks among it: no cause of an end."""
_ENGINE_DEAD = re.compile(r"^.*\bEngineDeadError\b", re.MULTILINE)
"""From there on a log tells of the shutdown."""
_FULL = re.compile(r"CUDA out of memory.*")
_ADVICE = re.compile(r"\bSet --[\w-]+[^\n]*")
_ESTIMATE = re.compile(r"estimated maximum model length is (\d+)")
TAIL_LINES = 40


def of_start(log: str, exit_code: int | None) -> Failure:
    """Return the failure that the log of a server that ended during its start tells of."""
    tail = "\n".join(log.splitlines()[-TAIL_LINES:])
    for pattern, failure_class in _PATTERNS:
        match = re.search(pattern, log)
        if match:
            return Failure(failure_class, _sentence(log, match), tail)
    message = _last_error(log) or f"the server ended with exit code {exit_code} and no error line"
    return Failure(FailureClass.START_FAILED, message, tail)


def of_first_completion(log: str, ready_at: int, answered: str, serves: bool) -> Failure:
    """Return the failure of a server whose first completion failed with `answered`.

    `ready_at`: characters of its log when it came to listen. `serves`: it and its engine live on, so that nothing is
    known to have ended. Where they do not and the log names an error of their own, the same start would meet it again,
    on another card too, unless it is one of CUDA or NCCL. Else it was ended from outside (a worker too), or hung, or
    nobody knows. A flag that the log said to set stands beside the error.
    """
    tail = "\n".join(log.splitlines()[-TAIL_LINES:])
    told = _until_the_end(log[ready_at:])
    error = _last_error(told)
    full = _FULL.search(told)
    if not serves and full is not None:
        failed, error = FailureClass.OUT_OF_MEMORY, _sentence(told, full)
    elif not serves and error is not None and (of_cards := _of_cards(told)) is not None:
        failed = of_cards
    elif serves or error is None or _CONSEQUENCE.search(error) or _WORKER_DIED.search(told):
        return Failure(
            FailureClass.ENGINE_DEAD, f"ready, but the first completion failed: {answered}{_last(told)}", tail
        )
    else:
        failed = FailureClass.START_FAILED
    advice = _ADVICE.search(log)
    before = f" (its log said before: {advice.group(0).strip()})" if advice else ""
    return Failure(failed, f"ready, but the first completion ended the engine: {error}{before}; seen: {answered}", tail)


def of_death(log: str, ready_at: int, message: str) -> Failure:
    """Return the failure of a server that was ready and then ended, or no longer answers.

    `ready_at`: characters of its log when it came to listen.
    """
    match = _FULL.search(log, ready_at)
    if match is not None:
        return Failure(FailureClass.MEMORY_UNDER_LOAD, f"{message}; {_sentence(log, match)}")
    told = _until_the_end(log[ready_at:])
    card_failed = _of_cards(told) is FailureClass.CARD_FAILED
    return Failure(FailureClass.CARD_FAILED if card_failed else FailureClass.ENGINE_DEAD, f"{message}{_last(told)}")


def estimated_max_model_len(message: str) -> int | None:
    """Return vLLM's own estimate of the longest length that fits, where the message carries one (tokens)."""
    match = _ESTIMATE.search(message)
    return int(match.group(1)) if match else None


def _of_cards(told: str) -> FailureClass | None:
    """The class of an error of CUDA or NCCL, where there is one."""
    if re.search(_CARD_FAILED, told):
        return FailureClass.CARD_FAILED
    return FailureClass.CUDA_ERROR if re.search(_CUDA_ERROR, told) else None


def _until_the_end(log: str) -> str:
    """The log of a server that was ready, without what it went on after and what its shutdown wrote."""
    log = _NO_ERROR.sub("", log)
    end = _ENGINE_DEAD.search(log)
    return log if end is None else log[: end.start()]


def _last(told: str) -> str:
    """What is said last of an error, to stand behind what was seen; it need not be the cause."""
    error, died = _last_error(told), _WORKER_DIED.search(told)
    if died is not None and (error is None or _CONSEQUENCE.search(error)):
        error = died.group(0)
    return "" if error is None else f" (the last error in its log: {error})"


def _last_error(log: str) -> str | None:
    """Its last line that names an exception, less those that only say that there was one; of those that follow from a
    worker's end where there is no other."""
    errors = [m.group(0) for m in _ERROR_LINE.finditer(log) if not _NOISE.search(m.group(0))]
    heard = [error for error in errors if not _CONSEQUENCE.search(error)]
    own = [error for error in heard if not _PASSED_ON.search(error)]
    found = own or heard or errors
    return found[-1] if found else None


def _sentence(log: str, match: re.Match[str]) -> str:
    """The whole line in which the match ends, without its log prefix."""
    start = log.rfind("\n", 0, match.end()) + 1
    end = log.find("\n", match.end())
    line = log[start : end if end >= 0 else len(log)]
    return re.sub(r"^.*?\b((?:[A-Z]\w*Error|[A-Z]\w*Exception): )", r"\1", line).strip()
