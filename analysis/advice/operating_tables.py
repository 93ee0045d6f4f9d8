"""The tables of operating_point.md: the figures of what was chosen, and all levels against the objectives."""

from __future__ import annotations

from analysis.advice.operating_point import (
    Candidate,
    Choice,
    OperatingPoint,
)
from analysis.advice.under_use import joules_figure
from analysis.load.checks import of_one_token
from analysis.load.ladder import kv_usage
from analysis.load.load_curve import LoadCurve
from analysis.load.load_tables import NO_REQUESTS, SIZE, cell, confidence, interval_words, label_figure, size_cells
from analysis.load.rates import level_figure
from analysis.load.strangers import disturbed
from analysis.memory.kv_room import KvRoom
from analysis.rows.series import Reading
from analysis.writing.document import Part, Phrase, phrase
from analysis.writing.figures import Figure, count, gib, plain, significant


def figure_rows(choice: Choice, point: OperatingPoint, gpu_hour: float | None) -> list[list[str | Part]]:
    """Return the operating point's figures as rows of what, value, notes."""
    curve, reading = point.curve, point.reading
    rows: list[list[str | Part]] = [
        [column, cell(reading, column, 4), _interval(curve, reading, column)]
        for column in dict.fromkeys(("tok_s", "p95_e2e_s", *choice.slo.percentiles()))
    ]
    return [*rows, *_goodput_row(choice, point), *_room_rows(point), _energy_row(point), *_price_rows(point, gpu_hour)]


def _goodput_row(choice: Choice, point: OperatingPoint) -> list[list[str | Part]]:
    """Needs an objective: without one there is no good request."""
    if not choice.slo.percentiles():
        return []
    if point.goodput_qps is None:
        return [["goodput_qps", "not known from this run", NO_REQUESTS]]
    words = "requests a second that themselves met every objective"
    return [["goodput_qps", cell(point.reading, "goodput_qps", 4), words]]


def _interval(curve: LoadCurve, reading: Reading, column: str) -> Phrase:
    if column == "p95_tpot_s" and of_one_token(reading):
        return phrase("answers of one token have no TPOT to miss")
    if curve.interval(reading, column) is None:
        return phrase("no interval: one repeat")
    interval = interval_words(curve, reading, column)
    return phrase("mean {interval} at {confidence}", interval=interval, confidence=confidence())


def _room_rows(point: OperatingPoint) -> list[list[str | Part]]:
    room, name = point.room, point.reading.name
    if room is None:
        return [["KV pool left", "not known from this run", "the engine gave no pool size, or there is no formula"]]
    mean = " of mean length" if point.curve.series.sample.prompt_lengths else ""
    requests = " request" if room.requests == 1 else " requests"
    held = phrase(
        "at least: {pool} GiB less {held} for {n}" + requests + mean + ", at full length (engine, formula)",
        pool=gib(f"{name}.room_pool_gib", room.pool_bytes),
        held=gib(f"{name}.room_held_gib", room.held_bytes),
        n=count(f"{name}.room_requests", room.requests),
    )
    seen = kv_usage(point.reading)
    if seen.value is not None:
        held = phrase("{held}; seen in use at most: {seen}", held=held, seen=seen)
    further = count(f"{name}.room_further", room.further_requests)
    return [
        ["KV pool left, GiB", gib(f"{name}.room_free_gib", room.free_bytes), held],
        ["KV pool left, in requests of this load", further, _would_run(point, room)],
    ]


def _would_run(point: OperatingPoint, room: KvRoom) -> Phrase:
    """What the pool's room for further requests says of how many more would run."""
    if room.further_requests < 0:
        return phrase("below zero: they do not all fit")
    alone, seats = "at least, by the pool alone, whatever their latency; ", point.curve.series.sample.max_num_seqs
    if seats is None:
        return phrase(alone + "max_num_seqs was left to vLLM, so how many of them would run is not known")
    more = min(max(0, seats - room.requests), room.further_requests)
    return phrase(
        alone + "of them {more} would run beside these (max_num_seqs {seats})",
        seats=plain(f"{point.reading.name}.max_num_seqs", seats),
        more=count(f"{point.reading.name}.room_would_run", more),
    )


def _energy_row(point: OperatingPoint) -> list[str | Part]:
    simulated = point.reading.measured[0].simulated
    if point.joules_per_output_token is None or simulated:
        why = "simulated: no card was there" if simulated else "no card's energy counter was read"
        return ["J per output token", "not known from this run", why]
    return ["J per output token", joules_figure(point.reading), "all cards over the window, prompts included"]


def _price_rows(point: OperatingPoint, gpu_hour: float | None) -> list[list[str | Part]]:
    what = "price of a million output tokens"
    if point.price is None or gpu_hour is None:
        why = "`cost.gpu_hour` is not given" if gpu_hour is None else "no GPU was used"
        return [[what, "not known from this run", why]]
    reading = point.reading
    gpus = reading.measured[0].gpus
    note = phrase(
        "at cost.gpu_hour {hour}, {gpus} GPU" + ("s" if gpus > 1 else "") + ", always as busy as here",
        hour=Figure("cost.gpu_hour", gpu_hour, f"{gpu_hour:g}"),
        gpus=count(f"{reading.name}.gpus", gpus),
    )
    return [
        [what, significant(f"{reading.name}.price_output", point.price.output), note],
        ["price of a million tokens", significant(f"{reading.name}.price_total", point.price.total),
         "prompts and answers alike"],
    ]  # fmt: skip


def level_rows(choice: Choice) -> tuple[list[str], list[list[str | Part]]]:
    """Return columns and rows of all levels against the objectives; none where there is no objective, or nothing was
    chosen and all stand alike."""
    limits = choice.slo.percentiles()
    if not limits or (choice.point is None and len({verdict(c) for c in choice.candidates}) == 1):
        return [], []
    axis = "request_rate" if choice.open_loop else "concurrency"
    servers = len({curve.label for curve in choice.curves}) > 1
    columns = ["purpose", *(["model"] if servers else []), axis, *SIZE, "tok_s"]
    columns += [column for limit_ in limits for column in (limit_, "interval")] + ["verdict"]
    return columns, [_level_row(candidate, servers) for candidate in choice.candidates]


def _level_row(candidate: Candidate, servers: bool) -> list[str | Part]:
    curve, reading = candidate.curve, candidate.reading
    row: list[str | Part] = [curve.series.sample.purpose]
    if servers:
        row.append(label_figure(curve))
    row += [level_figure(reading), *size_cells(reading), cell(reading, "tok_s", 4)]
    for check in candidate.checks:
        row += [cell(reading, check.column, 4), interval_words(curve, reading, check.column)]
    beside = ", with others on the card" if disturbed([reading]) else ""
    return [*row, verdict(candidate) + beside]


def verdict(candidate: Candidate) -> str:
    """Return how a level stands to all objectives, in words."""
    if candidate.keeps_up is False:
        return "misses: does not keep up"
    if candidate.contradicted:
        return "undecided: missed under another purpose"
    if candidate.met_as_measured:
        return "undecided: met by its one repeat"
    if candidate.missed_as_measured:
        return "undecided: missed by its one repeat"
    return "meets, by a thin margin" if candidate.thin else str(candidate.standing)
