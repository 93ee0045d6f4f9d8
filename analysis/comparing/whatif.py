"""`python -m analysis whatif RUN max_model_len=8192 concurrency=16`: what would fit, and what of it is known.

Each line says what it rests on: *measured* in this run (or *simulated*), *arithmetic* from a measured pool and the
model's formula, or *not known*. Nothing is interpolated between levels of load, and no latency is ever computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from analysis.comparing.difference_rows import load_words
from analysis.comparing.runs import Run, open_runs
from analysis.errors import AnalysisError
from analysis.load.load_curve import LoadCurve, load_curves
from analysis.memory.kv_envelope import Envelope, envelopes
from analysis.memory.kv_fit import KvResult, kv_results
from analysis.rows.caveats import title
from analysis.rows.groups import BASE
from analysis.rows.tables import RunPoint
from analysis.writing.figures import GIB, clean, significant_text

LOADS = ("concurrency", "batching", "near_full_context")


@dataclass(frozen=True, slots=True)
class Question:
    """The service that is asked about; None: as it was measured."""

    max_model_len: int | None = None
    concurrency: int | None = None

    @classmethod
    def parse(cls, assignments: Sequence[str]) -> Question:
        """Return the question of `name=number` arguments. Raises `AnalysisError` for anything else."""
        names = [each.name for each in fields(cls)]
        given: dict[str, int] = {}
        for assignment in assignments:
            name, _, value = assignment.partition("=")
            if name not in names or not value.isdecimal() or not 0 < int(value) < 2**40 or name in given:
                known = " and ".join(f"{known}=NUMBER" for known in names)
                raise AnalysisError(
                    f"whatif: {assignment!r} is not understood: {known} can be given, each once, above 0"
                )
            given[name] = int(value)
        return cls(**given)


@dataclass(frozen=True, slots=True)
class Fact:
    """One line of an answer."""

    basis: str
    words: str
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WhatIf:
    """The answer for every model and card of a run."""

    run: Run
    question: Question
    models: list[tuple[str, list[Fact]]]

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            "run": str(self.run.directory),
            "question": {each.name: getattr(self.question, each.name) for each in fields(self.question)},
            "models": [
                {"model": name, "facts": [{"basis": f.basis, "words": f.words, **f.values} for f in facts]}
                for name, facts in self.models
            ],
        }

    def text(self) -> str:
        """Return what the terminal shows."""
        blocks = [
            "\n".join([name, *(f"  {f.basis:<10}  {clean(f.words)}" for f in facts)]) for name, facts in self.models
        ]
        return "\n\n".join(blocks)


def what_if(directory: Path, question: Question) -> WhatIf:
    """Return what a run says about a service. Raises `AnalysisError` for a run that tells no KV pool."""
    (run,) = open_runs([directory])
    models = [
        (clean(title(result.group.points[0], result.group.label)), list(_facts(run, result, pools[0], question)))
        for result, pools in _pools(run)
        if pools
    ]
    if not models:
        raise AnalysisError(
            f"{directory}: no server of this run told the size of its KV pool, or the formula of its model is not known"
        )
    return WhatIf(run, question, models)


def _pools(run: Run) -> list[tuple[KvResult, list[Envelope]]]:
    """Return the memory results with their pools; of a run of load alone, what its servers told of theirs."""
    points: Sequence[RunPoint] = run.tables.points
    if not kv_results(points):
        points = [replace(point, purpose="kv_scaling") for point in points if point.engine_kv_bytes]
    return [(result, envelopes(result, points, run.tables.configs)) for result in kv_results(points)]


def _facts(run: Run, result: KvResult, pool: Envelope, question: Question) -> Iterator[Fact]:
    sample = pool.sample
    seen = "simulated" if sample.simulated else "measured"
    tokens = question.max_model_len or sample.max_model_len
    source = (
        f"that vLLM took at gpu_memory_utilization {sample.gpu_memory_utilization or 0:g}"
        if pool.whole_card
        else "of a stated size (not all that the card can hold)"
    )
    yield Fact(
        seen,
        f"KV pool: {pool.size_bytes / GIB:,.2f} GiB, {source}, max_model_len {sample.max_model_len}",
        {"what": "pool", "pool_bytes": pool.size_bytes, "at_max_model_len": sample.max_model_len},
    )
    yield from _fit(pool, sorted(result.per_sequence()), tokens, question.concurrency)
    yield from _limits(result, pool, tokens, question.concurrency)
    if question.concurrency is not None:
        yield from _latencies(run, sample, seen, tokens, question.concurrency)


def _fit(pool: Envelope, lengths: Sequence[int], tokens: int, concurrency: int | None) -> Iterator[Fact]:
    one, most = pool.need_bytes(tokens, 1), pool.most(tokens)
    exact = pool.pages is not None or tokens in lengths
    how = "in whole blocks" if exact else f"on lines through the lengths of this run ({_listed(lengths)})"
    yield Fact(
        "arithmetic",
        f"one request of {tokens:,} tokens takes {significant_text(one / GIB, 4)} GiB by the formula, {how}; "
        f"{most:,.2f} at once fill the pool",
        {"what": "request", "tokens": tokens, "request_bytes": one, "requests_that_fit": most},
    )
    if concurrency is None:
        return
    need, share, verdict = (
        pool.need_bytes(tokens, concurrency),
        pool.share(tokens, concurrency),
        pool.fit(tokens, concurrency),
    )
    yield Fact(
        "arithmetic",
        f"{concurrency:,} of them need {need / GIB:,.2f} GiB, {100 * share:.1f} % of the pool: {verdict}; "
        f"headroom {(pool.room_bytes - need) / GIB:+,.2f} GiB",
        {
            "what": "fit", "concurrency": concurrency, "need_bytes": need, "share_pct": 100 * share,
            "headroom_bytes": pool.room_bytes - need, "verdict": verdict.value,
        },
    )  # fmt: skip


def _limits(result: KvResult, pool: Envelope, tokens: int, concurrency: int | None) -> Iterator[Fact]:
    """What would keep a server from it, whatever its pool: the model's own limit, and max_num_seqs."""
    limit, most = pool.pages.limit if pool.pages is not None else None, pool.sample.max_num_seqs
    if limit is not None and tokens > limit:
        yield Fact(
            "not known",
            f"whether the model serves {tokens:,} tokens: its config allows {limit:,}, and vLLM refuses more",
            {"what": "model_limit", "model_limit_tokens": limit},
        )
    if tokens not in {reading.at for series in result.capacity for reading in series.measured}:
        yield Fact(
            "not known",
            f"the pool of a server started with max_model_len {tokens}: no server of this run had it; "
            "`+sweep=kv` with that length measures it",
            {"what": "pool_at_length", "tokens": tokens},
        )
    if concurrency is not None and most is not None and concurrency > most:
        yield Fact(
            "arithmetic",
            f"max_num_seqs {most} of that server lets no more than so many run at once",
            {"what": "max_num_seqs", "max_num_seqs": most},
        )


def _latencies(run: Run, sample: RunPoint, seen: str, tokens: int, concurrency: int) -> Iterator[Fact]:
    base = [getattr(sample, column) for column in BASE]
    curves = [
        curve
        for purpose in LOADS
        for curve in load_curves(run.tables.points, purpose)
        if curve.levels and [getattr(curve.series.sample, column) for column in BASE] == base
    ]
    yield from (_latency(curve, seen, concurrency) for curve in curves)
    full = [
        c for c in curves if c.series.sample.purpose == "near_full_context" and c.series.sample.max_model_len == tokens
    ]
    if not any(reading.at == concurrency for curve in full for reading in curve.levels):
        yield Fact(
            "not known",
            f"latency and tok/s of {concurrency:,} requests that fill {tokens:,} tokens: no level of this run had them;"
            f" `+sweep=capacity server.max_model_len={tokens}` measures near-full contexts",
            {"what": "latency_at_length", "tokens": tokens, "concurrency": concurrency},
        )


def _latency(curve: LoadCurve, seen: str, concurrency: int) -> Fact:
    point = curve.series.sample
    what = f"{point.purpose}, {load_words(point)}, max_model_len {point.max_model_len}"
    about: dict[str, Any] = {"what": "level", "load": what, "concurrency": concurrency}
    reading = next((reading for reading in curve.levels if reading.at == concurrency), None)
    if reading is None:
        levels = _listed([int(reading.at) for reading in curve.levels])
        return Fact("not known", f"latency at concurrency {concurrency:,} ({what}): its levels are {levels}", about)
    found = {column: reading.median(column) for column in ("tok_s", "p95_e2e_s", "p95_ttft_s", "p95_tpot_s")}
    words = [f"{name} {significant_text(value)}" for name, value in found.items() if value is not None]
    return Fact(seen, f"at concurrency {concurrency:,} ({what}): {', '.join(words)}", about | found)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
