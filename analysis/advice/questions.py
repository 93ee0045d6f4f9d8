"""The tutorial's ten questions, each answered from this run's rows. A section of operating_point.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from analysis.advice.load_questions import creeping, doubling, not_free, rise, safe_point, two_services, under_fed
from analysis.advice.memory_questions import capacity_decision, double_context, production_length
from analysis.advice.subject import Subject
from analysis.load.load_tables import label_figure, lengths_sent
from analysis.load.strangers import marked
from analysis.writing.document import Document, Phrase, join, phrase
from analysis.writing.figures import Figure

OF_LEVELS = (safe_point, not_free, doubling, under_fed, creeping, two_services)
"""Answers that rest on levels of load and do not say themselves who else was on the card; `rise` does."""


def add_questions(doc: Document, subject: Subject) -> None:
    """Write all ten, the tutorial's question in short before each answer."""
    asked: Sequence[tuple[str, Callable[[Subject], Phrase]]] = (
        ("Why is max_model_len more than a functional parameter?", capacity_decision),
        ("Which max_model_len for production, by the KV sweep?", production_length),
        ("Why does throughput rise with concurrency and then flatten?", rise),
        ("What is the safe operating point?", safe_point),
        ("Why is turning up concurrency not free?", not_free),
        ("Double the context at the same concurrency and objective: feasible?", double_context),
        ("One more doubling of concurrency: is it acceptable?", doubling),
        ("Low concurrency, low throughput: why, and what to tell an SRE?", under_fed),
        ("p95 creeps up at the same QPS: how do these data help?", creeping),
        ("An interactive chat and an offline batch job: how to configure each?", two_services),
    )
    doc.heading(3, "The tutorial's ten questions")
    _say_whose_levels(doc, subject)
    doc.bullets(
        phrase("**{number}. " + question + "** {answer}", number=_number(i), answer=_answer(answer, subject))
        for i, (question, answer) in enumerate(asked, start=1)
    )


def _answer(answer: Callable[[Subject], Phrase], subject: Subject) -> Phrase:
    if answer not in OF_LEVELS or subject.main is None:
        return answer(subject)
    return join([answer(subject), *marked(c.reading for c in subject.main.candidates)], " ")


def _say_whose_levels(doc: Document, subject: Subject) -> None:
    """Nothing where one server was sent one load."""
    main, curve = subject.main, subject.curve
    if main is None or curve is None:
        return
    what: list[Phrase] = []
    if len(subject.choices) > 1:
        closed = ", in a closed loop" if any(choice.open_loop for choice in subject.choices) else ""
        what.append(phrase("of the first load above, {load}" + closed, load=lengths_sent(curve)))
    if len(main.servers) > 1:
        which = "the one chosen" if main.point is not None else "the one with the highest tok/s, since none was chosen"
        what.append(phrase("of one server, {label}: " + which, label=label_figure(curve)))
    if what:
        doc.say("Where nothing else is said, what these answers say of levels is {what}.", what=join(what, ", "))


def _number(number: int) -> Figure:
    return Figure(f"question.{number}", number, f"Q{number}")
