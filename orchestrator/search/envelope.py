"""`+sweep=envelope`: which (length, concurrency) the KV pool holds, measured only where it is not decided yet. Pure.

Cells near the border that KV arithmetic predicts are measured first. What one shows decides all cells that need less of
both (if it fits) or more of both (if it does not); a cell far from the border is decided by the arithmetic alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from analysis.memory.envelope_cells import outcome
from analysis.memory.kv_envelope import Outcome
from contract.specs import Point
from orchestrator.search import Pruned, Rows, Step

FAR = 2.0
"""Arithmetic alone decides a cell that needs less of the pool than 1/FAR, or whose prompts alone need FAR times it."""


@dataclass(frozen=True, slots=True)
class Cell:
    """So many requests at once, each growing from its prompt to `length` tokens."""

    point: Point
    length: int
    need: int
    """KV blocks of all requests at their full length."""
    prompts: int
    """Of their prompts alone: what it takes to admit all of them."""

    @property
    def concurrency(self) -> int:
        """Requests at once."""
        return self.point.concurrency

    def within(self, other: Cell) -> bool:
        """Whether it asks for no more than `other`, neither in length nor in concurrency."""
        return self.length <= other.length and self.concurrency <= other.concurrency

    def __str__(self) -> str:
        return f"{self.concurrency} x {self.length} tokens"


@dataclass(frozen=True, slots=True)
class Envelope:
    """See the module."""

    cells: tuple[Cell, ...]
    planned_blocks: int
    """Of the pool, by the formula, without the null block; the engine's own count replaces it."""

    @property
    def at_most(self) -> int:
        """All cells: pruned ones have rows, too."""
        return len(self.cells)

    @property
    def estimate_s(self) -> float:
        """Two cells of every length, about: the last that fits and the first that does not."""
        lengths = {cell.length for cell in self.cells}
        return 2 * len(lengths) * sum(cell.point.estimate_s for cell in self.cells) / len(self.cells)

    def next(self, rows: Rows) -> Step:
        """Return all cells that are decided, as pruned, and of the others the one nearest to the predicted border."""
        told = [row.engine_num_blocks for row in rows.values() if row.engine_num_blocks]
        pool = told[0] - 1 if told else self.planned_blocks
        tried = [cell for cell in self.cells if cell.point.id in rows]
        seen = [(cell, outcome(rows[cell.point.id], cell.need / cell.concurrency / pool)) for cell in tried]
        fitted = [cell for cell, what in seen if what is Outcome.QUIET]
        overflowed = [cell for cell, what in seen if what in (Outcome.PREEMPTED, Outcome.WAITED)]
        pruned, open_cells = [], []
        for cell in self.cells:
            if cell.point.id in rows:
                continue
            reason = _reason(cell, pool, fitted, overflowed)
            if reason is None:
                open_cells.append(cell)
            else:
                pruned.append(Pruned(cell.point, reason))
        nearest = sorted(open_cells, key=lambda cell: abs(math.log(cell.need / pool)))[:1]
        return Step(tuple(cell.point for cell in nearest), tuple(pruned))


def _reason(cell: Cell, pool: int, fitted: list[Cell], overflowed: list[Cell]) -> str | None:
    """What decides a cell, in words; None where nothing does."""
    larger = next((other for other in fitted if cell.within(other)), None)
    if larger is not None:
        return f"all fit: {larger} did"
    smaller = next((other for other in overflowed if other.within(cell)), None)
    if smaller is not None:
        return f"not all fit: {smaller} did not"
    if FAR * cell.need <= pool:
        return f"all fit by KV arithmetic: {cell.need} of {pool} blocks"
    if cell.prompts >= FAR * pool:
        return f"prompts do not fit by KV arithmetic: they alone need {cell.prompts} of {pool} blocks"
    return None
