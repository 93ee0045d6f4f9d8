"""Numbers on their way into Markdown: each has a name, its unrounded value, and the text that stands on the page.

`figures.csv` lists them all, so that a reader can recompute every number of every page from the Parquet tables.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from analysis.writing.files import write_csv

MIB = 2**20
GIB = 2**30
NOTHING = "–"
"""The text of a figure whose value is missing."""

_QUOTE_LENGTH = 200
MESSAGE_LENGTH = 600
"""An engine's message is quoted so far: what to do about it stands at its end."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One number (or a quoted name, whose digits are not ours) as it stands on a page."""

    name: str
    value: float | str | None
    """In the unit of the text, not rounded."""
    text: str
    raw: str | None = None
    """The text for CSV, where Markdown's escapes do not belong; None: the same."""


def count(name: str, value: float | None) -> Figure:
    """Return a whole number with thousands separators."""
    return Figure(name, value, NOTHING if value is None else f"{round(value):,}")


def plain(name: str, value: float) -> Figure:
    """Return a whole number as a flag or a column would carry it, without separators."""
    return Figure(name, value, str(value))


def decimal(name: str, value: float | None, digits: int = 2) -> Figure:
    """Return a number with a fixed count of decimals."""
    return Figure(name, value, NOTHING if value is None else f"{value:,.{digits}f}")


def significant(name: str, value: float | None, digits: int = 3) -> Figure:
    """Return a number with about `digits` significant digits, never in exponent notation for usual sizes."""
    return Figure(name, value, NOTHING if value is None else significant_text(value, digits))


def significant_text(value: float, digits: int = 3) -> str:
    """Return the text of `significant`."""
    if value == 0:
        return "0"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    if abs(value) >= 1e-4:
        return f"{value:#.{digits}g}"
    return f"{value:.{digits - 1}e}"


def mib(name: str, size_bytes: float | None, digits: int = 0) -> Figure:
    """Return a size in MiB (2**20 bytes) from bytes."""
    return decimal(name, None if size_bytes is None else size_bytes / MIB, digits)


def signed_mib(name: str, size_bytes: float | None, digits: int = 1) -> Figure:
    """Return a change of size in MiB with its sign, from bytes."""
    value = None if size_bytes is None else size_bytes / MIB
    return Figure(name, value, NOTHING if value is None else f"{value:+,.{digits}f}")


def gib(name: str, size_bytes: float | None, digits: int = 2) -> Figure:
    """Return a size in GiB (2**30 bytes) from bytes."""
    return decimal(name, None if size_bytes is None else size_bytes / GIB, digits)


def percent(name: str, share: float | None, digits: int = 1) -> Figure:
    """Return a share as a percentage; the value is the percentage."""
    value = None if share is None else share * 100
    return Figure(name, value, NOTHING if value is None else f"{value:.{digits}f} %")


def signed_percent(name: str, share: float | None, digits: int = 1) -> Figure:
    """Return a relative difference as a percentage with its sign."""
    value = None if share is None else share * 100
    return Figure(name, value, NOTHING if value is None else f"{value:+.{digits}f} %")


def times(name: str, ratio: float | None) -> Figure:
    """Return a ratio such as 2.1x."""
    return Figure(name, ratio, NOTHING if ratio is None else f"{significant_text(ratio, 2)}x")


def quote(name: str, words: str, length: int = _QUOTE_LENGTH) -> Figure:
    """Return words that were read from the run (a model's or a device's name), made harmless for Markdown."""
    cleaned = clean(words, length)
    harmless = re.sub(r"([\\|`*\[\]~])", r"\\\1", html.escape(cleaned, quote=False))
    return Figure(name, cleaned, harmless, raw=cleaned)


def clean(words: str, length: int = _QUOTE_LENGTH) -> str:
    """Return words on one line, without control characters, at most `length` characters."""
    line = re.sub(r"\s+", " ", "".join(c if c.isprintable() else " " for c in words)).strip()
    return line if len(line) <= length else line[: length - 1] + "…"


def write_figures(path: Path, pages: Iterable[tuple[str, Iterable[Figure]]]) -> Path:
    """Write file,name,value,text for the figures of every page, each once; a name never stands for two values."""
    rows: dict[tuple[str, str, str], tuple[str, str, str, str]] = {}
    values: dict[str, float | str | None] = {}
    for page, figures in pages:
        for figure in figures:
            if values.setdefault(figure.name, figure.value) != figure.value:
                raise ValueError(f"figure {figure.name} has two values: {values[figure.name]!r}, {figure.value!r}")
            value = "" if figure.value is None else str(figure.value)
            rows[page, figure.name, figure.text] = (page, figure.name, value, figure.text)
    return write_csv(path, ("file", "name", "value", "text"), rows.values())
