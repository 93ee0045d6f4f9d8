"""operating_point.md: which server at which concurrency, the alerts to set, and the tutorial's ten questions."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.advice.alerts import add_alerts
from analysis.advice.operating_point import Basis, Choice
from analysis.advice.operating_sentences import answer, around, objectives, thin_margin
from analysis.advice.operating_tables import figure_rows, level_rows
from analysis.advice.questions import add_questions
from analysis.advice.subject import Subject, subjects
from analysis.advice.target_load import target_sentences
from analysis.load.load_tables import confidence, lengths_sent
from analysis.load.neighbours import neighbour_sentences
from analysis.pages.without_rows import CELLS
from analysis.rows.caveats import add_caveats, add_failures, identity
from analysis.rows.tables import RunPoint, Tables
from analysis.rows.targets import Slo, Targets
from analysis.writing.document import Document
from contract.rows import MEASURED

FILE = "operating_point.md"


def operating_page(tables: Tables, slo: Slo, targets: Targets, gpu_hour: float | None) -> Document:
    """Return the page; of a run without a row one that says so. `tables` with goodput, where there are objectives."""
    doc = Document(FILE)
    doc.heading(1, "Operating point")
    add_caveats(doc, tables.points, tables)
    found = subjects(tables, slo, targets, gpu_hour)
    if any(subject.choices for subject in found):
        _add_rule(doc, slo)
    doc.bullets(neighbour_sentences(tables))
    if not found:
        _say_no_levels(doc, ())
    for subject in found:
        points = subject.group.points
        sample = next((point for point in points if point.status == MEASURED), points[0])
        doc.heading(2, "{who}", who=identity(sample, subject.name, subject.group.label))
        if not subject.choices:
            _say_no_levels(doc, points)
        for choice in subject.choices:
            _add_choice(doc, choice, subject, gpu_hour)
        add_questions(doc, subject)
    add_failures(doc, tables.points, tables)
    return doc


def _say_no_levels(doc: Document, points: Sequence[RunPoint]) -> None:
    cells = any(point.purpose == "envelope" for point in points)
    doc.say(
        "Not known from this run: it holds no levels of load to choose from"
        + (f" (cells of an envelope are {CELLS})" if cells else "")
        + "; `+sweep=knee`, or `+sweep=slo` for objectives, measures them."
    )


def _add_rule(doc: Document, slo: Slo) -> None:
    limits = slo.percentiles()
    if not limits:
        doc.say(
            "No objective is given (`slo.p95_e2e_s`, `slo.p95_ttft_s`, `slo.p95_tpot_s`): what is chosen below follows "
            "from throughput alone."
        )
        return
    doc.say(
        "Objectives: {limits}. A level meets one where the whole {confidence} interval of its p95 lies at or below it, "
        "misses it where all of it lies above, and is undecided else. What is chosen was measured; nothing is "
        "interpolated. What differs from one start of a server to the next is not in these intervals: a level that "
        "meets an objective by less than {thin} of it does so by a thin margin, and another start may miss it.",
        limits=objectives(limits),
        confidence=confidence(),
        thin=thin_margin(),
    )


def _add_choice(doc: Document, choice: Choice, subject: Subject, gpu_hour: float | None) -> None:
    """Write the answer, its figures, the levels against the objectives, and the alerts of what was chosen."""
    curve = choice.point.curve if choice.point is not None else choice.curves[0]
    kind = "Load: {load}, by arrival rate" if choice.open_loop else "Load: {load}"
    doc.heading(3, kind, load=lengths_sent(curve))
    doc.say("{answer}", answer=answer(choice))
    if choice.point is not None:
        doc.table(["what", "value", "notes"], figure_rows(choice, choice.point, gpu_hour), choice.sample.simulated)
    doc.bullets(around(choice, subject.targets, target_sentences(subject)))
    columns, rows = level_rows(choice)
    if rows:
        doc.table(columns, rows, choice.sample.simulated)
    if choice is subject.main or (choice.point is not None and choice.basis is not Basis.AS_MEASURED):
        doc.say(
            "Alerts to set (on a window of about as many requests; a percentile of few scatters more than these, "
            "and another start of the server may differ by more):"
        )
        add_alerts(doc, choice)
