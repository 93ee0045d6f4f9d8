"""Who else holds memory of a session's cards: before its server, while it lives, and after it. Never ends anybody.

Used by `workers.session` and `workers.measuring`. NVML numbers processes as the host does: in a container with numbers
of its own the server's are not known among them, and only those seen while there was no server are known to be
another's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

from contract.rows import SessionRow
from workers.devices.base import CardProcess, Device

Look = Sequence[CardProcess]
"""Who held memory of the cards at one moment."""


class Strangers:
    """Of one session, whose `row` names those of all looks so far."""

    def __init__(self, device: Device, row: SessionRow) -> None:
        self._device, self._row = device, row
        self._before: Look = ()
        self._ready: Look = ()
        self._seen: list[CardProcess] = []
        """All that was seen, each process once."""
        self._own: set[int] = set()
        """Whatever was the server's at any look: it may have ended while a later one was taken."""
        self._others: set[tuple[str, int]] = set()
        """Whoever was on a card when there was no server of this session."""

    def look_before(self) -> None:
        """Look while there is no server yet."""
        self._before = self._device.processes(None)
        self._others |= {_place(process) for process in self._before}
        self._enter([self._before])

    def look_at_ready(self, pid: int) -> None:
        """Look as the memory of a server that is ready is read."""
        self._ready = self._device.processes(pid)
        self.saw([self._ready])

    def look(self, pid: int) -> None:
        """Look once while the server lives."""
        self.saw([self._device.processes(pid)])

    def saw(self, looks: Sequence[Look]) -> None:
        """Enter looks that were taken while the server lived."""
        self._own |= {process.pid for look in looks for process in look if process.ours}
        self._enter(looks)

    def in_window(self, looks: Sequence[Look]) -> list[str] | None:
        """Return who else was there in a window, by its own looks; None where they cannot tell."""
        return self._named(looks)

    def in_memory(self, looks: Sequence[Look]) -> list[str] | None:
        """Return who else was there whenever memory was read for a point: before the server, when ready, in its window.

        None where these looks cannot tell.
        """
        return self._named([self._before, self._ready, *looks])

    def look_after(self, pid: int, left: list[int]) -> None:
        """Tell in the row who holds what stayed above the baseline, card by card, when the server's tree had ended.

        Where none of its processes was ever seen nobody can: one that does not end would be taken for a stranger.
        """
        if not self._own:
            return
        here = [p for p in self._device.processes(pid) if not p.ours and p.pid not in self._own]
        self._others |= {_place(process) for process in here}
        self._enter([here])
        self._row.left_processes = _names(here)
        if any(process.memory_bytes is None for process in (*here, *self._before)):
            return
        more = _by_card(here)
        more.subtract(_by_card(self._before))
        shares = zip(self._device.cards, left, strict=True)
        self._row.mem_left_to_others_bytes = sum(min(size, max(more[card.id], 0)) for card, size in shares)

    def _enter(self, looks: Iterable[Look]) -> None:
        self._seen = _each_once(chain(self._seen, *looks))
        self._row.foreign_processes = self._named([self._seen])

    def _named(self, looks: Iterable[Look]) -> list[str] | None:
        seen = _each_once(chain(*looks))
        own_seen = any(process.pid in self._own for process in seen)
        others = [p for p in seen if p.pid not in self._own and (own_seen or _place(p) in self._others)]
        return _names(others) if own_seen or others else None


def _place(process: CardProcess) -> tuple[str, int]:
    return process.device_id, process.pid


def _each_once(processes: Iterable[CardProcess]) -> list[CardProcess]:
    """Return every process of a card once, as it was when it held most of it."""
    most: dict[tuple[str, int], CardProcess] = {}
    for process in processes:
        known = most.setdefault(_place(process), process)
        if (process.memory_bytes or 0) > (known.memory_bytes or 0):
            most[_place(process)] = process
    return list(most.values())


def _names(processes: Iterable[CardProcess]) -> list[str]:
    return sorted(map(str, processes))


def _by_card(processes: Iterable[CardProcess]) -> Counter[str]:
    held: Counter[str] = Counter()
    for process in processes:
        held[process.device_id] += process.memory_bytes or 0
    return held
