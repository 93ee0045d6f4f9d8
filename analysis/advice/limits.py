"""What limits each level, as a section of batching_benchmark.md: the signs, the verdict, and its evidence in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from analysis.load.knee import KneeVerdict
from analysis.load.knee_sentences import (
    doubling_gain,
    knee_range,
    knee_tells,
    levels_tell,
    of_those_tested,
    repeats_tell,
)
from analysis.load.ladder import highest, kv_usage, predicted
from analysis.load.load_curve import LoadCurve
from analysis.load.load_tables import workload
from analysis.load.signs import by_company, signs
from analysis.load.strangers import TELLS, resting_on
from analysis.load.token_cost import median_of, power_share
from analysis.load.verdicts import NEAR_FULL, Limit, Signs, limit
from analysis.memory.kv_pages import Configs, pages_of
from analysis.memory.kv_room import kv_room
from analysis.numbers.intervals import mean_log
from analysis.rows.caveats import identity
from analysis.rows.disturbances import clock_notes, foreign_process_notes, with_others
from analysis.rows.series import Reading, concurrency_figure
from analysis.writing.document import Document, Part, Phrase, join, phrase
from analysis.writing.figures import Figure, count, decimal, percent, plain, signed_percent
from contract.failures import FailureClass as F
from contract.rows import CLIENT_LIMITED

COLUMNS = ("concurrency", "verdict", "running_max", "waiting", "kv_usage_max", "preemptions", "notes")


def add_limits(doc: Document, curves: Sequence[LoadCurve], configs: Configs) -> None:
    """Write the section: a table and the run's verdict for every curve."""
    doc.heading(2, "What limits each level")
    if not curves:
        doc.say(
            "Not known from this run: it holds neither a sweep of levels nor near-full contexts; `+sweep=capacity` "
            "measures both."
        )
        return
    doc.say(
        "*KV-bound*: preemptions, or requests waiting for capacity while the KV pool is full ({full} of its blocks, or "
        "less free than one more request needs), so that never all that may (max_num_seqs) ran at once: those that "
        "wait for a step and then run lacked no KV. *queue-bound*: more were in flight than max_num_seqs, as many as "
        "that ran, and others waited. "
        "*client-bound*: the load client was the limit, so the level is no measurement. *neighbour-bound*: repeats "
        "beside another session on the host are slower than repeats alone, beyond noise. *compute-bound*: none of "
        "these, and tok_s is at its knee or past it, or at that of the levels tested where a higher one may give more "
        "(the verdict then says so); the rows do not tell computing, memory bandwidth and the server's front end "
        "apart. What held a card's clock down at any sample, and the share of its power limit that it drew, stand "
        "beside that verdict. *not saturated*: none of these, and more load gives more. The signs are the highest "
        "sampled over the repeats; waiting counts those that wait for capacity where the metrics say why, else all.",
        full=percent("rule.kv_near_full_pct", NEAR_FULL, 0),
    )
    for curve in curves:
        doc.heading(3, "{who}", who=identity(curve.series.sample, curve.name, curve.series.group.label))
        doc.say("Load: {load}.", load=workload(curve))
        rows = [_row(curve, reading, seen) for reading, seen in signs_of(curve, configs)]
        doc.table(COLUMNS, rows, curve.series.sample.simulated)
        said = [verdict_on_the_run(curve, configs), _prediction(curve, configs), *_neighbours(curve)]
        doc.bullets([*said, *resting_on(curve.levels)])


def signs_of(curve: LoadCurve, configs: Configs) -> list[tuple[Reading, Signs]]:
    """Return what was seen at every level, what a request needs of the pool by the page function where it is known."""
    pages, tokens = pages_of(curve.series.sample, configs), curve.request_tokens
    rooms = [(reading, kv_room(reading, tokens, reading.at, pages)) for reading in curve.series.readings]
    return [(reading, signs(curve, reading, room.request_share if room else None)) for reading, room in rooms]


def _row(curve: LoadCurve, reading: Reading, seen: Signs) -> list[str | Part]:
    return [
        concurrency_figure(reading),
        str(limit(seen)),
        highest(reading, "running_max"),
        _waiting(reading),
        kv_usage(reading),
        highest(reading, "preemptions"),
        join(part for part in (_evidence(curve, reading, seen), *foreign_process_notes(reading)) if part.text),
    ]


def _waiting(reading: Reading) -> Figure:
    """For capacity where the server's metrics tell why, else all that waited."""
    known = reading.highest("waiting_capacity_max") is not None
    return highest(reading, "waiting_capacity_max" if known else "waiting_max")


def _evidence(curve: LoadCurve, reading: Reading, seen: Signs) -> Phrase:
    """What the verdict on a level rests on, in words."""
    verdict = limit(seen)
    if verdict is Limit.KV:
        return _kv_evidence(reading, seen)
    if verdict is Limit.QUEUE:
        most = plain(f"{curve.name}.max_num_seqs", seen.max_num_seqs or 0)
        return phrase("max_num_seqs is {most}, and up to {n} waited", most=most, n=_waiting(reading))
    if verdict is Limit.CLIENT:
        return phrase("the load client was the limit, " + _client(reading).why)
    if verdict is Limit.NEIGHBOUR:
        return _neighbour_evidence(reading)
    if verdict is Limit.COMPUTE:
        knee = "the knee of the levels tested" if curve.knee.may_rise else "the knee"
        words = f"at {knee} or past it; no preemption, no wait for KV, no full queue"
        return join([phrase(words), *_clock_and_power(reading)])
    if verdict is Limit.NOTHING:
        return phrase("a higher level gives more" if curve.following(reading) else "no knee up to here")
    if verdict is Limit.UNKNOWN:
        return join([*map(phrase, [_unknown(curve, reading, seen).why, *_ruled_out(seen)]), *_clock_and_power(reading)])
    return phrase("")


@dataclass(frozen=True, slots=True)
class Unknown:
    """Why there is no verdict, and what would tell."""

    why: str
    tells: str


CLIENT: dict[str, Unknown] = {
    F.CLIENT_CORES_FEW: Unknown(
        "and the host had no cores for more of it", "a host with more free cores (or CPU quota) tells"
    ),
    F.CLIENT_STREAMS_FEW: Unknown(
        "with a process for every few of its streams", "the same sweep with nothing else busy on the host may tell"
    ),
    F.CLIENT_SOCKETS: Unknown(
        "and its host had no files or ports left for connections", "a host with more of what its message names tells"
    ),
    F.CLIENT_PROCESSES_FIXED: Unknown(
        "with as many processes as `load.processes` names", "the same sweep with `load.processes=auto` tells"
    ),
    F.CLIENT_PROCESSES_FEW: Unknown(
        "and the host had cores for more processes", "`resume=RUN`, which tries again, may tell"
    ),
}
"""Why a level stayed without a measurement, by its failure class."""
NOT_SAID = Unknown("and whether the host had more for it is not known", "the same sweep again tells whether it had")
"""Of rows of before these classes, and of a later version."""


def _client(reading: Reading) -> Unknown:
    found = [point.failure_class for point in reading.unmeasured if point.status == CLIENT_LIMITED]
    return CLIENT.get(found[0] or "", NOT_SAID)


def _ruled_out(seen: Signs) -> list[str]:
    """What the signs of a level say that it is not, though there is no verdict."""
    not_kv = seen.preemptions == 0 and seen.waited_for_kv is False
    all_ran = seen.running is not None and seen.running >= seen.concurrency
    all_seated = seen.max_num_seqs is not None and seen.max_num_seqs >= seen.concurrency
    return [*(["not KV"] if not_kv else []), *(["not the queue"] if all_ran or all_seated else [])]


def _clock_and_power(reading: Reading) -> list[Part]:
    """What held the clock of a card down, and how near to their power limit the cards were; needs real ones."""
    if any(point.simulated for point in reading.measured):
        return []
    share = percent(f"{reading.name}.power_share_pct", median_of(reading, power_share))
    drawn = [] if share.value is None else [phrase("{share} of the power limit drawn", share=share)]
    return [*clock_notes(reading), *drawn]


def _neighbour_evidence(reading: Reading) -> Phrase:
    alone, beside = by_company(reading)
    share = math.expm1(mean_log(beside) - mean_log(alone))
    return phrase(
        "tok_s {share} beside another session on the host against alone, beyond noise",
        share=signed_percent(f"{reading.name}.neighbour_pct", share),
    )


def _kv_evidence(reading: Reading, seen: Signs) -> Phrase:
    parts: list[Part] = []
    if seen.preemptions:
        parts.append(phrase("{n} preemptions", n=highest(reading, "preemptions")))
    if seen.waited_for_kv:
        parts.append(
            phrase(
                "at most {running} ran at once, up to {n} waited, and up to {share} of the pool was in use",
                running=highest(reading, "running_max"),
                n=_waiting(reading),
                share=kv_usage(reading),
            )
        )
    return join(parts)


def _unknown(curve: LoadCurve, reading: Reading, seen: Signs) -> Unknown:
    if seen.flat is None and with_others(reading.measured):
        return Unknown("what others on the card took from it is not known", TELLS)
    if seen.flat is None and curve.beside_others:
        return Unknown("others were on the card at a level that it is held against", TELLS)
    if curve.tok_s_noise is None:
        return Unknown("no repeats, so whether tok_s is flat is not known", repeats_tell(curve))
    if curve.knee.doubling is None:
        return Unknown("the levels do not span one doubling, so whether tok_s is flat is not known", levels_tell(curve))
    if seen.flat is None:
        return Unknown("within noise of the knee", knee_tells(curve))
    if seen.preemptions is None or seen.waited_for_kv is None:
        return Unknown("tok_s is flat, and the server's metrics do not say why", "a server with these metrics tells")
    why = "requests were held back and max_num_seqs was left to vLLM: the queue or the computing"
    return Unknown(why, "the same sweep with `server.max_num_seqs` set tells")


def verdict_on_the_run(curve: LoadCurve, configs: Configs) -> Phrase:
    """The verdict on the highest level that has one, and from which level on it holds."""
    tried = _tried(curve, configs)
    if not tried:
        return phrase("What limits this server under this load is not known from this run: no level was measured.")
    verdict = _verdict_on(curve, tried)
    if tried[-1][0] is curve.series.readings[-1]:
        return verdict
    return phrase("{verdict} Higher levels were tried and not measured.", verdict=verdict)


def limit_in_short(curve: LoadCurve, configs: Configs) -> Phrase:
    """The same in a few words, without the reasons."""
    tried = _tried(curve, configs)
    verdict = limit(tried[-1][1]) if tried else Limit.UNKNOWN
    if verdict is Limit.UNKNOWN:
        return phrase("not known from this run")
    beyond = "" if tried[-1][0] is curve.series.readings[-1] else ", higher levels not measured"
    if verdict is Limit.NOTHING:
        return phrase("not saturated up to concurrency {top}" + beyond, top=concurrency_figure(tried[-1][0]))
    tested = ", of the levels tested" if verdict is Limit.COMPUTE and curve.knee.may_rise else ""
    words = str(verdict) + " from concurrency {where} on" + tested + beyond
    return phrase(words, where=concurrency_figure(_since(tried)))


def _tried(curve: LoadCurve, configs: Configs) -> list[tuple[Reading, Signs]]:
    """The levels that have a verdict, if only that it is not known."""
    every = signs_of(curve, configs)
    return [(reading, seen) for reading, seen in every if limit(seen) is not Limit.NOT_MEASURED]


def _since(tried: Sequence[tuple[Reading, Signs]]) -> Reading:
    """The lowest level from which on the verdict is that on the highest."""
    last = limit(tried[-1][1])
    alike = takewhile(lambda level: limit(level[1]) is last, reversed(tried))
    return [reading for reading, _ in alike][-1]


def _verdict_on(curve: LoadCurve, tried: Sequence[tuple[Reading, Signs]]) -> Phrase:
    highest_level, last = tried[-1][0], limit(tried[-1][1])
    if last is Limit.UNKNOWN:
        unknown = _unknown(curve, *tried[-1])
        why = "What limits this server under this load is not known from this run (" + unknown.why + "); "
        reading, seen = tried[-1]
        stands = [*_last_doubling(curve), *map(phrase, _ruled_out(seen)), *_clock_and_power(reading)]
        if not stands:
            return phrase(why + unknown.tells + ".")
        return phrase(
            why + unknown.tells + ". As it stands, at concurrency {top}: {stands}.",
            top=concurrency_figure(highest_level),
            stands=join(stands, ", "),
        )
    where = concurrency_figure(_since(tried))
    if last is Limit.NOTHING:
        return phrase(
            "This server is not saturated by this load up to concurrency {top}; " + levels_tell(curve) + " what will "
            "limit it.",
            top=concurrency_figure(highest_level),
        )
    if last is Limit.CLIENT:
        return phrase(
            "From concurrency {where} on the load client was the limit: what limits the server there is not "
            "known from this run; " + _client(tried[-1][0]).tells + ".",
            where=where,
        )
    tested = of_those_tested(curve) if last is Limit.COMPUTE else ""
    words = "This server is **" + str(last) + "** under this load from concurrency {where} on" + tested + "."
    verdict = phrase(words, where=where)
    beside = _clock_and_power(highest_level) if last is Limit.COMPUTE else []
    if not beside:
        return verdict
    top = concurrency_figure(highest_level)
    return phrase("{verdict} At concurrency {top}: {beside}.", verdict=verdict, top=top, beside=join(beside, ", "))


def _last_doubling(curve: LoadCurve) -> list[Part]:
    if curve.knee.doubling is None or curve.tok_s_noise is not None:
        return []
    return [phrase("the last doubling changed tok_s by {gain}", gain=doubling_gain(curve))]


def _prediction(curve: LoadCurve, configs: Configs) -> Phrase:
    """The KV concurrency that the engine predicts, beside the knee that was measured."""
    capacity, sample = predicted(curve), curve.series.sample
    if capacity is None:
        return phrase("The engine's KV concurrency is not known, so there is nothing to hold the knee against.")
    parts: dict[str, Part] = {
        "said": decimal(f"{curve.name}.predicted_kv_concurrency", capacity, 2),
        "length": plain(f"{curve.name}.max_model_len", sample.max_model_len),
    }
    said = "Predicted KV concurrency: {said} sequences of {length} tokens by the engine's count; "
    room = kv_room(curve.series.measured[0], curve.request_tokens, 1, pages_of(sample, configs))
    if room is None:
        said += "how many requests of this load are held at once is not known"
    else:
        said += "at least {requests} requests of this load held at once (arithmetic)"
        parts["requests"] = count(f"{curve.name}.predicted_requests", room.holds)
    if curve.knee.verdict is KneeVerdict.KNEE:
        said += "; measured knee: {knee}" + of_those_tested(curve) + "."
        return phrase(said, knee=knee_range(curve), **parts)
    none = curve.knee.verdict is KneeVerdict.NO_KNEE_YET
    return phrase(said + "; measured knee: " + ("none yet." if none else "not known from this run."), **parts)


def _neighbours(curve: LoadCurve) -> list[Phrase]:
    """Needs a level all of whose repeats ran beside another session."""
    if not any(beside and not alone for alone, beside in map(by_company, curve.levels)):
        return []
    return [
        phrase(
            "Other sessions ran on the host at levels of which no repeat ran alone: what they cost there is not known "
            "from this run."
        )
    ]
