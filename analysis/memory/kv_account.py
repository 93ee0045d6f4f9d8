"""Where a server's memory goes: the account's table, what is left of it, what every difference is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from analysis.memory.kv_fit import Interval, KvResult
from analysis.rows.series import Reading, Series
from analysis.writing.document import Document, Part, Phrase, join, phrase
from analysis.writing.figures import MIB, count, gib, mib, percent, plain, signed_mib
from contract.rows import MemoryAccount, SessionRow

COLUMNS = {
    "weights": "weights_bytes",
    "kv": "kv_bytes",
    "graphs": "graph_pool_bytes",
    "buffers": "buffer_bytes",
    "cache": "cached_bytes",
    "context": "context_bytes",
}
"""Parts of the account that stand in the rows as they are. What else is outside torch follows from several columns."""
UNNAMED = ("driver", "kernels", "outside")
"""Outside torch, of which nobody says what it is: the first two where the workers have read it themselves; rows before
version 7 have the last, one difference."""
OUTSIDE_TORCH = ("context", "libraries", *UNNAMED)
"""A probe tells the first two; the second since version 8."""
HEADS = {
    "weights": "weights",
    "kv": "KV pool",
    "graphs": "graph pools",
    "buffers": "buffers",
    "cache": "cache",
    "context": "CUDA context",
    "libraries": "torch and cuBLAS",
    "driver": "came with graph capture",
    "kernels": "kernels and libraries",
    "outside": "outside torch beyond context",
    "residual": "residual",
}
MOMENTS = {"mem_ready_bytes": "ready", "mem_loaded_bytes": "peak"}
"""The moment of the account that stands beside a memory column."""
MOVED_BYTES = MIB
"""A part that changed by less is not named as a cause."""


@dataclass(frozen=True, slots=True)
class Account:
    """A reading's memory at one moment, over all cards of its server; bytes."""

    name: str
    moment: str
    used: int
    parts: dict[str, int | None]
    """By the keys of `COLUMNS`, and those of `OUTSIDE_TORCH` that the run has; None for one that was not measured."""
    at_end: int | None
    """What the cards held at the server's end, when torch had freed all; None where it did not."""
    graph_capture: int | None

    @property
    def residual(self) -> int:
        """What all that was read does not explain."""
        return self.used - sum(value or 0 for value in self.parts.values())

    @property
    def share(self) -> float:
        """The residual's share of the memory used."""
        return self.residual / self.used if self.used else 0.0

    @property
    def outside(self) -> int:
        """What the parts have outside of torch's allocator."""
        return sum(self.parts.get(part) or 0 for part in OUTSIDE_TORCH)

    @property
    def unnamed(self) -> int | None:
        """What probes and torch's allocator alone do not explain; None where no probe told the context."""
        if self.parts["context"] is None:
            return None
        return self.residual + sum(self.parts.get(part) or 0 for part in UNNAMED)

    @property
    def unnamed_share(self) -> float | None:
        """Its share of the memory used."""
        return None if self.unnamed is None or not self.used else self.unnamed / self.used


class Accounts:
    """The accounts of a run's servers, found by the readings that were made on them."""

    def __init__(self, sessions: Sequence[SessionRow]) -> None:
        self._starts = {(session.session_id, session.attempt): session for session in sessions}
        rows = [row for session in sessions for row in session.account if row.used_bytes is not None]
        self.named = all(_since_init(row) is not None for row in rows)
        """Whether all workers have read what is outside torch: the run's accounts then have the same parts."""
        self._libraries = {
            _stack(session): session.library_bytes for session in sessions if session.library_bytes is not None
        }
        outside = ("driver", "kernels") if self.named else ("outside",)
        if self.named and self._libraries:
            outside = ("libraries", *outside)
        self.parts = (*COLUMNS, *outside, "residual")
        self.heads = [HEADS[part] for part in self.parts]

    def at(self, reading: Reading, moment: str) -> Account | None:
        """Return the account beside a reading; None where none was made or no card was asked (the CPU backend)."""
        point = reading.measured[0] if reading.measured else None
        session = self._starts.get((point.session_id, point.attempt)) if point is not None else None
        if session is None:
            return None
        rows = [row for row in session.account if row.moment == moment and row.used_bytes is not None]
        if not rows:
            return None
        parts = {part: _total([getattr(row, column) for row in rows]) for part, column in COLUMNS.items()}
        at_end = _total([row.outside_bytes for row in rows])
        capture = session.graph_capture_bytes
        if self.named:
            told = self._libraries.get(_stack(session))
            libraries = None if told is None else told * len(rows)
            if "libraries" in self.parts:
                parts["libraries"] = libraries
            parts |= _since_first_look(rows, parts["graphs"], capture, libraries or 0)
        else:
            parts["outside"] = None if at_end is None else at_end - (parts["context"] or 0)
        used = sum(row.used_bytes or 0 for row in rows)
        return Account(f"{reading.name}.account.{moment}", moment, used, parts, at_end, capture)

    def moved(self, interval: Interval) -> dict[str, int]:
        """Return by how much each part and the residual changed over an interval; empty where an account is missing."""
        moment = MOMENTS[interval.column]
        shorter, longer = self.at(interval.shorter, moment), self.at(interval.longer, moment)
        if shorter is None or longer is None:
            return {}
        changes = {part: (value or 0) - (shorter.parts[part] or 0) for part, value in longer.parts.items()}
        return changes | {"residual": longer.residual - shorter.residual}

    def causes(self, interval: Interval, name: str) -> Phrase | None:
        """Return in words what changed over an interval beside the formula's pool; None where that is not known.

        `name` is the prefix of its figures.
        """
        moved = self.moved(interval)
        if not moved:
            return None
        others = {part: change for part, change in moved.items() if part != "kv" and abs(change) >= MOVED_BYTES}
        pool = moved["kv"] - (interval.expected_bytes or 0)
        words = [
            phrase(HEADS[part] + " {change} MiB", change=signed_mib(f"{name}.{part}_mib", others[part]))
            for part in sorted(others, key=lambda part: -abs(others[part]))
        ]
        if abs(pool) >= MOVED_BYTES:
            words.insert(0, phrase("KV pool {change} MiB", change=signed_mib(f"{name}.kv_beyond_formula_mib", pool)))
        return join(words, ", ") if words else None


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


def _since_first_look(
    rows: Sequence[MemoryAccount], pools: int | None, capture: int | None, libraries: int
) -> dict[str, int | None]:
    """Return what came outside torch since the engine's first look; apart, what came while CUDA graphs were captured.

    That is what went then less their pools, which lie in torch's allocator. The log has it of one worker, so of
    several it is not known; where there is no pool there is no graph. `libraries` of it are told by a probe; where less
    came, a part of them was there before, and is the residual's to show.
    """
    came = _total([_since_init(row) for row in rows])
    driver = None
    if pools == 0:
        driver = 0
    elif capture is not None and pools is not None and len(rows) == 1:
        driver = max(capture - pools, 0)
    rest = None if came is None else came - (driver or 0)
    return {"driver": driver, "kernels": rest if not libraries or rest is None else max(rest - libraries, 0)}


def add_account(doc: Document, result: KvResult, accounts: Accounts) -> None:
    """Write the section for one model on one kind of card."""
    doc.heading(3, "Where the memory goes")
    every = [committed.series for committed in result.committed] + list(result.capacity)
    series_with = [series for series in every if list(_of(series, accounts))]
    if not series_with:
        doc.say(
            "Not known from this run: no row of a server holds an account of its memory (only one that comes up on "
            "GPUs and on a private socket, `server.transport=uds`, is asked for it)."
        )
        return
    found = [account for series in series_with for _, account in _of(series, accounts)]
    _how_read(doc, accounts, result.group.points[0].simulated)
    if not accounts.named:
        _notes_on_outside(doc, found)
    for series in series_with:
        _table(doc, series, accounts)
    _both_residuals(doc, found, accounts)
    for series in series_with:
        _both_residuals_table(doc, series, accounts)
    if accounts.named:
        _notes_on_readings(doc, found)
    for committed in result.committed:
        if len(list(_of(committed.series, accounts))) > 2:
            _differences(doc, committed.series, accounts)


def _of(series: Series, accounts: Accounts) -> Iterator[tuple[Reading, Account]]:
    for reading in series.measured:
        for moment in MOMENTS.values():
            account = accounts.at(reading, moment)
            if account is not None:
                yield reading, account


HOW_READ = {
    "weights": "blocks of torch's allocator in the engine's workers, told apart by their addresses",
    "kv": "the same",
    "graphs": "the same: the private pools of CUDA graphs",
    "buffers": "the same: other live tensors",
    "cache": "the same: blocks that activations have left",
    "context": "NVML: by how much it rose for a probe process that made a bare context, before the server",
    "libraries": "NVML: by how much it rose beyond a bare context and what torch's allocator held when a probe process "
    "had torch make a tensor and multiply matrices, before the run's first server on the node",
    "driver": "the engine's log, to a hundredth of a GiB: what went of the card while it captured CUDA graphs, less "
    "their pools. What the driver keeps of graphs is at most that, for what the warm-up of a capture loaded is in it, "
    "and not in the next part",
    "kernels": "two readings of cudaMemGetInfo in the workers, each less what torch's allocator held: by how much "
    "they rose from the engine's own first look at the card, before it loaded the model, to this moment, less the "
    "parts before. What processes of others took or gave back meanwhile would be in it",
    "outside": "one difference, of which nobody names the parts (kernels, libraries, what the driver keeps of "
    "CUDA graphs): NVML at the server's end, when torch had freed everything, less what was there before the "
    "server and the context",
    "residual": "memory of the cards (NVML, less what was there before the server) minus all of the above",
}
"""How each part was read, in the words of the page."""


def _how_read(doc: Document, accounts: Accounts, simulated: bool) -> None:
    doc.say("How each part was read:")
    doc.table(["what", "notes"], [[HEADS[part], HOW_READ[part]] for part in accounts.parts], simulated)


def _notes_on_readings(doc: Document, found: list[Account]) -> None:
    """Write what is missing where the workers have read what is outside torch, and what the cards said at the end."""
    if any(account.parts["context"] is None for account in found):
        doc.say("Where no probe told the CUDA context it is in the residual.")
    if any(account.parts["driver"] is None for account in found):
        doc.say(
            "Where *came with graph capture* is missing the log does not tell it (it has the figure of one worker, so "
            "of several cards it tells none): it is then in *kernels and libraries*."
        )
    ended = [
        (account, account.at_end - account.outside)
        for account in found
        if account.at_end is not None and account.parts["context"] is not None
    ]
    if ended:
        account, difference = max(ended, key=lambda pair: abs(pair[1]))
        doc.say(
            "A cross-check by the other meter: at a server's end, when torch had freed everything, its CUDA graphs "
            "too, NVML still had all that is outside torch (the driver gives what it took for graphs back with the "
            "process); where the two differ most, {difference} MiB.",
            difference=signed_mib(f"{account.name}.end_difference_mib", difference),
        )


def _notes_on_outside(doc: Document, found: list[Account]) -> None:
    capture = next((account for account in found if account.graph_capture), None)
    if capture is not None:
        doc.say(
            "While it captured CUDA graphs the engine saw {capture} GiB go (its log): their pools, and what the driver "
            "took for them, which stays *outside torch*.",
            capture=gib(f"{capture.name}.graph_capture_gib", capture.graph_capture),
        )
    if any(account.parts["outside"] is None for account in found):
        doc.say(
            "Where *outside torch* is missing the server did not give its memory back at its end: it is then in the "
            "residual."
        )


def _both_residuals(doc: Document, found: list[Account], accounts: Accounts) -> None:
    worst = max(found, key=lambda account: abs(account.share))
    parts = " and ".join(f"*{HEADS[part]}*" for part in UNNAMED if part in accounts.parts)
    doc.say(
        "What is left over, both ways. Against everything that was read the largest residual is {residual} MiB, "
        "{share} of the memory at that moment. What no probe tells of what lies outside torch (" + parts + ") is read "
        "from the same counter as the memory that it explains, so this says that nothing came or went unseen, not what "
        "it is.",
        residual=signed_mib(f"{worst.name}.residual_mib", worst.residual),
        share=_share(f"{worst.name}.residual_pct", worst.share),
    )
    known = [account for account in found if account.unnamed is not None]
    if known:
        most = max(known, key=lambda account: abs(account.unnamed or 0))
        highest = max(known, key=lambda account: abs(account.unnamed_share or 0.0))
        doc.say(
            "Against what probes and torch's allocator tell alone, so that what nobody counts one by one is seen, "
            "it is at most {unnamed} MiB, and at most {share} of the memory at a moment.",
            unnamed=signed_mib(f"{most.name}.unnamed_mib", most.unnamed),
            share=_share(f"{highest.name}.unnamed_pct", highest.unnamed_share),
        )
    else:
        doc.say(
            "No probe told what a bare CUDA context takes, so how much of what is outside torch is more is not known."
        )


def _both_residuals_table(doc: Document, series: Series, accounts: Accounts) -> None:
    def cells(account: Account) -> list[str | Part]:
        return [
            signed_mib(f"{account.name}.residual_mib", account.residual),
            _share(f"{account.name}.residual_pct", account.share),
            signed_mib(f"{account.name}.unnamed_mib", account.unnamed),
            _share(f"{account.name}.unnamed_pct", account.unnamed_share),
        ]

    heads = ["residual: all that was read", "share", "residual: probes and allocator alone", "share"]
    _by_length(doc, series, accounts, heads, cells)


def _share(name: str, share: float | None) -> Part:
    return percent(name, None if share is None else abs(share), 2)


def _table(doc: Document, series: Series, accounts: Accounts) -> None:
    def cells(account: Account) -> list[str | Part]:
        return [
            *(mib(f"{account.name}.{part}_mib", value, 1) for part, value in account.parts.items()),
            signed_mib(f"{account.name}.residual_mib", account.residual),
        ]

    _by_length(doc, series, accounts, accounts.heads, cells)


def _by_length(
    doc: Document, series: Series, accounts: Accounts, heads: list[str], cells: Callable[[Account], list[str | Part]]
) -> None:
    """A row for every length and moment: its memory, and the `cells` of its account."""
    doc.say("{who}:", who=_who(series))
    rows: list[list[str | Part]] = [
        [
            plain(f"{reading.name}.max_model_len", reading.at),
            account.moment,
            mib(f"{account.name}.used_mib", account.used, 1),
            *cells(account),
        ]
        for reading, account in _of(series, accounts)
    ]
    doc.table(["max_model_len", "moment", "memory", *heads], rows, series.sample.simulated)


def _who(series: Series) -> Phrase:
    if series.sample.mode == "committed":
        return phrase("Pools of {n} sequences, MiB", n=count(f"{series.name}.sequences", series.sample.sequences))
    return phrase("Pools cut from a fixed gpu_memory_utilization, MiB")


def _differences(doc: Document, series: Series, accounts: Accounts) -> None:
    doc.say("What each difference between two lengths is made of, MiB when ready:")
    rows: list[list[str | Part]] = []
    for shorter, longer in pairwise(series.measured):
        interval = Interval(shorter, longer, series.sample.sequences, "mem_ready_bytes")
        moved = accounts.moved(interval)
        if moved:
            name = f"{longer.name}.ready.moved"
            cells = [signed_mib(f"{name}.{part}_mib", change) for part, change in moved.items()]
            total = signed_mib(f"{name}.used_mib", sum(moved.values()))
            expected = mib(f"{longer.name}.delta_formula_mib", interval.expected_bytes, 1)
            rows.append([plain(f"{longer.name}.max_model_len", longer.at), total, expected, *cells])
    doc.table(["max_model_len", "difference", "formula", *accounts.heads], rows, series.sample.simulated)
