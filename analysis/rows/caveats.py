"""What a reader must know before any number: written at the top of every page, and in short in titles and notes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from analysis.rows.groups import unique_slug
from analysis.rows.manifest import UNFINISHED
from analysis.rows.series import outcome_figure, point_name
from analysis.rows.tables import RunPoint, Tables
from analysis.writing.document import Document, Phrase, join, phrase
from analysis.writing.figures import count, plain, quote
from contract.next_steps import next_step
from contract.rows import MEASURED, OVER_BUDGET, PRUNED
from contract.specs import PointKind, Start


def marks(point: RunPoint) -> list[str]:
    """Return the words that must stand beside this point's numbers wherever they are shown."""
    return [
        *(["simulated"] if point.simulated else []),
        *(["dummy weights"] if point.dummy_weights else []),
        *(["MoE: routing and speed not representative"] if point.moe and point.dummy_weights else []),
        *([f"cut: {point.model_cut}"] if point.model_cut else []),
    ]


def device_words(point: RunPoint) -> str:
    """Return what served: `2 x NVIDIA H100`, `CPU backend (name)`, `simulated device`."""
    name = point.device_name or ("device unknown" if not point.simulated else "device")
    if point.simulated and not name.lower().startswith("simulated"):
        name = f"simulated {name}"
    if point.device == "cpu":
        return f"CPU backend ({name})"
    return f"{point.gpus} x {name}" if point.gpus > 1 else name


def lengths_words(point: RunPoint) -> str:
    """Return a load's lengths: `12 + 64 tokens`, `512 + 64 tokens on average`, `chat, 12 + 64 tokens`."""
    chat = "chat, " if point.api == "chat" else ""
    mean = " on average" if point.prompt_lengths or point.output_lengths else ""
    return f"{chat}{point.prompt_tokens} + {point.output_tokens} tokens{mean}"


def title(point: RunPoint, label: str) -> str:
    """Return model, device and marks in one line, for plots and the terminal."""
    parts = [label]
    for words in (device_words(point), *marks(point)):
        if words not in ", ".join(parts):
            parts.append(words)
    return ", ".join(parts)


def identity(point: RunPoint, name: str, label: str) -> Phrase:
    """Return `title` and the engine's version as a phrase for a heading."""
    parts = [quote(f"{name}.title", title(point, label))]
    if point.vllm_version and not point.simulated:
        parts.append(quote(f"{name}.version", f"vLLM {point.vllm_version}"))
    return join(parts, ", ")


MISSING = {
    "sessions.parquet": "how its servers started and ended, where their memory went, and which cards they had is not "
    "known, and pictures of it are left out",
    "manifest.json": "its objectives, targets and price are not known, nor its models' configs: nothing is chosen by "
    "them or held against them",
}
"""Files that a run may have been sent without, and what goes with each."""


def missing_words(tables: Tables) -> list[Phrase]:
    """Return which files the run does not hold, and what is therefore left out."""
    return [phrase(f"no {file} that can be read in this run: {MISSING[file]}.") for file in tables.missing]


def not_whole(tables: Tables) -> list[Phrase]:
    """Return that a run is not known to have ended, and what it lacks of its plan; nothing of one that has."""
    unfinished = tables.unfinished
    if unfinished is None:
        return []
    planned, lacking = len(unfinished.planned), tables.planned_without_row
    return [
        phrase(
            f"this run's manifest says `{unfinished.status}`: {UNFINISHED[unfinished.status]}. Of the points planned "
            "from the start {there} of {planned} have a row"
            + ("; a search would have added further ones" if unfinished.searches else "")
            + ". `python -m orchestrator resume=RUN` measures what is missing.",
            there=count("run.planned_with_row", planned - lacking),
            planned=count("run.planned", planned),
        )
    ]


def add_caveats(doc: Document, points: Sequence[RunPoint], tables: Tables) -> None:
    """Write the caveats that these points of the run call for."""
    for part in not_whole(tables):
        doc.caution("**not whole**: {part}", part=part)
    for missing in missing_words(tables):
        doc.caution("**incomplete**: {missing}", missing=missing)
    if any(point.simulated for point in points):
        kind = (
            "Every number" if all(point.simulated for point in points) else "Every number of a model marked simulated"
        )
        doc.caution(
            f"**simulated**: {kind} on this page comes from the simulator, which pretends to have GPUs. "
            "It shows how the tool works, never how a real card or model behaves."
        )
    if any(point.dummy_weights for point in points):
        doc.caution(
            "**dummy weights**: the weights are random in the model's true shape. Memory and the speed of dense layers "
            "are those of the model; its text is noise, so nothing here depends on what the model says."
            + (
                " Power and energy depend on the data, so these, and speed where the power limit holds the clock down, "
                "may differ with the model's own weights."
                if any(point.device != "cpu" and not point.simulated for point in points)
                else ""
            )
        )
    if any(point.moe and point.dummy_weights for point in points):
        doc.caution(
            "**mixture of experts with dummy weights**: random routing does not load the experts as trained weights "
            "do, so latency and throughput are not representative. KV memory is."
        )
    here = _cuts(points)
    for (model, words), slug in _cut_slugs(tables).items():
        if (model, words) not in here:
            continue
        doc.caution(
            "**cut model**: {model} is smaller than its original ({words}); weights' memory and speed are those of "
            "the cut.",
            model=quote(f"cut.{slug}.model", model),
            words=quote(f"cut.{slug}.words", words),
        )
    for forked in forked_words(points, tables):
        doc.caution("**forked servers**: {forked}", forked=forked)
    if any(point.device == "cpu" for point in points):
        doc.caution(
            "**CPU backend**: no GPU was used. Memory is the proportional set size (PSS) of the server's process tree, "
            "in which a page counts only once it was written; utilisation of a GPU does not exist here. "
            "Say nothing about a GPU from these numbers."
        )


def forked_words(points: Sequence[RunPoint], tables: Tables) -> list[Phrase]:
    """Return that some of these levels were measured on cards on forked servers, and what that means; nothing where
    none was."""
    if not _forked_under_load(points, tables):
        return []
    return [
        phrase(
            "load was sent to servers with `server.start=warm`. On GPUs these were seen to be slower than cold ones, "
            "by some percent in older builds, by about one since where few requests run (docs/warm_starts.md); "
            "`server.start=cold` is the reference."
        )
    ]


def _forked_under_load(points: Sequence[RunPoint], tables: Tables) -> bool:
    forked = {(session.session_id, session.attempt) for session in tables.sessions if session.start == Start.WARM}
    levels = (point for point in points if point.kind == PointKind.LOAD and point.status == MEASURED)
    return any(
        (p.start == Start.WARM or (p.session_id, p.attempt) in forked) and p.device == "cuda" and not p.simulated
        for p in levels
    )


def _cuts(points: Sequence[RunPoint]) -> set[tuple[str, str]]:
    return {(point.model, point.model_cut) for point in points if point.model_cut}


def _cut_slugs(tables: Tables) -> dict[tuple[str, str], str]:
    """Return a slug for each cut model of the run, whatever page it stands on: names of figures are the run's."""
    taken: set[str] = set()
    return {(model, words): unique_slug([model], taken) for model, words in sorted(_cuts(tables.points))}


def silent_sessions(tables: Tables) -> int:
    """Return how many sessions failed without leaving a row for any of their points."""
    with_points = {point.session_id for point in tables.points}
    return len({s.session_id for s in tables.sessions if s.status != MEASURED} - with_points)


def add_failures(doc: Document, points: Sequence[RunPoint], tables: Tables) -> None:
    """Write which of the page's points were not measured, with their class; nothing when all were, or were pruned."""
    lost = [point for point in points if point.status not in (MEASURED, PRUNED)]
    silent = silent_sessions(tables)
    if not lost and not silent:
        return
    doc.heading(2, "Not measured")
    left_out = sum(point.status == OVER_BUDGET for point in lost)
    if left_out:
        doc.say(
            "Left out because the run's budget had no room for them (`over_budget`): {n} points. "
            "`python -m orchestrator resume=RUN` measures them.",
            n=count("lost.over_budget", left_out),
        )
    if silent:
        doc.say("Sessions that failed before any of their points had a row: {n}.", n=count("lost.sessions", silent))
    by_kind: dict[tuple[str, str, int, int | None, str], list[RunPoint]] = {}
    for point in lost:
        key = (point.model, point.purpose, point.max_model_len, point.concurrency, outcome_figure(point).text)
        by_kind.setdefault(key, []).append(point)
    rows = []
    for key in sorted(by_kind, key=lambda k: (k[0], k[1], k[2], k[3] or 0, k[4])):
        some = by_kind[key]
        first = some[0]
        where = point_name(first)
        rows.append(
            [
                quote(f"{where}.model", first.model),
                quote(f"{where}.purpose", first.purpose),
                plain(f"{where}.max_model_len", first.max_model_len),
                phrase("–") if first.concurrency is None else plain(f"{where}.concurrency", first.concurrency),
                count(f"{where}.points", len(some)),
                join([outcome_figure(first), *([phrase("simulated")] if first.simulated else [])]),
            ]
        )
    if rows:
        doc.table(["model", "purpose", "max_model_len", "concurrency", "points", "notes"], rows)
    doc.bullets(next_steps(lost))


def next_steps(lost: Sequence[RunPoint]) -> Iterator[Phrase]:
    """Return what can be done about what was not measured, a sentence for each class of failure that has one."""
    for failure_class in sorted({point.failure_class for point in lost if point.failure_class}):
        step = next_step(failure_class)
        if step is not None:
            yield phrase(f"Next step for `{failure_class}`: {step}.")
