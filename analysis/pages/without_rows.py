"""A page whose rows a run does not hold: short, with what is missing and the sweep that measures it.

So that who looks for one of the tutorial's files finds it, and in it why it says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from analysis.rows.caveats import add_caveats, add_failures
from analysis.rows.tables import RunPoint, Tables
from analysis.writing.document import Document

CELLS = "not warmed up, and say whether requests fit, not how fast they are"
"""Why the cells of an envelope are no levels of load."""


def no_closed_loop(points: Sequence[RunPoint]) -> str:
    """Return `no levels of a closed loop`, and of the cells of an envelope, which are some, why not these."""
    cells = any(point.purpose == "envelope" for point in points)
    return "no levels of a closed loop" + (f" but cells of an envelope, which are {CELLS}" if cells else "")


def page_without_rows(file: str, title: str, tables: Tables, missing: str) -> Document:
    """Return the page; `missing` goes on from *not known from this run*."""
    doc = Document(file)
    doc.heading(1, title)
    add_caveats(doc, (), tables)
    doc.say("Not known from this run: " + missing)
    add_failures(doc, (), tables)
    return doc
