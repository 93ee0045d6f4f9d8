"""Whether the same Python takes as long in a forked process as in a new one: all in turns on one core.

    python benchmarks/fork_pace.py [--processes 7] [--turns 150]

Of the processes some have imported vLLM as a cold server does (new); some are forked, twice, as a server's engine is,
each from a process of its own that has imported it as a warm parent does (forked; `workers/launch/warm_parent.py`), or
as one did until 2026-11-29, with the garbage collector off (unswept). Each then does what an engine's loop is made of:
blocks of KV taken and given back, lists of tokens, small tensors, a message packed and read; all have their frames in
one piece of memory, as forked servers have and cold ones have not, so that all but that is compared. They take turns of
some 20 ms, in an order that chance gives anew each time, on one core, so that the machine is as fast for one as for the
next; a turn counts against the mean of its round, the farthest fifth on either side not at all. Needs vLLM, no card,
and 1 GiB for each of the processes: 21 by default.

Prints the ratios of their CPU time with 90 % intervals: processes differ by more than turns (where their memory lies,
the seed of their hashes), so each counts once.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import math
import multiprocessing
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from analysis.numbers.intervals import mean_log, pooled_noise
from workers.engines.vllm import WARM_MODULES
from workers.launch.warm import SCRIPT

MODULES = [name for name in WARM_MODULES if ":" not in name]
"""Without functions to call."""
STEPS = 60
"""Of one turn."""
SET_ASIDE = 0.2
"""Of a process's turns, either side: what else the machine did meanwhile is in those."""
TAIL = 0.05
"""Either side of an interval."""
ENDING_S = 10.0
"""For a process that is told to end."""


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=7, help="of each kind, at least 2")
    parser.add_argument("--turns", type=int, default=150, help="of each")
    options = parser.parse_args()
    if options.processes < 2:
        parser.error("--processes must be at least 2: only processes of one kind tell what two of them differ by")
    if options.turns < 1:
        parser.error("--turns must be at least 1")
    with contextlib.ExitStack() as stack:
        ends = [stack.enter_context(_started(kind)) for _ in range(options.processes) for kind in KINDS]
        try:
            taken = [_round(ends) for _ in range(options.turns)]
        except (EOFError, OSError):
            sys.exit("a process has ended between its turns: is there 1 GiB of memory for each?")
    paces = [_pace([turns[at] / _middle(turns) for turns in taken]) for at in range(len(ends))]
    told = {kind: paces[at :: len(KINDS)] for at, kind in enumerate(KINDS)}
    print(f"CPU time of a turn: {1e3 * statistics.median(map(_middle, taken)):.1f} ms")
    for one, other in ((forked, new), (unswept, new), (unswept, forked)):
        noise = pooled_noise([told[one], told[other]])
        assert noise is not None
        apart, margin = mean_log(told[one]) - mean_log(told[other]), noise.margin(2 / options.processes, TAIL)
        ratio, low, high = (math.exp(each) for each in (apart, apart - margin, apart + margin))
        print(f"{one.__name__} over {other.__name__}: {ratio:.4f} (90 % interval {low:.4f} to {high:.4f})")
    for kind, its in told.items():
        print(f"  {kind.__name__}, each process over the mean of all: {' '.join(f'{pace:.4f}' for pace in its)}")


@contextlib.contextmanager
def _started(kind: Callable[[Connection], None]) -> Iterator[Connection]:
    """A process of that kind that is ready to take turns, by its end of a pipe. Exits with a message where none is."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_apart, args=(kind, there))
    process.start()
    assert process.pid is not None
    group = process.pid
    there.close()
    try:
        try:
            here.recv()
        except EOFError:
            sys.exit(f"a process of kind {kind.__name__} has ended before its first turn; what it said stands above")
        yield here
    finally:
        here.close()  # by which it ends, and with it the one that it has forked from
        process.join(ENDING_S)
        if process.is_alive():  # it waits for its forks, so that all have ended where it has
            with contextlib.suppress(ProcessLookupError):  # not yet a group of its own
                os.killpg(group, signal.SIGKILL)
            process.kill()


def _apart(kind: Callable[[Connection], None], end: Connection) -> None:
    """Be a process of that kind, in a group of its own: a terminal's interrupt is for whoever closes the pipe."""
    os.setpgid(0, 0)
    kind(end)


def _round(ends: list[Connection]) -> list[float]:
    """One turn of each. Returns their seconds of CPU."""
    taken = [0.0] * len(ends)
    for at in random.sample(range(len(ends)), len(ends)):
        ends[at].send(None)
        taken[at] = ends[at].recv()
    return taken


def _middle(turns: list[float]) -> float:
    return math.exp(mean_log(turns))


def _pace(shares: list[float]) -> float:
    aside = int(SET_ASIDE * len(shares))
    return _middle(sorted(shares)[aside : len(shares) - aside])


def new(end: Connection) -> None:
    """Import as a cold server does, and take turns."""
    for name in MODULES:
        importlib.import_module(name)
    _take_turns(end)


def forked(end: Connection) -> None:
    """Import as a warm parent does, fork a server that forks an engine, which takes turns."""
    if problem := _warm_parent().Imported.of(MODULES, math.inf).problem:
        sys.exit(problem)
    _fork_twice(end)
    _take_turns(end)


def unswept(end: Connection) -> None:
    """The same of a parent that has imported with the garbage collector off."""
    gc.disable()
    for name in MODULES:
        importlib.import_module(name)
    gc.enable()
    gc.collect()
    gc.freeze()
    _fork_twice(end)
    _take_turns(end)


def _warm_parent() -> Any:
    """The script's module, which takes the place that it is imported from out of `sys.path` again."""
    sys.path.insert(0, str(SCRIPT.parent))
    return importlib.import_module(SCRIPT.stem)


def _fork_twice(end: Connection) -> None:
    """Return in a child's child only; the others end as it does."""
    for _ in ("server", "engine"):
        if child := os.fork():
            end.close()
            os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _take_turns(end: Connection) -> NoReturn:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with contextlib.suppress(EOFError, OSError):  # whoever started it has closed the pipe
        _in_room(end)
    os._exit(0)  # what vLLM's libraries say as they are taken down is of no interest


def _in_room(end: Connection) -> NoReturn:
    """Take turns, all frames of which lie in one piece of memory."""
    step = _work()
    for _ in range(5 * STEPS):
        step()
    gc.collect()
    gc.freeze()  # as vLLM does when it is ready
    end.send(None)
    while True:
        end.recv()
        begun = time.thread_time()
        for _ in range(STEPS):
            step()
        end.send(time.thread_time() - begun)


_in_room.__code__ = _in_room.__code__.replace(co_stacksize=2**17)  # a warm parent's `FRAME_ROOM`


def _work() -> Callable[[], None]:
    """Return a step of what an engine's loop is made of."""
    import numpy as np
    import torch
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    torch.set_num_threads(1)
    pool = BlockPool(num_gpu_blocks=2000, enable_caching=True, hash_block_size=16)
    encoder, decoder = MsgpackEncoder(), MsgpackDecoder(EngineCoreOutputs)
    tokens, table = torch.zeros(256, dtype=torch.int64), np.zeros((64, 256), dtype=np.int32)
    requests = {f"cmpl-{number:032x}": list(range(200)) for number in range(64)}

    def step() -> None:
        for _ in range(6):
            pool.free_blocks(pool.get_new_blocks(12))
        for name, answer in requests.items():
            requests[name] = list(range(200)) if len(answer) > 300 else answer
            requests[name].append(len(answer))
        outputs = [EngineCoreOutput(request_id=name, new_token_ids=requests[name][-1:]) for name in list(requests)[:8]]
        decoder.decode(encoder.encode(EngineCoreOutputs(outputs=outputs)))
        for row in range(20):
            table[row, :64] = (tokens[:64] + row).numpy()
            torch.from_numpy(table[row]).sum()

    return step


KINDS = (new, forked, unswept)


if __name__ == "__main__":
    main()
