"""What the rows of a level show of its limit: from a curve to the `Signs` that `verdicts` judges. Pure."""

from __future__ import annotations

import math
from dataclasses import replace

from analysis.load.knee import WITHIN_PEAK, KneeVerdict
from analysis.load.load_curve import LoadCurve, level_of
from analysis.load.verdicts import Signs
from analysis.numbers.intervals import CONFIDENCE, mean_log, pooled_noise
from analysis.rows.disturbances import with_others
from analysis.rows.series import Reading
from analysis.rows.tables import RunPoint
from contract.rows import CLIENT_LIMITED


def signs(curve: LoadCurve, reading: Reading, request_share: float | None) -> Signs:
    """Return what the rows of a level show, the highest of its repeats; `request_share` as `kv_signs` takes it."""
    return replace(
        kv_signs(reading, curve.request_tokens, curve.series.sample.max_num_seqs, request_share),
        measured=reading in curve.levels,
        client_limited=any(point.status == CLIENT_LIMITED for point in reading.unmeasured),
        slowed_by_neighbour=_slowed(curve, reading),
        flat=_flat(curve, reading),
    )


def kv_signs(reading: Reading, tokens: float, max_num_seqs: int | None, request_share: float | None) -> Signs:
    """Return what the rows of a level show of the KV pool and the queue, the highest of its repeats.

    Args:
        reading: the level.
        tokens: of a request, prompt and answer.
        max_num_seqs: None where it was left to vLLM.
        request_share: of the pool, 0 to 1, that a request needs at its full length by arithmetic. None where that is
            not known: then by the engine's count of tokens, which takes every sequence at its largest.
    """
    waiting, pool = reading.highest("waiting_capacity_max"), reading.median("engine_kv_tokens")
    by_the_engine = tokens / pool if pool and tokens else None
    return Signs(
        concurrency=int(reading.at),
        preemptions=reading.highest("preemptions"),
        waiting=reading.highest("waiting_max") if waiting is None else waiting,
        running=reading.highest("running_max"),
        kv_usage=reading.highest("kv_usage_max"),
        request_share=by_the_engine if request_share is None else request_share,
        max_num_seqs=max_num_seqs,
    )


def _flat(curve: LoadCurve, reading: Reading) -> bool | None:
    """Whether a level is at the knee or past it: beyond noise, or None.

    A process of others on the card of one level bends the whole curve, its knee with it. What is left is that a level
    without one is passed by a higher level, for company only takes away from that.
    """
    if curve.beside_others:
        return False if not with_others(reading.measured) and _clearly_below(curve, reading) else None
    knee = curve.knee
    if reading not in curve.levels or knee.verdict is KneeVerdict.UNDECIDED:
        below = bool(knee.if_any) and reading.at < knee.if_any[0]
        return False if below or _clearly_below(curve, reading) else None
    if knee.verdict is KneeVerdict.NO_KNEE_YET or reading.at < knee.could_be[0]:
        return False
    return True if reading.at >= knee.could_be[-1] else None


def _clearly_below(curve: LoadCurve, reading: Reading) -> bool:
    """Whether some higher level gives so much more tok/s, beyond noise, that this one lies out of a knee's band."""
    here, noise = level_of(reading), curve.tok_s_noise
    if here is None or noise is None:
        return False
    needed = -math.log(1 - WITHIN_PEAK)
    return any(
        mean_log(other.tok_s) - mean_log(here.tok_s)
        > needed + noise.margin(1 / other.repeats + 1 / here.repeats, 1 - CONFIDENCE)
        for other in curve.repeats
        if other.at > here.at
    )


def _slowed(curve: LoadCurve, reading: Reading) -> bool | None:
    """Needs repeats with and without a co-running session at the level, and repeats of one kind at some level.

    At one-sided `CONFIDENCE` for all levels of the curve together (Bonferroni). None where all repeats of one kind came
    before those of the other, and the session's anchor drifted by as much meanwhile, or where processes of others were
    on the card: then either could be the cause.
    """
    alone, beside = by_company(reading)
    if not beside:
        return False
    if with_others(reading.measured):
        return None
    kinds = [by_company(other) for other in curve.levels]
    noise = pooled_noise(values for kind in kinds for values in kind)
    if not alone or noise is None:
        return None
    judged = sum(all(kind) for kind in kinds) or 1
    margin = noise.margin(1 / len(alone) + 1 / len(beside), (1 - CONFIDENCE) / judged)
    slower = mean_log(alone) - mean_log(beside)
    if slower <= margin:
        return False
    drift = max((abs(drift) for drift in reading.values("anchor_drift")), default=0.0)
    return None if _one_after_the_other(reading) and math.expm1(slower) <= drift else True


def _one_after_the_other(reading: Reading) -> bool:
    """Whether the repeats alone and those beside others do not alternate in time; needs some of both."""
    alone, beside = ([point.started_at for point in points] for points in _points_by_company(reading))
    return max(alone) < min(beside) or max(beside) < min(alone)


def by_company(reading: Reading) -> tuple[list[float], list[float]]:
    """Return tok/s of the repeats alone on the host, and of those beside another session."""
    alone, beside = ([point.tok_s for point in points if point.tok_s] for points in _points_by_company(reading))
    return alone, beside


def _points_by_company(reading: Reading) -> tuple[list[RunPoint], list[RunPoint]]:
    with_figure = [point for point in reading.measured if point.tok_s]
    alone = [point for point in with_figure if not point.co_running_sessions]
    return alone, [point for point in with_figure if point.co_running_sessions]
