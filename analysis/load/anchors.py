"""Did a server drift while it lived? One level, the anchor, was measured again and again: what it says of others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter

from analysis.load.load_curve import SAME_WINDOW
from analysis.numbers.anchor_drift import DRIFT_LIMIT, Drift, Timed, find_drift
from analysis.numbers.intervals import CONFIDENCE
from analysis.rows.caveats import title
from analysis.rows.groups import LOAD
from analysis.rows.series import Reading
from analysis.rows.tables import RunPoint, Tables, moment
from analysis.writing.document import Document, Part, Phrase, phrase
from analysis.writing.figures import Figure, count, percent, plain, quote, signed_percent, significant
from contract.rows import MEASURED

Server = tuple[str, int]
"""A session and its start: what two starts of one configuration differ by is no drift."""


def with_drift(tables: Tables) -> Tables:
    """Return the tables with `anchor_drift` in every point of a server that has two measured anchors or more."""
    found = {server: drift for server, drift in _drifts(tables.points).items() if drift is not None}

    def marked(point: RunPoint) -> RunPoint:
        drift = found.get(_server(point))
        if drift is None:
            return point
        return replace(point, anchor_drift=drift.furthest, anchor_drifted=drift.share if drift.drifted else None)

    return replace(tables, points=tuple(map(marked, tables.points)))


def drift_notes(reading: Reading) -> list[Part]:
    """Return the mark of a level that was measured in a session whose anchor drifted."""
    drifted = reading.values("anchor_drifted")
    if not drifted:
        return []
    worst = signed_percent(f"{reading.name}.anchor_drift_pct", max(drifted, key=abs))
    return [phrase("its session's anchor drifted by {drift}", drift=worst)]


def add_anchors(doc: Document, points: Sequence[RunPoint]) -> None:
    """Write the readings of every session's anchor; nothing where there is none."""
    servers = {server: some for server, some in _anchors(points).items() if len(some) > 1}
    if not servers:
        return
    doc.heading(2, "Drift while a server lived")
    doc.say(
        "One level, the anchor, was measured again and again between the others. A server drifted where a step or a "
        "trend in the anchor's tok_s is more than noise and more than {limit}: then its levels are marked in their "
        "notes. Noise is that of the anchor and of the session's repeats of the same load about such a step or trend, "
        "taken for the same at every level; the interval allows for as many of them as there are readings, so that no "
        "more than {alarms} of the servers that do not drift are marked, where the anchor scatters as the other levels "
        "do. Where it scatters more, more are.",
        limit=percent("rule.drift_limit_pct", DRIFT_LIMIT, 0),
        alarms=percent("rule.false_alarms_pct", 1 - CONFIDENCE, 0),
    )
    drifts = _drifts(points)
    several = Counter(session for session, _ in servers)
    for (session, attempt), some in servers.items():
        name = f"anchor.{session}" if several[session] == 1 else f"anchor.{session}.{attempt}"
        _session(doc, name, some, drifts[session, attempt])


def _session(doc: Document, name: str, some: Sequence[RunPoint], drift: Drift | None) -> None:
    first = some[0]
    rows: list[list[str | Part]] = [
        [
            plain(f"{name}.r{point.repeat}.repeat", point.repeat or 0),
            *(part for column in ("tok_s", "p95_e2e_s") for part in _value_and_change(name, point, first, column)),
        ]
        for point in some
    ]
    doc.table(["reading", "tok_s", "change", "p95_e2e_s", "change"], rows, first.simulated)
    doc.say(
        "{who}, concurrency {level}: {verdict}",
        who=quote(f"{name}.title", title(first, first.model)),
        level=plain(f"{name}.concurrency", first.concurrency or 0),
        verdict=_verdict(name, some, drift),
    )
    beside = sum(bool(point.co_running_sessions) for point in some)
    if 0 < beside < len(some):
        doc.say(
            "Readings beside other sessions on its host: {beside}. The others were alone, so what neighbours cost is "
            "in that change, too.",
            beside=count(f"{name}.beside", beside),
        )


def _verdict(name: str, some: Sequence[RunPoint], drift: Drift | None) -> Phrase:
    readings = count(f"{name}.readings", len(some))
    share = signed_percent(f"{name}.drift_pct", None if drift is None else drift.share)
    if drift is None or drift.low is None or drift.high is None:
        return phrase(
            "over {n} readings tok_s moved by {drift}; whether that is a drift is not known from this run, for nothing "
            "tells its noise. More readings, or levels with repeats, tell.",
            n=readings,
            drift=share,
        )
    if drift.drifted:
        words = "tok_s drifted by {drift} ({low} to {high})."
    elif drift.told:
        words = "tok_s moved by {drift} ({low} to {high}), more than noise but not more than the limit: no drift."
    else:
        words = "no drift: the clearest step or trend in tok_s, {drift} ({low} to {high}), is within noise."
    return phrase(
        "over {n} readings " + words,
        n=readings,
        drift=share,
        low=signed_percent(f"{name}.drift_low_pct", drift.low),
        high=signed_percent(f"{name}.drift_high_pct", drift.high),
    )


def _value_and_change(name: str, point: RunPoint, first: RunPoint, column: str) -> list[Figure]:
    value, before = getattr(point, column), getattr(first, column)
    change = value / before - 1 if value and before else None
    prefix = f"{name}.r{point.repeat}.{column}"
    return [significant(prefix, value, 4), signed_percent(f"{prefix}_change_pct", change)]


def _anchors(points: Sequence[RunPoint]) -> dict[Server, list[RunPoint]]:
    """The measured anchors of every server in their order."""
    found: dict[Server, list[RunPoint]] = {}
    for point in sorted(points, key=lambda point: point.repeat or 0):
        if point.purpose == "anchor" and point.status == MEASURED and point.tok_s:
            found.setdefault(_server(point), []).append(point)
    return dict(sorted(found.items()))


def _server(point: RunPoint) -> Server:
    return point.session_id, point.attempt


def _drifts(points: Sequence[RunPoint]) -> dict[Server, Drift | None]:
    """By server, for those with a measured anchor."""
    return {server: find_drift(_timed(some), _others(points, some[0])) for server, some in _anchors(points).items()}


def _others(points: Sequence[RunPoint], anchor: RunPoint) -> list[list[Timed]]:
    """The repeats of every level of the anchor's session that was sent the same load in a closed loop."""
    levels: dict[tuple[str, int | None], list[RunPoint]] = {}
    for point in points:
        if (
            _server(point) == _server(anchor)
            and point.purpose in SAME_WINDOW
            and point.status == MEASURED
            and all(getattr(point, column) == getattr(anchor, column) for column in LOAD)
        ):
            levels.setdefault((point.purpose, point.concurrency), []).append(point)
    return [_timed(level) for level in levels.values()]


def _timed(points: Sequence[RunPoint]) -> list[Timed]:
    known = [(moment(point.started_at), point.tok_s) for point in points]
    return sorted((Timed(at, value) for at, value in known if at is not None and value), key=attrgetter("at_s"))
