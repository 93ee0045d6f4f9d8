"""What judging an answer takes a token, again and again, beside the pace of the core at that moment.

    python benchmarks/client/parsing.py [--seconds 40]

The same 1,500 answers of 64 tokens, made in the order in which reads of as many streams come, are judged and made rows
of, 100 at a time. Before each hundred a plain loop of Python runs for a few milliseconds: it tells a core at its full
pace from one that a virtual machine's neighbours slow down, which comes and goes. Prints CPU time: µs a token, and ns a
round of the loop.
"""

from __future__ import annotations

import argparse
import statistics
import time

from truth_server import DONE, LAST, TOKEN, USAGE, chunk

from workers.load.reads import Reads
from workers.load.sent import Sent, row_of
from workers.load.stream import Asked
from workers.load.wire import Answer

ANSWERS, AT_A_TIME, TOKENS = 1500, 100, 64
ROUNDS = 50_000
FULL = 1.15
"""What a round may take beside the shortest, where the core has its full pace: as full as it was in this run."""


def answers() -> list[Sent]:
    """Return what came back of as many requests of the truth server: a read a chunk, each in memory of its own."""
    asked = Asked(TOKENS, ignore_eos=True, prompt_tokens=16)
    made = [Sent(at, asked, Answer(0.0, status=200, reads=Reads(chunked=True))) for at in range(ANSWERS)]
    usage = chunk(USAGE % (16, 16 + TOKENS, TOKENS))
    for index, read in enumerate([*[TOKEN] * (TOKENS - 1), LAST, usage, DONE]):
        for at, each in enumerate(made):
            each.answer.reads.data.append(bytes(bytearray(read)))
            each.ended_s = 0.01 * index + 1e-5 * at
            each.answer.reads.at_s.append(each.ended_s)
    return made


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40)
    options = parser.parse_args()
    sent = answers()
    looks: list[tuple[float, float]] = []
    until_s = time.monotonic() + options.seconds
    while time.monotonic() < until_s:
        for start in range(0, ANSWERS, AT_A_TIME):
            looks.append((_loop_ns(), _judged_us(sent[start : start + AT_A_TIME])))
    rounds, judged = zip(*looks, strict=True)
    full_ns = FULL * min(rounds)
    at_full = [us for ns, us in looks if ns <= full_ns]
    print("| | p10 | median | p90 |\n|---|---:|---:|---:|")
    for name, values in (("judging, µs a token", judged), ("the loop, ns a round", rounds)):
        of = statistics.quantiles(values, n=10)
        print(f"| {name} | {of[0]:.2f} | {of[4]:.2f} | {of[8]:.2f} |")
    print(
        f"judging at full pace (up to {full_ns:.1f} ns, {len(at_full)} of {len(looks)} looks): "
        f"{statistics.median(at_full):.2f} µs a token"
    )


def _loop_ns() -> float:
    total, began_s = 0, time.thread_time()
    for number in range(ROUNDS):
        total += number * number
    return (time.thread_time() - began_s) / ROUNDS * 1e9


def _judged_us(sent: list[Sent]) -> float:
    began_s = time.thread_time()
    rows = [row_of(each, 60.0, 0.0) for each in sent]
    took_s = time.thread_time() - began_s
    assert all(row.ok for row in rows), rows[0]
    return took_s / len(rows) / TOKENS * 1e6


if __name__ == "__main__":
    main()
