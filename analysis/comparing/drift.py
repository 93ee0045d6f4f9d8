"""`python -m analysis drift BASELINE RUN`: whether a run is worse than a baseline, for CI."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.comparing.difference_rows import (
    as_row,
    differing_words,
    missing_rows,
    missing_words,
    open_words,
    tables,
    what_differs,
)
from analysis.comparing.differences import LOAD_METRICS, STARTS_APART, Difference, Verdict, differences
from analysis.comparing.matching import Matched, Missing, matched, nothing_in_common
from analysis.comparing.runs import Run, open_runs
from analysis.errors import AnalysisError
from analysis.load.checks import BETWEEN_STARTS
from analysis.numbers.intervals import CONFIDENCE
from analysis.rows.caveats import silent_sessions

THRESHOLD = BETWEEN_STARTS
"""Less is not called drift."""


@dataclass(frozen=True, slots=True)
class Drift:
    """A run against its baseline."""

    baseline: Run
    run: Run
    threshold: float
    matched: Matched
    differences: list[Difference]

    @property
    def worse(self) -> bool:
        """Whether anything drifted, or a level of the baseline failed."""
        return bool(self.drifted or self.failed)

    @property
    def drifted(self) -> list[Difference]:
        """Differences that are worse by the threshold or more, and by more than noise."""
        return self._past(Verdict.WORSE)

    @property
    def failed(self) -> list[Missing]:
        """Levels that the baseline measured and the run tried in vain."""
        return [level for level in self.matched.missing if level.failed]

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        drifted = {id(difference) for difference in self.drifted}
        return {
            "baseline": self.baseline.name,
            "run": self.run.name,
            "threshold_pct": 100 * self.threshold,
            "confidence_of_all_together": CONFIDENCE,
            "drifted": self.worse,
            "differs": what_differs(self.baseline, self.run, self.matched.pairs),
            "points": [as_row(d, self.baseline, self.run) | {"drifted": id(d) in drifted} for d in self.differences],
            "missing": missing_rows(self.matched.missing, self.baseline, self.run),
        }

    def text(self) -> str:
        """Return what the terminal shows: what is missing, the verdict, what differs, what is past the threshold."""
        verdicts = Counter(difference.verdict for difference in self.differences)
        better = self._past(Verdict.BETTER)
        open_ones = [*self._past(Verdict.NOISE), *self._past(Verdict.UNKNOWN)]
        shown = [*self.drifted, *better, *open_ones]
        lines = [
            *self._missing_words(),
            f"{len(self.drifted)} of {len(self.differences)} differences drifted: worse by {100 * self.threshold:g} %"
            f" or more, and by more than noise ({100 * CONFIDENCE:g} % for all of them together).",
            f"Better by as much: {len(better)}. By as much, yet within noise or not known: {len(open_ones)}. "
            f"Not known: {verdicts[Verdict.UNKNOWN]}.",
            *open_words(self.differences),
            *self._differing_words(),
        ]
        blocks = ["\n".join(lines)]
        if shown:
            blocks.append(tables([(d, as_row(d, self.baseline, self.run)) for d in shown]))
        return "\n\n".join(blocks)

    def _missing_words(self) -> list[str]:
        missing = self.matched.missing
        if not missing:
            return []
        return [
            f"Levels of {self.baseline.name} that were tried and failed, which is drift: {len(self.failed)}. Not "
            f"measured for another reason: {len(missing) - len(self.failed)}.",
            *missing_words(missing, self.baseline, self.run),
        ]

    def _differing_words(self) -> list[str]:
        pairs = self.matched.pairs
        return [differing_words(what_differs(self.baseline, self.run, pairs), self.baseline, self.run)] if pairs else []

    def _past(self, verdict: Verdict) -> list[Difference]:
        return [d for d in self.differences if d.verdict is verdict and abs(d.change) >= self.threshold]


def drift(baseline: Path, run: Path, threshold: float = THRESHOLD) -> Drift:
    """Hold a run against its baseline. Raises `AnalysisError` where one cannot be read, or as `drift_of` does."""
    before, after = open_runs([baseline, run])
    return drift_of(before, after, threshold)


def drift_of(before: Run, after: Run, threshold: float = THRESHOLD) -> Drift:
    """Hold a run against its baseline, at points of the same model, server and load.

    Raises:
        AnalysisError: they cannot be compared; or nothing drifted or failed, and either the run was not measured to its
            end and lacks levels, or no difference can be told from noise (of runs that hold load, none of load: memory
            alone says nothing of speed).
    """
    both = matched(before, after, same_server=True)
    compared = differences(both.pairs, together=True)
    made = Drift(before, after, threshold, both, compared)
    unfinished = _unfinished(after)
    without = [level for level in both.missing if not level.rows]
    if not made.worse and unfinished and without:
        raise AnalysisError(
            f"{after.name} is not whole: {unfinished}, and of {len(without)} levels that {before.name} has it holds no "
            "row (`resume=RUN` measures what it was asked for)"
        )
    if not both.pairs and not made.failed:
        raise nothing_in_common(before, after, same_server=True)
    if not made.worse and not compared:
        raise AnalysisError(f"{before.name} and {after.name} have points in common, and no figure of them")
    load = [difference for difference in compared if difference.metric in LOAD_METRICS]
    if not made.worse and all(difference.verdict is Verdict.UNKNOWN for difference in load or compared):
        what = "difference of load" if load else "difference"
        why = "no level of both has a second repeat (sweep.repeats=3 measures some)"
        if not load:
            why = "memory is " + compared[0].why
        elif any(difference.why == STARTS_APART for difference in load):
            why = f"{STARTS_APART} (measure both with the same server.start)"
        raise AnalysisError(
            f"{before.name} and {after.name}: whether any {what} is more than noise is not known: {why}"
        )
    return made


def _unfinished(run: Run) -> str:
    """Return how a run is known not to have been measured to its end; nothing where that is not known."""
    if run.tables.unfinished is not None:
        return f"its manifest says {run.tables.unfinished.status}"
    silent = silent_sessions(run.tables)
    return f"{silent} of its sessions left no row" if silent else ""
