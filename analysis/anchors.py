"""Did a server drift while it lived? One level, the anchor, was measured again and again: what it says of others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from analysis.caveats import title
from analysis.document import Document, Part, phrase
from analysis.figures import Figure, count, percent, plain, quote, signed_percent, significant
from analysis.series import Reading
from analysis.tables import RunPoint, Tables
from contract.rows import MEASURED

DRIFT_LIMIT = 0.05
"""Levels of a session are marked where tok_s of its anchor ever differed from the first reading by more than that."""


def with_drift(tables: Tables) -> Tables:
    """Return the tables with `anchor_drift` in every point of a session that has two measured anchors or more."""
    found = {session: drift for session, some in _anchors(tables.points).items() if (drift := _drift(some)) is not None}
    points = (replace(p, anchor_drift=found[p.session_id]) if p.session_id in found else p for p in tables.points)
    return replace(tables, points=tuple(points))


def drift_notes(reading: Reading) -> list[Part]:
    """Return the mark of a level that was measured in a session whose anchor moved too far."""
    worst = max(reading.values("anchor_drift"), key=abs, default=0.0)
    if abs(worst) <= DRIFT_LIMIT:
        return []
    return [
        phrase(
            "its session's anchor drifted by {drift}", drift=signed_percent(f"{reading.name}.anchor_drift_pct", worst)
        )
    ]


def add_anchors(doc: Document, points: Sequence[RunPoint]) -> None:
    """Write the readings of every session's anchor; nothing where there is none."""
    sessions = {session: some for session, some in _anchors(points).items() if len(some) > 1}
    if not sessions:
        return
    doc.heading(2, "Drift while a server lived")
    doc.say(
        "One level, the anchor, was measured again and again between the others. Where its tok_s ever differs from the "
        "first reading by more than {limit}, the levels of that server are marked in their notes. A single reading "
        "scatters as a single repeat does.",
        limit=percent("rule.drift_limit_pct", DRIFT_LIMIT, 0),
    )
    for session, some in sessions.items():
        _session(doc, f"anchor.{session}", some)


def _session(doc: Document, name: str, some: Sequence[RunPoint]) -> None:
    first, drift = some[0], _drift(some)
    rows: list[list[str | Part]] = [
        [
            plain(f"{name}.r{point.repeat}.repeat", point.repeat or 0),
            *(part for column in ("tok_s", "p95_e2e_s") for part in _value_and_change(name, point, first, column)),
        ]
        for point in some
    ]
    doc.table(["reading", "tok_s", "change", "p95_e2e_s", "change"], rows, first.simulated)
    doc.say(
        "{who}, concurrency {level}: over {n} readings tok_s moved by {drift} at most"
        + (": more than the limit." if drift is not None and abs(drift) > DRIFT_LIMIT else "."),
        who=quote(f"{name}.title", title(first, first.model)),
        level=plain(f"{name}.concurrency", first.concurrency or 0),
        n=count(f"{name}.readings", len(some)),
        drift=signed_percent(f"{name}.drift_pct", drift),
    )
    beside = sum(bool(point.co_running_sessions) for point in some)
    if 0 < beside < len(some):
        doc.say(
            "Readings beside other sessions on its host: {beside}. The others were alone, so what neighbours cost is "
            "in that change, too.",
            beside=count(f"{name}.beside", beside),
        )


def _value_and_change(name: str, point: RunPoint, first: RunPoint, column: str) -> list[Figure]:
    value, before = getattr(point, column), getattr(first, column)
    change = value / before - 1 if value and before else None
    prefix = f"{name}.r{point.repeat}.{column}"
    return [significant(prefix, value, 4), signed_percent(f"{prefix}_change_pct", change)]


def _anchors(points: Sequence[RunPoint]) -> dict[str, list[RunPoint]]:
    """The measured anchors of every session in their order."""
    found: dict[str, list[RunPoint]] = {}
    for point in sorted(points, key=lambda point: point.repeat or 0):
        if point.purpose == "anchor" and point.status == MEASURED and point.tok_s:
            found.setdefault(point.session_id, []).append(point)
    return dict(sorted(found.items()))


def _drift(some: Sequence[RunPoint]) -> float | None:
    """The largest change of tok_s from the first reading, with its sign; None for fewer than two."""
    changes = [(point.tok_s or 0.0) / (some[0].tok_s or 1.0) - 1 for point in some[1:]]
    return max(changes, key=abs, default=None)
