"""Plain tables for a terminal. Rows may come from elsewhere: nothing in them may move its cursor."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.writing.figures import clean


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """Return the table with two spaces between columns; the first `left` stand to the left, the others to the right."""
    cells = [[clean(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = [
        "  ".join(cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(aligned))
        for aligned in (list(zip(row, widths, strict=True)) for row in cells)
    ]
    return "\n".join(line.rstrip() for line in lines)
