"""Where a server's memory goes: parts that were each measured by themselves, and the residual that they leave. Pure.

What follows from a difference of readings is no part: it stays in the residual. The workers' own readings tell when the
residual came, which explains none of it. `kv_account_table` writes the section, `account_plot` draws it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from analysis.memory.kv_fit import Interval
from analysis.rows.disturbances import one_for_each
from analysis.rows.series import Reading
from analysis.rows.tables import RunPoint
from analysis.writing.document import Phrase, join, phrase
from analysis.writing.figures import MIB, signed_mib
from contract.rows import MemoryAccount, SessionRow

IN_TORCH = {
    "weights": "weights_bytes",
    "kv": "kv_bytes",
    "graphs": "graph_pool_bytes",
    "buffers": "buffer_bytes",
    "cache": "cached_bytes",
}
"""Parts that torch's allocator holds, and the columns that they stand in."""
COLUMNS = {**IN_TORCH, "context": "context_bytes"}
"""Parts that stand in the rows as they are. Of one more, what torch and cuBLAS take, a session has the figure."""
OUTSIDE_TORCH = ("context", "libraries", "residual")
"""A probe tells the first two, the second since version 8; nobody the rest."""
HEADS = {
    "weights": "weights",
    "kv": "KV pool",
    "graphs": "graph pools",
    "buffers": "buffers",
    "cache": "cache",
    "context": "CUDA context",
    "libraries": "torch and cuBLAS",
    "residual": "residual",
    "before": "what was there before the server",
}
MOMENTS = ("ready", "loaded", "peak")
BESIDE = {"mem_ready_bytes": ("ready",), "mem_loaded_bytes": ("loaded", "peak")}
"""Moments whose account may stand beside a memory column, where it is of the same memory: older runs have none of
*loaded*, but of the server's peak, which other loads may have raised since."""
MOVED_BYTES = MIB
"""A part that changed by less is not named as a cause."""
SHOWN_BYTES = MIB / 20
"""From here on a change is not `0.0 MiB` on a page."""


@dataclass(frozen=True, slots=True)
class Account:
    """What all cards of a server, or one of them, held for it at one moment; bytes."""

    name: str
    moment: str
    used: int
    parts: dict[str, int | None]
    """By the keys of `Accounts.parts`; None for one that was not measured: the residual then holds it."""
    with_graphs: int | None
    """Of the residual, what came while CUDA graphs were captured; None where that is not known."""
    since: int | None
    """Of the residual, what else came since the engine's first look at the card; None where the workers did not read
    it. Less than nothing where a part of what the library probe told was there before."""
    at_end: int | None
    """What the cards held at the server's end, when torch had freed all; None where it did not."""
    graph_capture: int | None
    """What went of one worker's card while CUDA graphs were captured, by the engine's log."""

    @property
    def residual(self) -> int:
        """What no probe and not torch's allocator tells."""
        return self.used - sum(value or 0 for value in self.parts.values())

    @property
    def share(self) -> float:
        """The residual's share of the memory used."""
        return self.residual / self.used if self.used else 0.0

    @property
    def neither(self) -> int | None:
        """Of the residual, what did not come since the engine's first look, as far as the workers' readings tell."""
        return None if self.since is None else self.residual - (self.with_graphs or 0) - self.since

    @property
    def end_difference(self) -> int | None:
        """By how much what was left when torch had freed all is more than what was beside torch's allocator here."""
        if self.at_end is None:
            return None
        return self.at_end - (self.used - sum(self.parts[part] or 0 for part in IN_TORCH))


class Accounts:
    """The accounts of a run's servers, found by the readings that were made on them."""

    def __init__(self, sessions: Sequence[SessionRow]) -> None:
        self._starts = {(session.session_id, session.attempt): session for session in sessions}
        self._libraries: dict[tuple[str | None, ...], dict[str, int]] = {}
        """Of each stack what was told, by node."""
        for session in sessions:
            if session.library_bytes is not None:
                self._libraries.setdefault(_stack(session), {}).setdefault(session.node, session.library_bytes)
        self.parts = (*COLUMNS, "libraries") if self._libraries else tuple(COLUMNS)
        """Of every account of the run: `COLUMNS`, and what torch and cuBLAS take where a probe told it."""

    def at(self, reading: Reading, moment: str) -> Account | None:
        """Return the account beside a reading; None where none was made or no card was asked (the CPU backend)."""
        session, rows = self._rows(reading, moment)
        if session is None or not rows:
            return None
        return self._account(f"{reading.name}.account.{moment}", session, rows, len(rows))

    def by_card(self, reading: Reading, moment: str) -> dict[str, Account]:
        """Return the same for each card, by its id, in the order of the server's; nothing for a server of one."""
        session, rows = self._rows(reading, moment)
        if session is None or len(rows) < 2:
            return {}
        places = {device: place for place, device in enumerate(session.device_ids)}
        rows.sort(key=lambda row: places.get(row.device_id, len(places)))
        name = f"{reading.name}.account.{moment}"
        return {
            row.device_id: self._account(f"{name}.card{n}", session, [row], len(rows)) for n, row in enumerate(rows)
        }

    def others(self, reading: Reading, points: Sequence[RunPoint]) -> list[str]:
        """Return which processes of others were on the cards while the server of a reading lived: seen by its session's
        looks, or at any of the `points` that it measured."""
        session, _ = self._rows(reading, "")
        if session is None:
            return []
        start = (session.session_id, session.attempt)
        at_points = [w for p in points if (p.session_id, p.attempt) == start for w in p.foreign_processes or ()]
        return list(one_for_each([*(session.foreign_processes or ()), *at_points]).values())

    def moved(self, interval: Interval) -> dict[str, int]:
        """Return by how much each part, the residual and what was there before the server changed over an interval.

        Empty where no account tells of the interval's memory at both its ends. A part that was measured at one end only
        has no change: it is in the residual of both.
        """
        before = round(_change(interval, "mem_baseline_bytes") or 0)
        for moment in BESIDE[interval.column]:
            shorter, longer = (self.at(reading, moment) for reading in (interval.shorter, interval.longer))
            if shorter is None or longer is None:
                continue
            used = longer.used - shorter.used
            if abs(used + before - (interval.delta_bytes or 0)) <= MOVED_BYTES:
                changes = {
                    part: value - other
                    for part, value in longer.parts.items()
                    if value is not None and (other := shorter.parts[part]) is not None
                }
                return changes | {"residual": used - sum(changes.values()), "before": before}
        return {}

    def causes(self, interval: Interval, name: str) -> Phrase | None:
        """Return in words what changed over an interval beside the formula's pool; None where that is not known.

        What is too small to be named is told as the rest, so that all of the difference is there. `name` is the prefix
        of its figures.
        """
        moved = self.moved(interval)
        if not moved:
            return None
        named = {part: change for part, change in moved.items() if part != "kv" and abs(change) >= MOVED_BYTES}
        foreseen = (interval.expected_bytes or 0) if "kv" in moved else 0
        pool = moved.get("kv", 0) - foreseen
        words = [
            phrase(HEADS[part] + " {change} MiB", change=signed_mib(f"{name}.{part}_mib", named[part]))
            for part in sorted(named, key=lambda part: -abs(named[part]))
        ]
        if abs(pool) >= MOVED_BYTES:
            words.insert(0, phrase("KV pool {change} MiB", change=signed_mib(f"{name}.kv_beyond_formula_mib", pool)))
            named["kv"] = round(pool)
        rest = (interval.delta_bytes or 0) - foreseen - sum(named.values())
        if words and abs(rest) >= SHOWN_BYTES:
            words.append(phrase("the rest {change} MiB", change=signed_mib(f"{name}.rest_mib", rest)))
        return join(words, ", ") if words else None

    def compiled(self, reading: Reading) -> bool | None:
        """Return whether the reading's server compiled its graphs (True) or loaded them from the cache.

        None where neither is known, and where repeats differ.
        """
        starts = [self._starts.get((point.session_id, point.attempt)) for point in reading.measured]
        told = {None if session is None else session.compiled for session in starts}
        return told.pop() if len(told) == 1 else None

    def _libraries_of(self, session: SessionRow) -> int | None:
        """What torch and cuBLAS take of one card: told on the session's own node, or on another of the same kind."""
        told = self._libraries.get(_stack(session), {})
        return told.get(session.node, next(iter(told.values()), None))

    def _rows(self, reading: Reading, moment: str) -> tuple[SessionRow | None, list[MemoryAccount]]:
        """Find the start of a server that a reading was made on, and what it has of the moment."""
        point = reading.measured[0] if reading.measured else None
        session = self._starts.get((point.session_id, point.attempt)) if point is not None else None
        rows = session.account if session is not None else []
        return session, [row for row in rows if row.moment == moment and row.used_bytes is not None]

    def _account(self, name: str, session: SessionRow, rows: Sequence[MemoryAccount], workers: int) -> Account:
        """Add up the rows of some cards, of a server of so many `workers`."""
        parts = {part: _total([getattr(row, column) for row in rows]) for part, column in COLUMNS.items()}
        told = self._libraries_of(session)
        libraries = None if told is None else told * len(rows)
        if "libraries" in self.parts:
            parts["libraries"] = libraries
        with_graphs = _with_graphs(parts["graphs"], session.graph_capture_bytes, workers)
        came = _total([_since_init(row) for row in rows])
        return Account(
            name,
            rows[0].moment,
            sum(row.used_bytes or 0 for row in rows),
            parts,
            with_graphs,
            None if came is None else came - (with_graphs or 0) - (libraries or 0),
            _total([row.outside_bytes for row in rows]),
            session.graph_capture_bytes,
        )


def _change(interval: Interval, column: str) -> float | None:
    shorter, longer = interval.shorter.median(column), interval.longer.median(column)
    return None if shorter is None or longer is None else longer - shorter


def _stack(session: SessionRow) -> tuple[str | None, ...]:
    """What decides how much libraries take of a card."""
    return session.device_name, session.driver_version, session.torch_version


def _total(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _since_init(row: MemoryAccount) -> int | None:
    """Two readings of one meter in the same worker: what was there before the first is in neither's difference."""
    now, first = row.outside_now_bytes, row.outside_at_init_bytes
    return None if now is None or first is None else now - first


def _with_graphs(pools: int | None, went: int | None, workers: int) -> int | None:
    """Return what came outside torch with the capture of CUDA graphs: what went of the card then less their pools.

    The log has it of one worker, so of several it is not known; where there is no pool there is no graph.
    """
    if pools == 0:
        return 0
    return max(went - pools, 0) if went is not None and pools is not None and workers == 1 else None
