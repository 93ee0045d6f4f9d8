"""Differences between runs as rows: the same numbers for the terminal and for `--json`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from analysis.comparing.differences import LOAD_METRICS, Difference, Verdict
from analysis.comparing.matching import Family, Missing, Pair, setting_words
from analysis.comparing.runs import Run
from analysis.rows.caveats import lengths_words, title
from analysis.rows.disturbances import one_for_each, with_others
from analysis.rows.series import Series
from analysis.rows.tables import RunPoint
from analysis.writing.figures import MIB, NOTHING, clean, significant_text
from analysis.writing.terminal import plain_table

COLUMNS = ("metric", "run", "repeats", "value", "difference", "interval", "more than noise")


def what_differs(base: Run, other: Run, found: Sequence[Pair]) -> list[dict[str, str]]:
    """Return in what model, server, card, software and company on the card the compared series differ, each once."""
    points = [point for pair in found for point in pair.base.group.points]
    others = [point for pair in found for point in pair.other.group.points]
    ours, theirs = base.versions(points), other.versions(others)
    listed = [(c, setting_words(a), setting_words(b)) for pair in found for c, a, b in pair.reconfigured]
    listed += [(name, ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]]
    if with_others([*points, *others]):
        listed.append(("processes of others on the cards", _company(points), _company(others)))
    return [
        {"run": other.name, "what": what, "base": clean(a) or "not known", "other": clean(b) or "not known"}
        for what, a, b in dict.fromkeys(listed)
    ]


def _company(points: Sequence[RunPoint]) -> str:
    """Who was on the cards beside these points, and at how many of them; nothing where no row can tell."""
    met = with_others(points)
    if not met:
        return "" if all(point.foreign_processes is None for point in points) else "none seen"
    seen = list(one_for_each(words for point in met for words in point.foreign_processes or ()).values())
    more = f" and {len(seen) - 1} more" if len(seen) > 1 else ""
    return f"{seen[0]}{more}, at {len(met)} of {len(points)} points"


def differing_words(differing: Sequence[dict[str, str]], base: Run, other: Run) -> str:
    """Return `what_differs` as a sentence."""
    words = ", ".join(f"{d['what']} {d['base']} → {d['other']}" for d in differing)
    same = "in nothing that the runs tell (model, server, card, driver, versions, processes of others)"
    return f"{other.name} differs from {base.name}: {words or same}"


def as_row(difference: Difference, base: Run, other: Run) -> dict[str, Any]:
    """Return a difference as it stands in `--json`."""
    sample, axis = difference.pair.base.sample, difference.pair.family.axis
    return {
        "purpose": sample.purpose, "model": clean(sample.model), "simulated": sample.simulated,
        "dummy_weights": sample.dummy_weights, "load": load_words(sample), axis: difference.at,
        "metric": difference.metric.column, "base": base.name, "other": other.name,
        "base_value": difference.base, "other_value": difference.other,
        "base_repeats": difference.base_repeats, "other_repeats": difference.other_repeats,
        "change_pct": 100 * difference.change, "low_pct": _pct(difference.low), "high_pct": _pct(difference.high),
        "verdict": difference.verdict.value, "why": difference.why,
    }  # fmt: skip


def missing_rows(missing: Sequence[Missing], base: Run, other: Run) -> list[dict[str, Any]]:
    """Return the levels that `other` has no measurement of as they stand in `--json`."""
    return [
        {
            "purpose": level.series.sample.purpose, "model": clean(level.series.sample.model),
            "simulated": level.series.sample.simulated, "load": load_words(level.series.sample),
            level.family.axis: level.at, "base": base.name, "other": other.name, "failed": level.failed,
            "why": clean(level.why),
        }
        for level in missing
    ]  # fmt: skip


def missing_words(missing: Sequence[Missing], base: Run, other: Run) -> list[str]:
    """Return a line for each series of `base` and each thing that became of its levels in `other`."""
    alike: dict[tuple[Family, str, str], list[Missing]] = {}
    for level in missing:
        alike.setdefault((level.family, level.series.name, level.why), []).append(level)
    return [
        f"{other.name} has no measurement of what {base.name} has: {_series_words(levels[0].series)}, "
        f"at {family.axis} {', '.join(f'{level.at:g}' for level in levels)}: {clean(why)}"
        for (family, _, why), levels in alike.items()
    ]


def open_words(differences: Sequence[Difference]) -> list[str]:
    """Return a line for each series of which levels of load have no verdict, and why."""
    metrics: dict[tuple[Family, str, str, float], list[Difference]] = {}
    for difference in differences:
        if difference.verdict is Verdict.UNKNOWN and difference.metric in LOAD_METRICS:
            key = (difference.pair.family, difference.pair.base.name, difference.why, difference.at)
            metrics.setdefault(key, []).append(difference)
    alike: dict[tuple[Family, str, str, str], list[Difference]] = {}
    for (family, name, why, _), some in metrics.items():
        alike.setdefault((family, name, why, ", ".join(d.metric.column for d in some)), []).append(some[0])
    return [
        f"Not known whether more than noise: {columns} of {_series_words(some[0].pair.base)}, "
        f"at {family.axis} {', '.join(f'{d.at:g}' for d in some)}: {why}"
        for (family, _, why, columns), some in alike.items()
    ]


def _series_words(series: Series) -> str:
    sample = series.sample
    return clean(f"{title(sample, series.group.label)}: {sample.purpose}, {load_words(sample)}")


def load_words(point: RunPoint) -> str:
    """Return a series' load or, for memory, the mode of its pool."""
    if point.kind == "memory":
        return f"memory, {point.mode}"
    return ", ".join(clean(words) for words in (lengths_words(point), point.shared_prefix, point.arrivals) if words)


def tables(rows: Iterable[tuple[Difference, dict[str, Any]]]) -> str:
    """Return one table a series of the first run: a line for its value and one for each other run."""
    blocks: dict[tuple[Family, str], dict[tuple[float, str], list[dict[str, Any]]]] = {}
    titles: dict[tuple[Family, str], str] = {}
    for difference, row in rows:
        series = difference.pair.base
        key = (difference.pair.family, series.name)
        titles[key] = _series_words(series)
        blocks.setdefault(key, {}).setdefault((difference.at, row["metric"]), []).append(row)
    return "\n\n".join(f"{titles[key]}\n{_table(key[0].axis, block)}" for key, block in blocks.items())


def _table(axis: str, block: dict[tuple[float, str], list[dict[str, Any]]]) -> str:
    lines = []
    for (at, metric), rows in block.items():
        first = rows[0]
        lines.append(
            [f"{at:g}", metric, first["base"], str(first["base_repeats"]), _value(metric, first["base_value"])]
        )
        lines[-1] += [NOTHING] * 3
        for row in rows:
            cells = [
                row["other"],
                str(row["other_repeats"]),
                _value(metric, row["other_value"]),
                signed(row["change_pct"]),
            ]
            lines.append(["", "", *cells, _interval(row), _verdict(row)])
    return plain_table((axis, *COLUMNS), lines, left=3)


def signed(percent: float | None) -> str:
    """Return a percentage with its sign; a dash for None."""
    return NOTHING if percent is None else f"{percent:+.1f} %"


def _interval(row: dict[str, Any]) -> str:
    return NOTHING if row["low_pct"] is None else f"{signed(row['low_pct'])} to {signed(row['high_pct'])}"


def _verdict(row: dict[str, Any]) -> str:
    words = {"within noise": "no", "better": "yes, better", "worse": "yes, worse"}.get(row["verdict"], row["verdict"])
    return f"{words}: {row['why']}" if row["why"] else words


def _value(metric: str, value: float) -> str:
    return f"{value / MIB:,.0f} MiB" if metric.endswith("_bytes") else significant_text(value, 4)


def _pct(share: float | None) -> float | None:
    return None if share is None else 100 * share
