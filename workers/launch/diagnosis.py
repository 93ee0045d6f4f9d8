"""Why a server did not start or has ended, read from its log. Pure; one table of patterns, first match wins."""

from __future__ import annotations

import re

from contract.failures import FailureClass
from contract.rows import Failure

_PATTERNS: tuple[tuple[str, FailureClass], ...] = (
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
)
_NOISE = re.compile(r"Engine core initialization failed|Failed core proc|See root cause above|EngineDeadError")
_ERROR_LINE = re.compile(r"\b(?:[A-Z]\w*Error|[A-Z]\w*Exception): .+")
_NO_ERROR = re.compile(r"\b(?:DEBUG|INFO|WARNING)\b.*$", re.MULTILINE)
"""What vLLM logs and goes on after, tracebacks among it: no cause of an end."""
_MAY_PASS = re.compile(r"\b(?:CUDA error|NCCL|Xid)\b")
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


def of_first_completion(log: str, answered: str) -> Failure:
    """Return the failure of a server that came to listen and failed its first completion with `answered`.

    Where its log names an error, the same start would meet it again, but for what a card may do once. Else it was ended
    from outside, or nobody knows. A flag that the log said to set stands beside the error.
    """
    tail = "\n".join(log.splitlines()[-TAIL_LINES:])
    error = _last_error(_NO_ERROR.sub("", log))
    if error is None:
        return Failure(FailureClass.ENGINE_DEAD, f"ready, but the first completion failed: {answered}", tail)
    failed = FailureClass.ENGINE_DEAD if _MAY_PASS.search(error) else FailureClass.START_FAILED
    if "CUDA out of memory" in error:
        failed = FailureClass.OUT_OF_MEMORY
    advice = _ADVICE.search(log)
    told = f" (its log said before: {advice.group(0).strip()})" if advice else ""
    return Failure(failed, f"ready, but the first completion ended the engine: {error}{told}", tail)


def of_death(log: str, message: str) -> Failure:
    """Return the failure of a server that was ready and then ended, or no longer answers."""
    match = re.search(r"CUDA out of memory.*", log)
    if match is not None:
        return Failure(FailureClass.MEMORY_UNDER_LOAD, f"{message}; {_sentence(log, match)}")
    error = _last_error(_NO_ERROR.sub("", log))
    return Failure(FailureClass.ENGINE_DEAD, message if error is None else f"{message}; {error}")


def estimated_max_model_len(message: str) -> int | None:
    """Return vLLM's own estimate of the longest length that fits, where the message carries one (tokens)."""
    match = _ESTIMATE.search(message)
    return int(match.group(1)) if match else None


def _last_error(log: str) -> str | None:
    """Its last line that names an exception, less those that only say that there was one."""
    errors = [m.group(0) for m in _ERROR_LINE.finditer(log) if not _NOISE.search(m.group(0))]
    return errors[-1] if errors else None


def _sentence(log: str, match: re.Match[str]) -> str:
    """The whole line in which the match ends, without its log prefix."""
    start = log.rfind("\n", 0, match.end()) + 1
    end = log.find("\n", match.end())
    line = log[start : end if end >= 0 else len(log)]
    return re.sub(r"^.*?\b((?:[A-Z]\w*Error|[A-Z]\w*Exception): )", r"\1", line).strip()
