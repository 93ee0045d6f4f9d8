"""A page whose rows a run does not hold: short, with what is missing and the sweep that measures it.

So that who looks for one of the tutorial's files finds it, and in it why it says nothing.
"""

from __future__ import annotations

from analysis.rows.caveats import add_caveats, add_failures
from analysis.rows.tables import Tables
from analysis.writing.document import Document


def page_without_rows(file: str, title: str, tables: Tables, missing: str) -> Document:
    """Return the page; `missing` goes on from *not known from this run*."""
    doc = Document(file)
    doc.heading(1, title)
    add_caveats(doc, (), tables)
    doc.say("Not known from this run: " + missing)
    add_failures(doc, (), tables)
    return doc
