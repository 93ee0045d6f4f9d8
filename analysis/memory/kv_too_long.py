"""Lengths of which not one sequence fits: the engine's own estimate of the longest that would is then the result."""

from __future__ import annotations

from collections.abc import Iterator

from analysis.memory.kv_fit import KvResult
from analysis.rows.series import Reading, Series
from analysis.writing.document import Part, Phrase, phrase
from analysis.writing.figures import plain, quote


def estimated_max_model_len(reading: Reading) -> int | None:
    """Return the longest length that would have fitted, by the engine, in tokens: of several starts the least."""
    told = (point.engine_estimated_max_model_len for point in reading.unmeasured)
    return min((length for length in told if length is not None), default=None)


def estimate_figure(reading: Reading, longest: int) -> Part:
    """Return `estimated_max_model_len` of a reading as a figure."""
    return plain(f"{reading.name}.engine_estimated_max_model_len", longest)


def too_long(result: KvResult) -> Iterator[Phrase]:
    """Return a sentence for each length that did not fit and of which the engine gave its estimate."""
    for series in result.series:
        for reading in series.readings:
            longest = estimated_max_model_len(reading)
            if longest is not None:
                yield _sentence(series, reading, longest)


def _sentence(series: Series, reading: Reading, longest: int) -> Phrase:
    parts: dict[str, Part] = {
        "length": plain(f"{reading.name}.max_model_len", reading.at),
        "longest": estimate_figure(reading, longest),
    }
    pool = "the pool committed to it"
    if series.sample.mode == "utilization":
        pool = "the pool at gpu_memory_utilization {share}"
        share = f"{series.sample.gpu_memory_utilization or 0:g}"
        parts["share"] = quote(f"{series.name}.gpu_memory_utilization", share)
    return phrase(
        "not one sequence of max_model_len {length} fits " + pool + "; the longest that would, by the engine's own "
        "estimate: {longest} tokens (no server of that length was measured)",
        **parts,
    )
