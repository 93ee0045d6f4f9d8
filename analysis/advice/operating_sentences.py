"""A choice in words: the answer, what stands around it, and its figures as rows. Parts of operating_point.md.

Every sentence has a condition on the data. Where none is met, the line says what is not known and what would tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from analysis.advice.kv_headroom import for_latency, for_throughput
from analysis.advice.operating_point import (
    Basis,
    Candidate,
    Choice,
    OperatingPoint,
    latency_level,
    throughput_level,
)
from analysis.load.checks import BETWEEN_STARTS, Standing
from analysis.load.knee import KneeVerdict
from analysis.load.knee_sentences import (
    NO_REPEATS,
    change_words,
    knee_range,
    knee_tells,
    levels_tell,
    may_lie_higher,
    repeats_tell,
)
from analysis.load.load_curve import LoadCurve
from analysis.load.load_tables import cell, label_figure, requests_sent, server, unmeasured_notes
from analysis.load.rates import level_figure, level_words
from analysis.load.request_notes import request_notes
from analysis.load.signs import signs
from analysis.load.strangers import resting_on
from analysis.load.verdicts import Limit, limit
from analysis.rows.disturbances import clock_notes, foreign_process_notes
from analysis.rows.series import Reading
from analysis.rows.targets import Targets
from analysis.writing.document import Part, Phrase, join, phrase
from analysis.writing.figures import Figure, count, percent, plain

ABOVE_P95 = 0.05
"""Share of requests that lie above a p95."""
PRESSED = (Limit.KV, Limit.QUEUE, Limit.NEIGHBOUR)
"""Verdicts that a reader must know of a level before running it."""


def answer(choice: Choice) -> Phrase:
    """Return the operating point of a choice, or why this run does not know it."""
    if choice.point is None:
        return _unknown(choice)
    point = choice.point
    given: dict[str, Part] = {
        "level": level_words(point.reading, first=choice.basis is not Basis.AS_MEASURED),
        "gives": gives(point.reading),
    }
    if choice.basis is Basis.OBJECTIVES:
        what = "rate" if choice.open_loop else "tok/s"
        return phrase(
            "**{level}**: {gives}, the highest " + what + " of the levels that meet every objective with the noise of "
            "their repeats counted. Server: {server}.",
            server=server(point.curve),
            **given,
        )
    if choice.basis is Basis.AS_MEASURED:
        return phrase(
            "Not known from this run beyond noise: " + NO_REPEATS + "; " + repeats_tell(point.curve, "slo") + ". As it "
            "stands, {level} has the highest tok/s within the objectives: {gives}. Server: {server}.",
            server=server(point.curve),
            **given,
        )
    return phrase(
        "**{level}** is, of the levels tested, the lowest that could be the knee: {gives}. {above}{higher}Server: "
        "{server}.",
        above=_above(point),
        higher=join((phrase("{one} ", one=one) for one in may_lie_higher(point.curve)), ""),
        server=server(point.curve),
        **given,
    )


def _above(point: OperatingPoint) -> Phrase:
    """What the highest level has over the chosen one; nothing where that is the highest."""
    curve, last = point.curve, point.curve.levels[-1]
    change = curve.change(point.reading, last, "tok_s")
    if last is point.reading or change is None:
        return phrase("")
    return phrase(
        "From it to {last}, the highest measured, tok/s changes by {change}. ",
        last=level_words(last),
        change=change_words(point.reading, last, "tok_s", change),
    )


def objectives(limits: dict[str, float]) -> Phrase:
    """Return the objectives in words: `p95_e2e_s at most N s, …`."""
    each = (phrase(name + " at most {limit} s", limit=objective_figure(name, limit)) for name, limit in limits.items())
    return join(each, ", ")


def thin_margin() -> Figure:
    """Return below which share of an objective a margin is called thin."""
    return percent("rule.between_starts_pct", BETWEEN_STARTS, 0)


def objective_figure(column: str, limit: float) -> Figure:
    """Return an objective as a figure, in seconds as it was given."""
    return Figure(f"slo.{column}", limit, f"{limit:g}")


def gives(reading: Reading) -> Phrase:
    """Return what a level gives: `N tok/s at p95 N s`."""
    return phrase("{tok_s} tok/s at p95 {p95} s", tok_s=cell(reading, "tok_s", 4), p95=cell(reading, "p95_e2e_s", 4))


def _unknown(choice: Choice) -> Phrase:
    if not any(candidate.measured for candidate in choice.candidates):
        return phrase("Not known from this run: no level of this load was measured; `resume=RUN` tries them again.")
    if not choice.slo.percentiles():
        return _without_objective(choice)
    undecided = choice.having(Standing.UNDECIDED)
    if undecided:
        seen = " (by single repeats none meets them)" if all(c.missed_as_measured for c in undecided) else ""
        short = all(c.keeps_up is None for c in undecided)
        tells = (
            "a longer one (`sweep.seconds`) tells whether the server keeps up"
            if short
            else repeats_tell(undecided[0].curve, "slo")
        )
        return phrase(
            "Not known from this run: no level meets every objective beyond noise, and {levels} undecided"
            + seen
            + "; "
            + tells
            + ".",
            levels=_listed(choice, undecided),
        )
    lowest = min(choice.having(Standing.MISSES), key=lambda c: c.reading.at)
    alone = not choice.open_loop and lowest.reading.at == 1
    tells = "less at once cannot be asked of it" if alone else levels_tell(lowest.curve, "lower", "slo")
    return phrase(
        "**None**: no measured level meets every objective. The lowest, {level}, misses {missed}; " + tells + ".",
        level=_named(choice, lowest, level_words(lowest.reading)),
        missed=_missed(lowest),
    )


def _named(choice: Choice, candidate: Candidate, level: Part) -> Part:
    """A level in words, with whose it is where several servers were sent the load."""
    if len(choice.servers) == 1:
        return level
    return phrase("{level} of {label}", level=level, label=label_figure(candidate.curve))


def _missed(candidate: Candidate) -> Phrase:
    """Return what a level misses, with its values."""
    missed: list[Part] = [
        phrase(check.column + " with {value} s", value=cell(candidate.reading, check.column, 4))
        for check in candidate.checks
        if check.standing is Standing.MISSES
    ]
    if candidate.keeps_up is False:
        missed.append(phrase("the rate itself: the server does not keep up"))
    return join(missed, ", ")


def _without_objective(choice: Choice) -> Phrase:
    if choice.open_loop:
        return phrase(
            "Without an objective an open loop has no operating point: which latency is too much is not for the rows "
            "to say. Up to which rate the server keeps up stands in rate_sweep.md; `+sweep=slo` with an objective "
            "finds the highest rate that holds it."
        )
    servers = choice.servers
    if len(servers) == 1:
        return phrase("Not known from this run: {found}.", found=_knee_found(choice, servers[0]))
    if any(curve.knee.could_be for curve in servers):
        why = "a server whose throughput is not known to stop scaling gives more tok/s than any at its knee"
    else:
        why = "of no server it is known where throughput stops scaling"
    each = (phrase("{label}: {found}.", label=label_figure(c), found=_knee_found(choice, c)) for c in servers)
    return phrase("Not known from this run: " + why + ". {each}", each=join(each, " "))


def _knee_found(choice: Choice, curve: LoadCurve) -> Phrase:
    """What is known of a server's knee, and what would tell the rest; needs a level."""
    knee, last = curve.knee, curve.levels[-1]
    if knee.could_be:
        lowest = curve.at(knee.could_be[0])
        return phrase(
            "of the levels tested the lowest that could be the knee is {level} ({gives})",
            level=level_words(lowest),
            gives=gives(lowest),
        )
    if knee.verdict is KneeVerdict.NO_KNEE_YET:
        return phrase(
            "there is no knee up to {level}, the highest measured ({gives}); " + levels_tell(curve),
            level=level_words(last),
            gives=gives(last),
        )
    own = [c.reading for c in choice.candidates if c.measured and c.curve.server == curve.server]
    best = max(own, key=lambda reading: reading.median("tok_s") or 0.0)
    return phrase(
        "where throughput stops scaling is open, and of the levels measured {level} gives most ({gives}); "
        + (knee_tells(curve) if knee.doubling else levels_tell(curve)),
        gives=gives(best),
        level=level_words(best),
    )


def _listed(choice: Choice, some: Sequence[Candidate]) -> Phrase:
    if len(some) == sum(candidate.measured for candidate in choice.candidates):
        return phrase("every one is")
    return phrase("{levels} " + ("is" if len(some) == 1 else "are"), levels=_each_level(choice, some))


def _each_level(choice: Choice, some: Sequence[Candidate]) -> Phrase:
    levels = join(dict.fromkeys(_named(choice, c, level_figure(c.reading)) for c in some), ", ")
    return phrase(("rate" if choice.open_loop else "concurrency") + " {levels}", levels=levels)


def around(choice: Choice, targets: Targets, target: Sequence[Phrase] = ()) -> list[Phrase]:
    """Return what a reader must know beside the answer: others on the card, the next level, the knee, what presses,
    other contexts. `target`: how that stands under load (`analysis.advice.target_load`)."""
    return [*resting_on(c.reading for c in choice.candidates), *_around(choice, targets, target)]


def _around(choice: Choice, targets: Targets, target: Sequence[Phrase]) -> list[Phrase]:
    point = choice.point
    if point is None or not choice.slo.percentiles():
        services = [] if choice.open_loop else _services(choice)
        return [*services, *_when_steady(choice), *([] if point is None else _beside(choice, point, targets, target))]
    return [
        *_margin(choice),
        *_next_level(choice, point),
        *_when_steady(choice),
        *_past_the_knee(choice, point),
        *_beside(choice, point, targets, target),
    ]


def _when_steady(choice: Choice) -> Iterator[Phrase]:
    """Needs a level whose steady part, free of the opening burst, is on the other side of the objectives."""
    better = [c for c in choice.candidates if c.met_when_steady is True]
    worse = [c for c in choice.candidates if c.met_when_steady is False]
    each = [
        phrase(words, levels=_each_level(choice, some))
        for words, some in (
            ("{levels} would meet every objective", better),
            ("{levels} would miss one", worse),
        )
        if some
    ]
    if not each:
        return
    yield phrase(
        "Whole runs are held against the objectives, each with its opening burst, in which all prompts wait for each "
        "other. By the steady parts alone, which begin after it, {each}.{burst} Longer levels "
        "(`load.requests_per_level`, `load.seconds`) tell what a service sees.",
        each=join(each),
        burst=_burst(better),
    )


def _burst(some: Sequence[Candidate]) -> Phrase:
    """Needs a level whose opening burst is so large a share of its requests that their p95 is one of the burst's."""
    for reading in (candidate.reading for candidate in some):
        sent = reading.median("num_requests")
        if sent and reading.at > ABOVE_P95 * sent:
            return phrase(
                " At {level} the burst is {n} of {sent} requests, more than the {above} that lie above a p95.",
                level=level_words(reading),
                n=level_figure(reading),
                sent=requests_sent(reading),
                above=percent("rule.above_p95_pct", ABOVE_P95, 0),
            )
    return phrase("")


def _services(choice: Choice) -> list[Phrase]:
    """Needs a curve that tells a latency-focused service's level or a throughput-focused one's: that of the operating
    point, without one that of any server."""
    curves = choice.servers if choice.point is None else [choice.point.curve]
    said = []
    for curve in curves:
        if len(curve.levels) > 1 and not (latency_level(curve) is None and throughput_level(curve) is None):
            both = [for_latency(curve), for_throughput(curve)]
            several = len(curves) > 1
            said += [phrase("{label}: {one}", label=label_figure(curve), one=one) for one in both] if several else both
    return said


def _beside(choice: Choice, point: OperatingPoint, targets: Targets, target: Sequence[Phrase]) -> Iterator[Phrase]:
    servers = choice.servers
    if len(servers) > 1:
        n = count(f"op.{choice.group.slug}.servers", len(servers))
        rising = choice.basis is Basis.KNEE and not all(curve.knee.could_be for curve in servers)
        words = " Of one whose throughput is not known to stop scaling, no level gave more tok/s beyond noise."
        yield phrase("Chosen among {n} servers that were sent this load." + (words if rising else ""), n=n)
    verdict = pressed(choice, point)
    if verdict is not None:
        yield phrase("The level is **" + str(verdict) + "** already (batching_benchmark.md says by what signs).")
    for sentence in _target_context(point, targets):
        yield join([sentence, *target], " ")
    yield phrase("Measured: {notes}.", notes=_measured(point.reading))


def _measured(reading: Reading) -> Phrase:
    n = len(reading.measured)
    repeats = count(f"{reading.name}.repeats", n)
    each = phrase(
        "{n} repeat" + ("" if n == 1 else "s") + ", {sent} requests in {s} s" + ("" if n == 1 else " each (medians)"),
        n=repeats,
        sent=requests_sent(reading),
        s=cell(reading, "duration_s", 4),
    )
    notes: list[Part] = [each, *request_notes(reading)]
    return join([*notes, *foreign_process_notes(reading), *clock_notes(reading), *unmeasured_notes(reading)])


def _margin(choice: Choice) -> Iterator[Phrase]:
    """Needs an objective that the chosen level meets by less than what starts of one server may differ by."""
    if choice.thin:
        yield phrase(
            "Its margin is thin: an interval ends less than {thin} below its objective, and what another start of the "
            "server differs by is not in it; the same sweep again, on a new server, tells.",
            thin=thin_margin(),
        )


def _next_level(choice: Choice, point: OperatingPoint) -> Iterator[Phrase]:
    above = [c for c in choice.candidates if c.curve is point.curve and c.reading.at > point.reading.at]
    if not above:
        yield phrase(
            "No higher level was tried, so a higher one may hold, too; " + levels_tell(point.curve, search="slo") + "."
        )
        return
    after = above[0]
    parts: dict[str, Part] = {"level": level_words(after.reading)}
    if after.standing is Standing.NOT_MEASURED:
        yield phrase("The next higher level, {level}, was tried and not measured.", **parts)
        return
    parts["gives"] = gives(after.reading)
    if after.standing is Standing.MISSES:
        missed = _missed(after)
        yield phrase("The next higher, {level}, gives {gives} and misses {missed}.", missed=missed, **parts)
    elif after.standing is Standing.UNDECIDED:
        yield phrase(
            "The next higher, {level}, is undecided: {gives}; " + repeats_tell(after.curve, "slo") + ".", **parts
        )
    else:
        yield phrase("The next higher, {level}, meets every objective, too, with no more tok/s: {gives}.", **parts)


def _past_the_knee(choice: Choice, point: OperatingPoint) -> Iterator[Phrase]:
    """Needs a closed loop (an open loop gives what arrives) and a knee that lies below the point for sure."""
    if choice.open_loop:
        return
    curve, knee = point.curve, point.curve.knee
    if not knee.could_be or point.reading.at <= knee.could_be[-1]:
        return
    top = curve.at(knee.could_be[-1])
    change = curve.change(top, point.reading, "tok_s")
    assert change is not None
    yield phrase(
        "It lies past the knee of the levels tested ({knee}): {level} gives {gives}, and from there to {point} tok/s "
        "changes by {change}.",
        knee=knee_range(curve),
        level=level_words(top),
        gives=gives(top),
        point=level_words(point.reading),
        change=change_words(top, point.reading, "tok_s", change),
    )


def pressed(choice: Choice, point: OperatingPoint) -> Limit | None:
    """Return what already limits the chosen level, where a reader must know it before running it."""
    share = None if point.room is None else point.room.request_share
    verdict = Limit.UNKNOWN if choice.open_loop else limit(signs(point.curve, point.reading, share))
    return verdict if verdict in PRESSED else None


def _same_blocks(point: OperatingPoint, tokens: int, others: int) -> bool:
    rooms = [point.room_for(length, 1) for length in (tokens, others)]
    return None not in rooms and rooms[0] == rooms[1]


def _target_context(point: OperatingPoint, targets: Targets) -> Iterator[Phrase]:
    """Needs a target whose context is longer than what was sent, by a block of KV at least where blocks are known."""
    reading, tokens, sent = point.reading, targets.context_tokens, point.curve.request_tokens
    if tokens is None or tokens <= sent or _same_blocks(point, sent, tokens):
        return
    own = plain(f"{point.curve.name}.request_tokens", sent)
    longest, context = point.curve.series.sample.max_model_len, plain("target.context_tokens", tokens)
    head = phrase("These figures are for requests of {own} tokens, prompt and answer", own=own)
    if tokens > longest:
        yield phrase(
            "{head}; target.context_tokens {context} is above this server's max_model_len {length}.",
            head=head,
            context=context,
            length=plain(f"{point.curve.name}.max_model_len", longest),
        )
        return
    room = point.room_for(tokens, 1)
    if room is None:
        yield phrase("{head}, not of target.context_tokens {context}.", head=head, context=context)
        return
    yield phrase(
        "{head}. Of target.context_tokens {context} its pool holds at least {n} at once by formula; their latency is "
        "not in these figures.",
        head=head,
        context=context,
        n=count(f"{reading.name}.target_holds", room.holds),
    )
