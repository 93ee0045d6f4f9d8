"""What an envelope sweep measured, one grid of cells a server: each expected by arithmetic, then seen. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from analysis.memory.envelope_cells import Expected, expected, outcome
from analysis.memory.kv_envelope import Outcome
from analysis.memory.kv_pages import pages_of
from analysis.rows.groups import BASE, SERVER, Group, grouped
from analysis.rows.tables import RunPoint, Tables
from contract.kv import KVLayout
from contract.rows import MEASURED

COLUMNS = (*BASE, *SERVER, "mode", "max_model_len", "kv_cache_memory_bytes", "sequences")
"""What a server of the sweep is told from others by."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One length at one concurrency."""

    name: str
    """Prefix of the names of its figures."""
    point: RunPoint
    layout: KVLayout | None
    pool_blocks: int | None

    @property
    def length(self) -> int:
        """Tokens of a request, prompt and answer."""
        return (self.point.prompt_tokens or 0) + (self.point.output_tokens or 0)

    @property
    def concurrency(self) -> int:
        """Requests at once."""
        return self.point.concurrency or 0

    @property
    def expected(self) -> Expected:
        """What KV arithmetic says."""
        return expected(self.layout, self.concurrency, self.point.prompt_tokens or 1, self.length, self.pool_blocks)

    @property
    def measured(self) -> Outcome:
        """What was seen."""
        share = self.need_share
        return outcome(self.point, None if share is None else share / self.concurrency)

    @property
    def need_blocks(self) -> int | None:
        """KV blocks of all requests at their full length."""
        layout = self.layout
        return layout.blocks_at_once(self.concurrency, self.length, self.point.prompt_tokens) if layout else None

    @property
    def prompts_blocks(self) -> int | None:
        """Of their prompts alone, once they are computed."""
        return self.concurrency * self.layout.blocks_grown(self.point.prompt_tokens or 1) if self.layout else None

    @property
    def need_share(self) -> float | None:
        """Of the pool, by all requests at their full length."""
        return self.need_blocks / self.pool_blocks if self.need_blocks and self.pool_blocks else None

    @property
    def agrees(self) -> bool | None:
        """Whether both say that all requests fit, or that they do not; None where one of them leaves it open."""
        if self.expected in (Expected.UNKNOWN, Expected.OPEN) or self.measured is Outcome.UNKNOWN:
            return None
        return (self.expected is Expected.FITS) == (self.measured is Outcome.QUIET)


@dataclass(frozen=True, slots=True)
class EnvelopeGrid:
    """The cells of one server."""

    name: str
    group: Group
    cells: tuple[Cell, ...]

    @property
    def sample(self) -> RunPoint:
        """A point that stands for the server; a measured one if there is one."""
        return next((cell.point for cell in self.cells if cell.point.status == MEASURED), self.group.points[0])

    @property
    def pool_blocks(self) -> int | None:
        """Blocks that sequences may have, by the engine."""
        return self.cells[0].pool_blocks


def envelope_grids(tables: Tables) -> list[EnvelopeGrid]:
    """Return one grid per server, its cells by length and concurrency."""
    grids = []
    for group in grouped([point for point in tables.points if point.purpose == "envelope"], COLUMNS):
        name = f"cells.{group.slug}"
        told = [point.engine_num_blocks for point in group.points if point.engine_num_blocks]
        pool = told[0] - 1 if told else None  # the null block is nobody's
        pages = next((found for point in group.points if (found := pages_of(point, tables.configs))), None)
        layout = pages.layout if pages else None
        made = [Cell("", point, layout, pool) for point in group.points]
        ordered = sorted(made, key=lambda cell: (cell.length, cell.concurrency))
        cells = [replace(cell, name=f"{name}.len{cell.length}.c{cell.concurrency}") for cell in ordered]
        grids.append(EnvelopeGrid(name, group, tuple(cells)))
    return grids
