"""Where a vLLM server's start goes, from the lines of its log and when each was seen. Pure; logs of 0.25 to 0.32.

A phase ends with its last line before any that ends a later one (several ranks write the same). What a version does not
write is missing, and its time is in the next phase.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from contract.rows import StartPhase

ENDS: dict[str, re.Pattern[str]] = {
    "fork": re.compile(r"^warm start: "),
    "imports": re.compile(r"vLLM API server version|  version \d|non-default args"),
    "arguments": re.compile(
        r"^\(APIServer [^\[]*\[(?:model|vllm|kernel|compilation|scheduler|cache|parallel|cpu|cuda|arg_utils)\.py:"
    ),
    "engine": re.compile(r"Initializing a V1 LLM engine"),
    "worker": re.compile(r"Starting to load model|Loading model from scratch"),
    "weights": re.compile(r"Loading weights took|Model loading took|Initializing model took"),
    "compile": re.compile(r"torch\.compile (?:takes|took)|Compiling a graph for|Dynamo bytecode transform time"),
    "profile": re.compile(
        r"Available KV cache memory|(?:Auto|Explicitly) set \(.* for KV cache|memory for KV Cache as specified by"
    ),
    "kv": re.compile(r"Maximum concurrency for"),
    "graphs": re.compile(r"Graph capturing finished"),
    "warm-up": re.compile(r"init engine \(profile"),
}
"""The line that ends each phase, in order. `imports` ends when the command line is parsed; `arguments` is the resolving
of the configuration; `engine` and `worker` are the making of those processes, their imports among it (the second line
of `worker` is the V2 model runner's); `profile` is the forward pass that sizes memory, or only warms kernels where the
pool's size is given. The log does not tell when an engine's process was asked for: that is in `engine`."""
MADE_EMPTY = re.compile(r"Initializing model took")
"""Said by 0.32 when the model is there and its weights are not: all that ends `weights` on CPUs where they are random,
but real ones are downloaded and read after it."""
LISTENING = "listening"
FORKED_LIMIT_S = {
    "cpu": {"fork": 20.0, "imports": 20.0, "arguments": 150.0, "engine": 90.0, "worker": 90.0},
    "cuda": {"fork": 20.0, "imports": 20.0, "arguments": 150.0, "engine": 30.0, "worker": 30.0},
}
"""What a forked server may take for a phase without a word, by device: at least five times what was seen (0.2, 0.2,
0.5, 15 and 10 s on two busy cores, the last two of them imports; 0.3 to 2.2 s for these on GPUs, where all is forked).
With real weights it is that of CPUs: what was seen were shapes, which have no tokenizer or processor to read.
`arguments` is once silent for 20 s and more where the cache is new: vLLM looks at the model's class in another
interpreter then."""
FORKED_LATER_LIMIT_S = 300.0
"""The same of each later phase on GPUs where nothing is compiled and no graph is captured: CUDA, NCCL and OpenMP are
first used there, and what forking has damaged may hang then. About three times the most that was seen of eager forked
servers (vLLM 0.25.1): 103 s, in which a hybrid MoE's first forward pass compiled Triton kernels; 20 s in the
warm-up of a dense one where the caches were new, else 9 s or less. On CPUs only small shapes were seen, and weights of
larger ones are made by the host's cores without a word: there it has what a cold one has."""
COLD_LIMIT_S = 300.0
"""The same of a cold start, whose imports come from a disk that may be slow and are silent: ten times the 15 to 25 s
that they were seen to take."""
COLD_SHARE = 1 / 6
"""Of the cap on the whole start, where that is more: who has given slow disks a longer start means its silence, too."""
LATER_LIMIT_S = 900.0
"""Of the later phases of a cold start, and of a forked one where it may compile or capture: that can be silent for
minutes. So of a forked one that neither says a word nor works while it reads real weights: it may wait for another
server, which downloads the same."""
LATER_SHARE = 1 / 2
"""As `COLD_SHARE`. Of the 1800 s that a start has by default both shares are the limits above."""
COMPILING = ("compile", "profile", "graphs")
"""Where that may be: lines of a compilation come while it goes on, so that it may last into `profile`."""
SPAWNS = re.compile(r"We must use the `spawn` multiprocessing start method")
"""Said (by 0.32) where the next process is a new program whatever was asked for: --numa-bind, WSL, CUDA initialised."""
BEFORE_ENGINE = ("fork", "imports", "arguments")
WAITING = re.compile(r"No available shared memory broadcast block found|Waiting for \d+ local, \d+ remote core engine")
"""What an engine says each minute that its workers do not answer, and a front end (where all is logged) while its
engine starts."""


def phases(lines: Sequence[tuple[float, str]], ready_s: float) -> list[StartPhase]:
    """Return the phases of a start that was ready after `ready_s`; `lines` are (seconds since the launch, line)."""
    found: list[StartPhase] = []
    begin_s, at = 0.0, 0
    for name, later in _with_later():
        end = None
        for index in range(at, len(lines)):
            line = lines[index][1]
            if any(ENDS[other].search(line) for other in later):
                break
            if ENDS[name].search(line):
                end = index
        if end is not None:
            found.append(StartPhase(name, begin_s, lines[end][0] - begin_s))
            begin_s, at = lines[end][0], end + 1
    return [*found, StartPhase(LISTENING, begin_s, ready_s - begin_s)]


def reached(lines: Sequence[tuple[float, str]]) -> str:
    """Return the phase that a start is in."""
    return next(
        (later[0] if later else LISTENING)
        for name, later in reversed([("", list(ENDS)), *_with_later()])
        if not name or any(ENDS[name].search(line) for _, line in lines)
    )


def silence_limit_s(
    lines: Sequence[tuple[float, str]],
    forked: bool,
    dummy_weights: bool,
    device: str,
    compiles: bool,
    cap_s: float,
    forks_engine: bool = True,
) -> float:
    """Return how long a start may say nothing where it is; `compiles`: not eager; `cap_s`: what the whole start may
    take; `forks_engine`: whether a forked server was told to fork its engine, too. One that is a new program imports
    anew: from its making on the start has what a cold one has. vLLM downloads weights without a word: there the cap
    alone holds for a cold one, and this limit for a forked one whose processes do not work either."""
    phase = _reached(lines, dummy_weights)
    if phase not in BEFORE_ENGINE and (not forks_engine or any(SPAWNS.search(line) for _, line in lines)):
        forked = False
    if phase == "weights" and not dummy_weights:
        return max(LATER_LIMIT_S, LATER_SHARE * cap_s) if forked else math.inf
    limits = FORKED_LIMIT_S[device if dummy_weights else "cpu"]
    if phase in limits:
        return limits[phase] if forked else max(COLD_LIMIT_S, COLD_SHARE * cap_s)
    if forked and device == "cuda" and not (compiles and phase in COMPILING):
        return FORKED_LATER_LIMIT_S
    return max(LATER_LIMIT_S, LATER_SHARE * cap_s)


def reads_weights(lines: Sequence[tuple[float, str]], dummy_weights: bool) -> bool:
    """Return whether a start is where real weights are downloaded and read."""
    return not dummy_weights and _reached(lines, dummy_weights) == "weights"


def _reached(lines: Sequence[tuple[float, str]], dummy_weights: bool) -> str:
    return reached(lines if dummy_weights else [line for line in lines if not MADE_EMPTY.search(line[1])])


def _with_later() -> list[tuple[str, list[str]]]:
    names = list(ENDS)
    return [(name, names[position + 1 :]) for position, name in enumerate(names)]
