"""What few requests leave unused of a card: NVML's utilization beside power, energy and tok/s of every level.

A section of batching_benchmark.md. NVML says in which share of time any kernel ran, and small batches keep that high.
"""

from __future__ import annotations

from collections.abc import Sequence

from analysis.load.load_curve import LoadCurve, knee_curves
from analysis.load.load_tables import cell
from analysis.load.strangers import resting_on
from analysis.load.token_cost import joules_per_output_token, median_of, power_share, power_w
from analysis.rows.caveats import identity
from analysis.rows.series import Reading, concurrency_figure
from analysis.rows.tables import RunPoint
from analysis.rows.watching import add_watching
from analysis.writing.document import Document, Part, Phrase, join, phrase
from analysis.writing.figures import Figure, decimal, percent, significant

HALF = 0.5
"""Below this share of time NVML's utilization is called low; below this share of the best tok/s a level is far off."""
TUTORIAL_CONCURRENCY = 2
TUTORIAL_UTILIZATION = (0.25, 0.30)
"""What the tutorial expects a GPU's utilization to be up to that concurrency (its Q8)."""
COLUMNS = (
    "concurrency",
    "gpu_util_pct",
    "power_w",
    "of the power limit",
    "tok_s",
    "of the best tok_s",
    "J per output token",
)


def add_under_use(doc: Document, rows: Sequence[RunPoint]) -> None:
    """Write the section: a table and a sentence for every curve on real cards, and what watching them cost."""
    doc.heading(2, "GPU utilization, power and what is left unused")
    real = [point for point in rows if not point.simulated and point.device != "cpu"]
    if not any(observed(point) for point in real):
        doc.say("Not observed: " + _why_not(rows, real))
        return
    curves = [curve for curve in knee_curves(rows) if any(map(observed, curve.series.group.points))]
    if curves:
        doc.say(
            "gpu_util_pct is the mean of the cards, power_w their sum: the energy of all cards over the whole window, "
            "by their counters, over its length; without counters NVML's watts, which trail. J per output token is "
            "that energy, prompts included, for each output token of a successful request. A level is the median of "
            "its repeats."
        )
    told = [_curve(doc, curve) for curve in curves]
    utilization = [point.gpu_util_pct for point in real if point.gpu_util_pct is not None]
    if utilization and not any(told):
        doc.say(
            "Over the measured windows NVML's utilization was between {low} and {high} %. It is the share of time in "
            "which any kernel ran, not how full the card was: read it beside tok_s.",
            low=decimal("load.gpu_util_lowest_pct", min(utilization), 1),
            high=decimal("load.gpu_util_highest_pct", max(utilization), 1),
        )
    add_watching(doc, real, "load")


def observed(point: RunPoint) -> bool:
    return not point.simulated and (point.gpu_util_pct is not None or power_w(point) is not None)


def _why_not(rows: Sequence[RunPoint], real: Sequence[RunPoint]) -> str:
    if all(point.simulated for point in rows):
        return "the run is simulated, there was no GPU."
    return "no measured window holds a figure of a GPU." if real else "no GPU was used."


def _curve(doc: Document, curve: LoadCurve) -> bool:
    """Write the curve's table and its sentence; return whether there was one to write."""
    doc.heading(3, "{who}", who=identity(curve.series.sample, curve.name, curve.series.group.label))
    doc.table(COLUMNS, [_row(curve, reading) for reading in curve.series.readings])
    words = lowest_level(curve)
    if words is not None:
        doc.say("{words}", words=words)
    for sentence in resting_on(curve.levels):
        doc.say("{sentence}", sentence=sentence)
    return words is not None


def _row(curve: LoadCurve, reading: Reading) -> list[Part]:
    return [
        concurrency_figure(reading),
        _utilization(reading),
        _power(reading),
        _power_share(reading),
        cell(reading, "tok_s", 4),
        _best_share(curve, reading),
        joules_figure(reading),
    ]


def lowest_level(curve: LoadCurve) -> Phrase | None:
    """Return what the lowest level leaves unused; needs two levels, and utilization and power of the lowest."""
    if len(curve.levels) < 2:
        return None
    lowest, best = curve.levels[0], curve.best
    assert best is not None
    utilization, share = lowest.median("gpu_util_pct"), curve.ratio(lowest, best, "tok_s")
    if utilization is None or share is None or median_of(lowest, power_w) is None:
        return None
    low, far = utilization < 100 * HALF, share < HALF
    numbers: dict[str, Part] = {
        "at": concurrency_figure(lowest),
        "busy": _utilization(lowest),
        "share": _best_share(curve, lowest),
    }
    if low:
        head = "is low, {busy} %: most of the time no kernel ran. It reaches {share} of the best throughput."
    elif far:
        head = "is {busy} %, yet it reaches {share} of the best throughput."
    else:
        head = "is {busy} %, and it reaches {share} of the best throughput already."
    sentences = [phrase("At the lowest level, concurrency {at}, NVML's utilization " + head, **numbers)]
    sentences.append(_draws(lowest, best))
    if far and not low:
        sentences.append(_what_nvml_says(lowest))
    return join(sentences, " ")


def _draws(lowest: Reading, best: Reading) -> Phrase:
    if lowest is best or median_of(best, power_w) is None:
        return phrase("It draws {drawn}.", drawn=_drawn(lowest))
    numbers: dict[str, Part] = {"drawn": _drawn(lowest), "best": concurrency_figure(best), "drawn_best": _drawn(best)}
    words = "It draws {drawn}; the best level, concurrency {best}, draws {drawn_best}"
    if any(joules_figure(reading).value is None for reading in (lowest, best)):
        return phrase(words + ".", **numbers)
    return phrase(
        words + ". An output token costs {joules} J at the lowest level and {joules_best} J at the best.",
        joules=joules_figure(lowest),
        joules_best=joules_figure(best),
        **numbers,
    )


def _what_nvml_says(lowest: Reading) -> Phrase:
    words = "NVML's figure is the share of time in which any kernel ran, so "
    if lowest.at > TUTORIAL_CONCURRENCY:
        return phrase(words + "it does not show what is left unused: read tok_s and J per output token.")
    low, high = TUTORIAL_UTILIZATION
    return phrase(
        words + "the tutorial's {low} to {high} is not what it shows here, and it does not show what is left unused: "
        "read tok_s and J per output token.",
        low=percent("rule.tutorial_util_low_pct", low, 0),
        high=percent("rule.tutorial_util_high_pct", high, 0),
    )


def _drawn(reading: Reading) -> Part:
    share = _power_share(reading)
    if share.value is None:
        return phrase("{power} W", power=_power(reading))
    return phrase("{share} of the power limit", share=share)


def _utilization(reading: Reading) -> Figure:
    return decimal(f"{reading.name}.gpu_util_pct", reading.median("gpu_util_pct"), 1)


def _power(reading: Reading) -> Figure:
    return decimal(f"{reading.name}.power_w", median_of(reading, power_w), 0)


def _power_share(reading: Reading) -> Figure:
    return percent(f"{reading.name}.power_share_pct", median_of(reading, power_share))


def _best_share(curve: LoadCurve, reading: Reading) -> Figure:
    share = curve.ratio(reading, curve.best, "tok_s") if curve.best else None
    return percent(f"{reading.name}.best_share_pct", share)


def joules_figure(reading: Reading) -> Figure:
    """Return the energy of an output token at a level as a figure."""
    return significant(f"{reading.name}.joules_per_output_token", joules_per_output_token(reading))
