"""What a user can do about a failure, by its class: one sentence each, for the pages and the terminal. Pure.

A class that is not in the table leaves nothing to do but to read the end of the log, which every row holds.
"""

from __future__ import annotations

from contract.failures import FailureClass as F


def _resume(*changes: str) -> str:
    return f"`{' '.join(('python -m orchestrator resume=RUN', *changes))}` measures them"


_RESUME = _resume()

NEXT_STEPS: dict[F, str] = {
    F.CLIENT_SOCKETS: "give the host of the load processes what its message says had run out: open files of a process "
    "(`ulimit -n`), of the host (`fs.file-max`), or local ports (`ip_local_port_range`); then " + _RESUME,
    F.BAD_ARGUMENT: "correct the flag that vLLM names (`server.…`, `server.extra_args`) and start the run again",
    F.LENGTH_ABOVE_MODEL: "ask for no length beyond the one that the model was made for",
    F.MODEL_MISSING: "check `model.name`, HF_TOKEN and the network, or put the model into the cache of the node first",
    F.NOT_INSTALLED: "install vLLM in the Python environment of that node",
    F.KV_TOO_SMALL: "this is a result; for the length itself raise `server.gpu_memory_utilization`, or spread the "
    "model over more cards (`server.tensor_parallel_size`)",
    F.NO_SPACE: "make room on the disk of that node which its message or the end of the log names (TMPDIR, /var/tmp or "
    "VLLM_CAPACITY_CACHE_ROOT, /dev/shm); then " + _RESUME,
    F.FREE_MEMORY_LOW: "end what else holds the card's memory, or name other cards in CUDA_VISIBLE_DEVICES, or lower "
    "`server.gpu_memory_utilization`; after the first " + _RESUME,
    F.MEMORY_PROFILE: "have nobody else start or stop on the card; then " + _RESUME,
    F.OUT_OF_MEMORY: "ask for less (a smaller `server.kv_cache_memory_bytes`, fewer `sequences` or shorter lengths of "
    "the sweep), or spread the model over more cards (`server.tensor_parallel_size`)",
    F.GRAPH_MEMORY: "leave memory for CUDA graphs (a lower `server.gpu_memory_utilization` or "
    "`server.kv_cache_memory_bytes`), or do without them (`server.enforce_eager=true`)",
    F.READY_TIMEOUT: "give it longer: " + _resume("engine.ready_timeout_s=SECONDS"),
    F.NO_PROGRESS: "see in the end of its log where it hung; where it was only slow (imports from a shared file "
    "system, say), give it longer, for its silence may last a sixth of that before the weights, and half after them: "
    + _resume("engine.ready_timeout_s=SECONDS"),
    F.CUDA_ERROR: "see at the end of its log what CUDA or NCCL could not do: where one card alone has it, leave that "
    "out (CUDA_VISIBLE_DEVICES), where all have it, it is the configuration or the driver; then " + _RESUME,
    F.MEMORY_UNDER_LOAD: "leave memory for activations: a lower `server.gpu_memory_utilization`, "
    "`server.kv_cache_memory_bytes` or `server.max_num_batched_tokens`",
    F.POINT_TIMEOUT: "it had an hour, or three times its estimate where that is more: ask for less of it (fewer "
    "`load.requests_per_level`, shorter lengths); where the server hung " + _RESUME,
    F.LOAD_TOO_LARGE: "send fewer or shorter answers (`load.requests_per_level`, `load.output_tokens`)",
    F.CLIENT_LIMITED: "its row, of an older version, does not say what its load client lacked; " + _RESUME,
    F.CLIENT_CORES_FEW: "its load processes need more free cores than the host had, or than its container's CPU quota "
    "allows: with fewer servers on it, a larger quota, or on a host with more cores, " + _RESUME,
    F.CLIENT_STREAMS_FEW: "more processes or cores would not help: see in its message what held its load processes up, "
    "and have nothing else busy on that host; then " + _RESUME,
    F.CLIENT_PROCESSES_FIXED: "leave the number of load processes open: " + _resume("load.processes=auto"),
    F.CLIENT_PROCESSES_FEW: "see in its message why its try with more load processes came to nothing; then " + _RESUME,
    F.NOT_TRIED: "see to what ended its servers, which its message names; then " + _RESUME,
    F.STOPPED: _RESUME,
    F.ACTOR_LOST: _RESUME,
    F.CARD_LOST: "see what the kernel says of the card (`dmesg`, Xid) and reset it, or leave it out "
    "(CUDA_VISIBLE_DEVICES); then " + _RESUME,
    F.CARD_FAILED: "see what `nvidia-smi -q` (ECC, row remapping, fabric) and `dmesg` (Xid) say of the card and reset "
    "it, or leave it out (CUDA_VISIBLE_DEVICES); then " + _RESUME,
    F.NODE_LOST: _RESUME,
    F.NOT_WRITTEN: "make room for the run directory; then " + _RESUME,
}


def next_step(failure_class: str | None) -> str | None:
    """Return what can be done about a row's failure class; None where nothing general can."""
    return NEXT_STEPS.get(F(failure_class)) if failure_class in set(F) else None


def table() -> str:
    """Return the table as Markdown: what docs/reliability.md holds."""
    lines = ["| class | next step |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{failure_class}` | {words} |" for failure_class, words in NEXT_STEPS.items())])
