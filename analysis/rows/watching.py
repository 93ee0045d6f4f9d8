"""How often the cards were sampled while something was measured, and what all the watching took of the host's CPU."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.numbers.statistics import median
from analysis.rows.tables import RunPoint
from analysis.writing.document import Document
from analysis.writing.figures import decimal, percent


def add_watching(doc: Document, points: Sequence[RunPoint], name: str) -> None:
    """Write a sentence over the windows of real cards among `points`; nothing where none of them tells.

    `name` begins the names of its figures.
    """
    real = [point for point in points if not point.simulated and point.device != "cpu"]
    rates = [point.telemetry_hz for point in real if point.telemetry_hz is not None]
    shares = [point.sampling_cpu_share for point in real if point.sampling_cpu_share is not None]
    if rates:
        doc.say(
            "Each card was sampled {rate} times a second (median of the windows; {lowest} in the lowest).",
            rate=decimal(f"{name}.telemetry_hz", median(rates), 1),
            lowest=decimal(f"{name}.telemetry_lowest_hz", min(rates), 1),
        )
    if shares:
        doc.say(
            "All that watches a window (NVML and its list of processes, the server's metrics, the host's CPU) took"
            " at most {cost} of one core.",
            cost=percent(f"{name}.sampling_cpu_pct", max(shares), 2),
        )
