"""What was odd about a level's requests, its window and the client that sent them: notes of the tables of levels."""

from __future__ import annotations

import math

from analysis.load.anchors import drift_notes
from analysis.load.load_curve import NEAR_TARGET
from analysis.rows.series import Reading
from analysis.writing.document import Part, phrase
from analysis.writing.figures import Figure, count, decimal, percent, signed_percent, significant
from contract.lateness import LAG, NAMED_FROM_S, OWN_RAISED, RAISED, SLIP, named_s
from contract.rows import JUDGED_FROM_S

CLIENT_WAIT_SHARE = 0.05
"""From this share of the window on, a load client that waited for a core is named: it measured its host, too."""
P95_NEEDS = 21
"""With fewer values a p95 lies between the two highest: it says little of the tail."""
P99_NEEDS = 101
"""The same of a p99."""
PROMPTS_OFF = 0.05
"""A chat whose prompts are off the asked length by more than this share is named."""
SCRAPES_PER_S = 2.0
"""What is promised. With fewer, a level's highest samples may miss more than they are said to."""


def request_notes(reading: Reading) -> list[Part]:
    """Return the notes on a level, first those on its requests, then those on its client and on how it was watched."""
    return [
        *_outcomes(reading),
        *_prompts(reading),
        *_server(reading),
        *_window(reading),
        *drift_notes(reading),
        *_client(reading),
    ]


def few_for_p95(reading: Reading, column: str) -> list[Part]:
    """Return the note on a p95 that `column` (a count of requests) is too few for."""
    fewest = min(reading.values(column), default=None)
    if fewest is None or fewest >= P95_NEEDS:
        return []
    return [
        phrase("p95 of only {n} requests: between the two highest", n=count(f"{reading.name}.{column}_fewest", fewest))
    ]


def few_for_p99(reading: Reading) -> bool:
    """Return whether a repeat had too few successes for a p99."""
    return min(reading.values("completed"), default=P99_NEEDS) < P99_NEEDS


def _outcomes(reading: Reading) -> list[Part]:
    notes = few_for_p95(reading, "completed")
    failed, asked = sum(reading.values("failed")), sum(reading.values("num_requests"))
    if failed:
        notes.append(
            phrase(
                "{failed} of {asked} requests failed",
                failed=count(f"{reading.name}.failed_requests", failed),
                asked=count(f"{reading.name}.requests", asked),
            )
        )
    return notes


def _prompts(reading: Reading) -> list[Part]:
    notes: list[Part] = []
    name, mean = reading.name, reading.median("mean_prompt_tokens")
    chats = [point for point in reading.measured if point.api == "chat"]
    if chats and mean is not None and chats[0].prompt_tokens:
        shown = reading.figure(significant, "mean_prompt_tokens")
        off = mean / chats[0].prompt_tokens - 1
        notes.append(phrase("{n} tokens a prompt by usage", n=shown))
        if abs(off) > PROMPTS_OFF:
            share = signed_percent(f"{name}.prompt_tokens_off_pct", off)
            notes.append(phrase("prompts are {share} off the asked length", share=share))
    if any(point.text_cost_assumed for point in chats):
        notes.append(phrase("the server does not say what text costs: a word was taken for a token"))
    if any(point.prefix_reset is False and point.prefix_hit_ratio is None for point in reading.measured):
        notes.append(phrase("the server did not confirm that its prefix cache was empty before the level"))
    hits, shared = reading.highest("prefix_hit_ratio"), reading.highest("prefix_shared_ratio")
    if hits or shared:
        share = percent(f"{name}.prefix_hit_pct", hits, 2)
        notes.append(
            phrase(
                "prefix-cache hits up to {share} (shared on purpose: {shared})",
                share=share, shared=percent(f"{name}.prefix_shared_pct", shared, 2),
            )
            if shared
            else phrase("prefix-cache hits up to {share}", share=share)
        )  # fmt: skip
    return notes


def _server(reading: Reading) -> list[Part]:
    notes: list[Part] = []
    connecting = reading.highest("p99_connect_s")
    if connecting is not None and connecting > NAMED_FROM_S:
        n = _ms(reading, "connect_p99", connecting)
        notes.append(phrase("requests waited up to {n} ms for their connections (p99), which is in no latency", n=n))
    apart = max(reading.values("token_count_difference"), key=abs, default=0)
    if apart:
        n = count(f"{reading.name}.token_count_difference", abs(apart))
        side = "above" if apart > 0 else "below"
        notes.append(phrase("the server's count of tokens is {n} " + side + " the client's", n=n))
    preemptions = reading.highest("preemptions")
    if preemptions:
        notes.append(phrase("{n} preemptions", n=count(f"{reading.name}.preemptions_highest", preemptions)))
    rate = _too_few_scrapes(reading)
    if rate is not None:
        shown = decimal(f"{reading.name}.server_hz_lowest", rate, 1)
        notes.append(phrase("the server's metrics were answered only {n} times a second", n=shown))
    return notes


def _too_few_scrapes(reading: Reading) -> float | None:
    """Return the lowest rate of windows with fewer scrapes than the promised rate allows, wherever they begin in it."""
    rates = (
        p.server_hz
        for p in reading.measured
        if p.server_hz is not None
        and p.duration_s is not None
        and round(p.server_hz * p.duration_s) < math.floor(p.duration_s * SCRAPES_PER_S)
    )
    return min(rates, default=None)


def _window(reading: Reading) -> list[Part]:
    notes: list[Part] = []
    name, achieved = reading.name, reading.median("achieved_concurrency")
    closed = [point for point in reading.measured if point.arrivals is None]
    if closed and achieved is not None and achieved < NEAR_TARGET * reading.at:
        notes.append(phrase("{n} in flight on average", n=reading.figure(significant, "achieved_concurrency")))
    unsettled = [len(point.warmup_tok_s) for point in reading.measured if point.warmup_stable is False]
    if unsettled:
        rounds = count(f"{name}.warmup_rounds", max(unsettled))
        notes.append(phrase("the warm-up's throughput had not settled after {n} rounds", n=rounds))
    ran_out = [p for p in reading.measured if p.asked_s and p.duration_s and p.stopped_by == "requests"]
    if ran_out:
        first = min(ran_out, key=lambda point: point.duration_s or 0.0)
        notes.append(
            phrase(
                "ran out of requests after {n} of {asked} s",
                n=significant(f"{name}.ran_out_after_s", first.duration_s),
                asked=significant(f"{name}.asked_s", first.asked_s),
            )
        )
    shortest = min((p.duration_s for p in reading.measured if p.duration_s and not p.simulated), default=None)
    if shortest is not None and shortest < JUDGED_FROM_S:
        notes.append(
            phrase(
                "{n} s are too short to tell whether the load client was the limit",
                n=significant(f"{name}.shortest_s", shortest),
            )
        )
    return notes


def _client(reading: Reading) -> list[Part]:
    notes: list[Part] = []
    if any(point.limited_before for point in reading.measured):
        notes.append(phrase("measured again with more load processes: fewer had been the limit"))
    waited = reading.highest("client_wait_share")
    if waited is not None and waited > CLIENT_WAIT_SHARE:
        notes.append(
            phrase(
                "the load client had to wait for a core {share} of the time: latencies may be too high by as much",
                share=percent(f"{reading.name}.client_wait_pct", waited, 0),
            )
        )
    tokens = reading.median("mean_completion_tokens") or reading.median("output_tokens")
    for column, worst in named_s(reading.measured, RAISED, tokens).items():
        notes.append(phrase(RAISED[column], n=_ms(reading, column.removesuffix("_s"), worst)))
    clients = [client for point in reading.measured for client in point.clients]
    before = [client for point in reading.measured if point.gap_p99_raised_s is None for client in point.clients]
    own = named_s(before, OWN_RAISED, tokens) | named_s(clients, SLIP, tokens)
    for column, worst in own.items():
        words = {**OWN_RAISED, **SLIP}[column]
        notes.append(phrase(words, n=_ms(reading, f"client_{column.removesuffix('_s')}", worst)))
    lag = reading.highest("client_lag_s")
    if lag is not None and lag > NAMED_FROM_S:
        notes.append(phrase(LAG["lag_p99_s"], n=_ms(reading, "client_lag", lag)))
    return notes


def _ms(reading: Reading, name: str, seconds: float) -> Figure:
    return significant(f"{reading.name}.{name}_ms", 1000 * seconds)
