"""A small builder of pages whose prose cannot hold a typed number: digits come from figures, words from templates.

A page is a list of blocks whose words carry a little Markdown. `Document.text` is the Markdown of it; `analysis.report`
makes HTML of the same blocks.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from analysis.writing.figures import Figure

DIGITS_IN_NAMES = re.compile(r"(?<![A-Za-z0-9])(?:p50|p95|p99|e2e|E2EL)(?![A-Za-z0-9])|2\*\*20")
"""Names that are written with digits; everything else with a digit must be a figure."""


COLUMNS_OF_WORDS = ("notes", "estimate", "what", "value", "device", "model", "purpose", "verdict", "knee")


@dataclass(frozen=True, slots=True)
class Phrase:
    """Words with their figures filled in."""

    text: str
    figures: tuple[Figure, ...] = ()
    plain: str = ""
    """The same for CSV."""


Part: TypeAlias = Figure | Phrase


def phrase(template: str, **parts: Part) -> Phrase:
    """Return the template with its named figures filled in: `phrase("{n} levels", n=count(...))`.

    A digit in the template, or a part that is never used, is a `ValueError`.
    """
    _refuse_digits(template)
    used = {name for _, name, _, _ in string.Formatter().parse(template) if name}
    if used != set(parts):
        raise ValueError(f"template {template!r} names {sorted(used)}, given {sorted(parts)}")
    figures = [figure for name in parts for figure in _figures(parts[name])]
    text = template.format(**{name: part.text for name, part in parts.items()})
    return Phrase(text, tuple(figures), template.format(**{name: _plain(part) for name, part in parts.items()}))


def join(parts: Iterable[Part], separator: str = "; ") -> Phrase:
    """Return several phrases as one."""
    _refuse_digits(separator)
    listed = list(parts)
    figures = tuple(figure for part in listed for figure in _figures(part))
    return Phrase(separator.join(p.text for p in listed), figures, separator.join(_plain(p) for p in listed))


def _plain(part: Part) -> str:
    if isinstance(part, Phrase):
        return part.plain
    return part.text if part.raw is None else part.raw


def _figures(part: Part) -> tuple[Figure, ...]:
    return (part,) if isinstance(part, Figure) else part.figures


def _refuse_digits(template: str) -> None:
    without_fields = re.sub(r"{\w+}", "", template)
    if re.search(r"\d", DIGITS_IN_NAMES.sub("", without_fields)):
        raise ValueError(f"a number is typed in {template!r}: make it a figure")


def _with_marks(
    columns: Sequence[str | Part], rows: Iterable[Sequence[str | Part]]
) -> tuple[list[str | Part], list[list[str | Part]]]:
    mark = phrase("simulated")
    if columns[-1] != "notes":
        return [*columns, "notes"], [[*row, mark] for row in rows]
    marked: list[list[str | Part]] = []
    for row in rows:
        last = phrase(row[-1]) if isinstance(row[-1], str) else row[-1]
        marked.append([*row[:-1], join([last, mark]) if last.text else mark])
    return list(columns), marked


class Block:
    """A part of a page, its words in Markdown."""


@dataclass(frozen=True, slots=True)
class Heading(Block):
    """A heading; level 1 is the page's."""

    level: int
    words: str


@dataclass(frozen=True, slots=True)
class Paragraph(Block):
    """A paragraph; a caution is set apart."""

    words: str
    caution: bool = False


@dataclass(frozen=True, slots=True)
class Bullets(Block):
    """A list."""

    items: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Table(Block):
    """A table; columns of words stand to the left, those of numbers to the right."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def of_words(self) -> tuple[bool, ...]:
        """Whether each column holds words."""
        return tuple(column in COLUMNS_OF_WORDS for column in self.columns)


class Document:
    """One page and the figures that stand on it."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.figures: list[Figure] = []
        self.blocks: list[Block] = []

    def heading(self, level: int, template: str, **parts: Part) -> None:
        """Add a heading."""
        self.blocks.append(Heading(level, self._take(phrase(template, **parts))))

    def say(self, template: str, **parts: Part) -> None:
        """Add a paragraph."""
        self.blocks.append(Paragraph(self._take(phrase(template, **parts))))

    def caution(self, template: str, **parts: Part) -> None:
        """Add a paragraph set apart, for what a reader must know before any number."""
        self.blocks.append(Paragraph(self._take(phrase(template, **parts)), caution=True))

    def bullets(self, items: Iterable[Phrase]) -> None:
        """Add a list; nothing when there are no items."""
        words = tuple(self._take(item) for item in items)
        if words:
            self.blocks.append(Bullets(words))

    def table(
        self, columns: Sequence[str | Part], rows: Iterable[Sequence[str | Part]], simulated: bool = False
    ) -> None:
        """Add a table; cells are figures, phrases or words without digits. Cells of numbers stand to the right.

        With `simulated` every row says so, in its notes.
        """
        if simulated:
            columns, rows = _with_marks(columns, rows)
        body = tuple(tuple(map(self._cell, row)) for row in rows)
        self.blocks.append(Table(tuple(map(self._cell, columns)), body))

    def text(self) -> str:
        """Return the page in Markdown."""
        return "\n\n".join(map(_markdown, self.blocks)) + "\n"

    def _cell(self, cell: str | Part) -> str:
        return self._take(phrase(cell) if isinstance(cell, str) else cell)

    def _take(self, part: Part) -> str:
        self.figures.extend(_figures(part))
        return part.text


def _markdown(block: Block) -> str:
    match block:
        case Heading(level, words):
            return f"{'#' * level} {words}"
        case Paragraph(words, caution):
            return f"> {words}" if caution else words
        case Bullets(items):
            return "\n".join(f"- {item}" for item in items)
        case Table(columns, rows):
            rule = ["---" if words else "---:" for words in block.of_words]
            return "\n".join(f"| {' | '.join(cells)} |" for cells in [columns, rule, *rows])
    raise TypeError(f"no Markdown for {block!r}")
