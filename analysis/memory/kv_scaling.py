"""kv_cache_scaling.csv (pool sized to the length) and kv_capacity.csv (fixed utilization).

`_mb` in the tutorial's column names is MiB (2**20 bytes), as nvidia-smi prints it. Memory stands in whole MiB, with one
decimal for the CPU backend, whose models are small; differences and bytes per token come from unrounded bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from analysis.memory.kv_fit import Committed, Interval, KvResult, block_bytes, is_one_curve, page_sharing, pool_bytes
from analysis.memory.kv_too_long import estimate_figure, estimated_max_model_len
from analysis.rows.caveats import marks
from analysis.rows.disturbances import foreign_process_notes
from analysis.rows.series import Reading, Series, outcome_figure, point_name
from analysis.rows.tables import RunPoint
from analysis.writing.document import Part, Phrase, join, phrase
from analysis.writing.figures import GIB, MESSAGE_LENGTH, MIB, count, mib, plain, quote, signed_percent
from analysis.writing.files import write_csv
from contract.rows import MEMORY_LEFT_BYTES

SCALING_COLUMNS = ("max_model_len", "gpu_mem_used_mb", "delta_mb_from_prev", "bytes_per_token_est", "notes")
CAPACITY_COLUMNS = (
    "max_model_len",
    "gpu_memory_utilization",
    "kv_tokens",
    "max_concurrency",
    "gpu_mem_used_mb",
    "kv_gib",
    "kv_bytes_per_token",
    "formula_max_concurrency",
    "engine_estimated_max_model_len",
    "notes",
)
BASELINE_SHARE = 0.01
"""Memory in use before the server started is mentioned above this share of what the server then showed, or of the
cards where it did not start."""


def write_scaling(run_dir: Path, results: Sequence[KvResult]) -> list[Path]:
    """Write one file per committed series; the first owns the plain name."""
    return [
        write_csv(
            run_dir / committed.series.group.file("kv_cache_scaling", ".csv"),
            SCALING_COLUMNS,
            [_scaling_row(committed, reading) for reading in committed.series.readings],
        )
        for result in results
        for committed in result.committed
    ]


def write_capacity(run_dir: Path, results: Sequence[KvResult]) -> list[Path]:
    """Write one file per model and kind of card that has utilization rows; the first owns the plain name."""
    paths = []
    for number, result in enumerate(result for result in results if result.capacity):
        rows = [_capacity_row(series, reading) for series in result.capacity for reading in series.readings]
        paths.append(write_csv(run_dir / f"{result.file_stem('kv_capacity', number)}.csv", CAPACITY_COLUMNS, rows))
    return paths


def digits(point: RunPoint) -> int:
    """Return the decimals that MiB carry: one for the CPU backend, none elsewhere."""
    return 1 if point.device == "cpu" else 0


def interval_to(committed: Committed, reading: Reading, column: str = "mem_ready_bytes") -> Interval | None:
    """Return the interval that ends at this reading; None for the first one and for one without memory."""
    return next((i for i in committed.intervals(column) if i.longer is reading), None)


def scaling_notes(committed: Committed, reading: Reading) -> Phrase:
    """Return what must be known about one length of a committed pool, without what holds for the whole table."""
    notes: list[Part] = []
    interval = interval_to(committed, reading)
    places = [other.at for other in committed.series.readings]
    if interval and places.index(reading.at) - places.index(interval.shorter.at) > 1:
        notes.append(
            phrase(
                "difference from {length}", length=plain(f"{interval.shorter.name}.max_model_len", interval.shorter.at)
            )
        )
    if interval and interval.is_step and interval.departure_bytes is not None and interval.expected_bytes:
        share = signed_percent(f"{reading.name}.departure_pct", interval.departure_bytes / interval.expected_bytes)
        notes.append(phrase("step: {share} against the formula's difference", share=share))
    return join([*notes, *series_notes(committed.series, reading)])


def series_notes(series: Series, reading: Reading) -> list[Part]:
    """Return `reading_notes`, and how its server was started where that keeps it from being held against others."""
    notes = reading_notes(reading)
    if not is_one_curve(series) and reading.measured:
        ways = " and ".join(sorted(page_sharing(reading.measured)))
        notes.append(phrase(f"started {ways}: not to be held against memory of servers that share pages otherwise"))
    return notes


def reading_notes(reading: Reading) -> list[Part]:
    """Return repeats, failures and what was odd about one reading of either mode."""
    notes: list[Part] = []
    if len(reading.measured) > 1:
        notes.append(phrase("median of {n}", n=count(f"{reading.name}.repeats", len(reading.measured))))
    longest = estimated_max_model_len(reading)
    if longest is not None:
        fits = estimate_figure(reading, longest)
        notes.append(phrase("the longest that fits by the engine's estimate: {longest} tokens", longest=fits))
    seen: set[str] = set()
    for point in reading.unmeasured:
        outcome = outcome_figure(point)
        if outcome.text not in seen:
            notes.append(outcome)
            seen.add(outcome.text)
        if point.status == "kv_too_small" and point.failure_message:
            words = quote(f"{point_name(point)}.message", point.failure_message, MESSAGE_LENGTH)
            notes.append(phrase("the engine said: {words}", words=words))
    if any(point.warmup_reached_batch is False for point in reading.measured):
        notes.append(phrase("the warm-up load did not fill a step, so the loaded reading may be low"))
    before = used_before_bytes(reading)
    if before is not None:
        size = mib(f"{reading.name}.mem_baseline_mib", before)
        notes.append(phrase("{size} MiB were in use before the start", size=size))
    notes += foreign_process_notes(reading)
    return [*notes, *after_stop_notes(reading)]


def after_stop_notes(reading: Reading) -> list[Part]:
    """Return by how much the cards stayed above the baseline after a stop, and whose that was; of each kind the most.

    The next server on the same cards then starts above the baseline, so its reading is not to be trusted as it is.
    """
    left = [point for point in (*reading.measured, *reading.unmeasured) if (point.memory_left_bytes or 0) > 0]
    kept = _most("memory_left", reading, [point.memory_kept_bytes for point in left])
    others = _most("left_to_others", reading, [point.mem_left_to_others_bytes for point in left])
    untold = _most(
        "left_untold", reading, [point.memory_left_bytes for point in left if point.memory_kept_bytes is None]
    )
    notes: list[Part] = []
    if kept is not None:
        notes.append(phrase("memory did not come back after the stop: {size} MiB above the baseline", size=kept))
    if others is not None:
        notes.append(phrase("after the stop others held {size} MiB more of the cards than before it", size=others))
    if untold is not None:
        words = "{size} MiB above the baseline stayed in use after the stop: its own or another's, nobody could tell"
        notes.append(phrase(words, size=untold))
    return notes


def _most(name: str, reading: Reading, sizes: Iterable[int | None]) -> Part | None:
    most = max((size for size in sizes if size is not None and size > MEMORY_LEFT_BYTES), default=None)
    return None if most is None else mib(f"{reading.name}.{name}_mib", most)


def used_before_bytes(reading: Reading) -> float | None:
    """Return what was in use on the cards before the server started, where that is worth a word; never of the CPU.

    Without a measured repeat: the most that one of the others found, held against the memory of the cards.
    """
    if reading.measured:
        baseline, whole = reading.median("mem_baseline_bytes"), reading.median("mem_ready_bytes")
    else:
        baseline = max((p.mem_baseline_bytes for p in reading.unmeasured if p.mem_baseline_bytes), default=None)
        whole = max(
            (p.device_memory_bytes * max(p.gpus, 1) for p in reading.unmeasured if p.device_memory_bytes), default=None
        )
    if (reading.measured + reading.unmeasured)[0].device == "cpu" or not baseline or not whole:
        return None
    return baseline if baseline > BASELINE_SHARE * whole else None


def common_notes(point: RunPoint, sequences: int | None = None) -> str:
    """Return what holds for every row of a table: it stands in each CSV row, which may be read alone."""
    words = [f"model {point.model}", *marks(point)]
    if sequences is not None:
        words.append(f"pool of {sequences} full-length sequences (the divisor of bytes_per_token_est)")
    elif point.mode == "committed":
        words.append("sequences of the pool unknown, so no bytes_per_token_est")
    if point.device == "cpu":
        words.append("CPU backend: PSS of the server's process tree, no GPU")
    if point.gpus > 1:
        words.append(f"sum over {point.gpus} GPUs")
    return "; ".join(words)


def _scaling_row(committed: Committed, reading: Reading) -> list[str]:
    sample = committed.series.sample
    interval = interval_to(committed, reading)
    places = digits(sample)
    estimate = interval.bytes_per_token if interval else None
    notes = scaling_notes(committed, reading).plain
    return [
        str(reading.at),
        _scaled(reading.median("mem_ready_bytes"), MIB, places),
        _scaled(interval.delta_bytes if interval else None, MIB, places),
        "" if estimate is None else f"{estimate:.0f}",
        "; ".join(filter(None, [common_notes(sample, committed.sequences), notes])),
    ]


def _capacity_row(series: Series, reading: Reading) -> list[str]:
    sample = series.sample
    notes = join(series_notes(series, reading)).plain
    utilization = sample.gpu_memory_utilization
    pool = pool_bytes(reading)
    return [
        str(reading.at),
        "" if utilization is None else f"{utilization:g}",
        _scaled(reading.median("engine_kv_tokens"), 1, 0),
        _scaled(reading.median("engine_max_concurrency"), 1, 2),
        _scaled(reading.median("mem_ready_bytes"), MIB, digits(sample)),
        _scaled(pool, GIB, 3),
        _scaled(reading.median("engine_bytes_per_token"), 1, 0),
        _scaled(reading.median("formula_max_concurrency"), 1, 2),
        _scaled(estimated_max_model_len(reading), 1, 0),
        "; ".join(filter(None, [common_notes(sample), notes])),
    ]


def _scaled(value: float | None, unit: int, places: int) -> str:
    return "" if value is None else f"{value / unit:.{places}f}"


def block_figures(reading: Reading) -> Phrase | None:
    """Return the size of a KV block in tokens and MiB; None where the engine did not say."""
    size, tokens = block_bytes(reading), reading.median("engine_block_size")
    if size is None or tokens is None:
        return None
    return phrase(
        "{tokens} tokens ({size} MiB over all ranks)",
        tokens=count(f"{reading.name}.engine_block_size", tokens),
        size=mib(f"{reading.name}.block_mib", size, 3),
    )
