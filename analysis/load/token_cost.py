"""What a token costs: energy from the cards' counters, money from the price of a GPU-hour. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from analysis.numbers.statistics import median
from analysis.rows.series import Reading
from analysis.rows.tables import RunPoint

TOKENS_PRICED = 10**6
_HOUR_S = 3600


@dataclass(frozen=True, slots=True)
class Price:
    """Of a million tokens, in the currency of `cost.gpu_hour`; all cards of the server are paid for, busy or not."""

    output: float
    """Of a million output tokens, prompts not charged."""
    total: float | None
    """Of a million tokens, prompts and answers alike."""


def price_per_million(reading: Reading, gpu_hour: float | None) -> Price | None:
    """Return gpu_hour * GPUs / 3600 / (tokens a second) * 10**6 at a level; None without a price, a GPU or tok/s."""
    tok_s, total_tok_s, gpus = reading.median("tok_s"), reading.median("total_tok_s"), reading.measured[0].gpus
    if not gpu_hour or not gpus or not tok_s:
        return None
    a_second = gpu_hour * gpus / _HOUR_S
    total = a_second / total_tok_s * TOKENS_PRICED if total_tok_s else None
    return Price(a_second / tok_s * TOKENS_PRICED, total)


def joules_per_output_token(reading: Reading) -> float | None:
    """Return the energy of all cards over the whole window, prompts included, for each output token of a success.

    The median of the repeats' own ratios; None where no counter was read.
    """
    return median_of(reading, _joules)


def power_w(point: RunPoint) -> float | None:
    """Return the mean watts of all cards over the window: from their energy counters, where they were read.

    NVML's own watts are averages over the second before each sample: of a short window they hold what was before it.
    """
    if point.energy_j is not None and point.duration_s:
        return point.energy_j / point.duration_s
    return point.power_w


def power_share(point: RunPoint) -> float | None:
    """Return the share of what the cards may draw together that they drew, by `power_w`."""
    watts = power_w(point)
    return watts / point.power_limit_w if watts is not None and point.power_limit_w else None


def median_of(reading: Reading, ratio: Callable[[RunPoint], float | None]) -> float | None:
    """Return the median over the repeats of each one's own ratio."""
    values = [value for point in reading.measured if (value := ratio(point)) is not None]
    return median(values) if values else None


def _joules(point: RunPoint) -> float | None:
    tokens = (point.tok_s or 0.0) * (point.duration_s or 0.0)
    return point.energy_j / tokens if point.energy_j is not None and tokens else None
