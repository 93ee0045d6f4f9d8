"""What the server's own histograms say of a level's requests, as a table beside the client's figures."""

from __future__ import annotations

from collections.abc import Callable

from analysis.load.load_curve import LoadCurve
from analysis.load.load_tables import cell
from analysis.rows.series import Reading
from analysis.writing.document import Document, Part
from analysis.writing.figures import NOTHING, Figure, significant_text

PHASES = ("queue", "prefill", "decode", "ttft")
COLUMNS = (
    *(f"server_{phase}_{what}" for phase in PHASES for what in ("mean_s", "p95_le_s")),
    "server_steps", "server_step_mean_tokens",
)  # fmt: skip


def add_server_table(doc: Document, curve: LoadCurve, axis: str, place: Callable[[Reading], Part]) -> None:
    """Write the table, where the server had such metrics at any level; `axis` names its first column."""
    readings = [r for r in curve.series.readings if any(r.median(column) is not None for column in COLUMNS)]
    if not readings:
        return
    doc.say(
        "By the server's own metrics over the same window: means of the requests' time from arrival to their first "
        "scheduling (queue), to their first token (prefill) and to their last (decode), and of the front end's TTFT, "
        "and the bound of the histogram's bucket that p95 does not exceed, of the repeats the highest (inf: its last "
        "bucket has none); engine steps that gave any request a token, and the mean of their tokens."
    )
    doc.table(
        [axis, *COLUMNS],
        [[place(r), *(_cell(r, column) for column in COLUMNS)] for r in readings],
        curve.series.sample.simulated,
    )


def _cell(reading: Reading, column: str) -> Figure:
    """A bound is one that the histogram has: half way between two there is none."""
    if not column.endswith("_p95_le_s"):
        return cell(reading, column, 4)
    bound = reading.highest(column)
    return Figure(f"{reading.name}.{column}", bound, NOTHING if bound is None else significant_text(bound, 4))
