"""What arrived of one body, read by read: kept by the wire, digested after the request."""

from __future__ import annotations

from dataclasses import dataclass, field

from workers.load.chunks import ChunkReader

BYTES_A_READ = 100
"""What a read takes beside its bytes: two Python objects and their places (tests/test_load_memory.py)."""
BEGIN_BYTES = 2**12
"""Of a body that is given up: enough for a message to quote."""
MERGED_BYTES = 2**12
"""Reads are merged up to so many bytes: what a read takes is little beside them, and copying them is cheap."""
SLICE_BYTES = 2**14
"""Room is given in slices of so many bytes, so that few reads are merged at a time: while they are, the loop stands."""
SMALL_BYTES = 32
"""Where a slice went to reads of fewer bytes than that, they are merged; a token's chunk has several times as many."""


@dataclass(slots=True)
class Reads:
    """Bytes and their stamps (`time.monotonic()`), one each a read, or several of a few bytes (`Room`)."""

    data: list[bytes] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)
    chunked: bool = False
    """Whether the bytes are still in HTTP's chunks."""
    given_up_at: int | None = None
    """Bytes after which the body was given up for what it takes; only its begin was kept."""

    @property
    def size(self) -> int:
        """Bytes that arrived, chunk sizes included where there are any."""
        return sum(map(len, self.data)) if self.given_up_at is None else self.given_up_at

    @property
    def begin(self) -> bytes:
        """The first bytes, `BEGIN_BYTES` at the most."""
        found = b""
        for data in self.data:
            if len(found) >= BEGIN_BYTES:
                break
            found += data[: BEGIN_BYTES - len(found)]
        return found

    def give_up(self) -> None:
        """Keep of the body its begin alone, and of the stamps the last."""
        self.given_up_at = self.size
        self.data, self.at_s = [self.begin], self.at_s[-1:]


class Room:
    """What the reads of a body may still take, `BYTES_A_READ` for each included. Reads of a few bytes are merged.

    An event ends where a line does. So the stamp of a read whose part of the body holds no line end is no event's, and
    the next read may go into it. The first stays alone: its stamp is when the body began.
    """

    __slots__ = ("_chunks", "_left", "_looked_at", "_open", "_reads", "_seen")

    def __init__(self, reads: Reads, most_bytes: float) -> None:
        self._reads = reads
        self._left = most_bytes
        self._chunks = ChunkReader()
        self._seen = len(reads.data)
        """Reads when room was last asked for."""
        self._looked_at = 0
        """Reads that have been merged where they can be."""
        self._open = False
        """Whether the next one may go into the last of these."""

    def more(self, left: float = 0.0) -> float:
        """Return what may be taken before this is asked again, `left` being what is left of the last such room, below 0
        as a rule. Below 0 where the body has taken more than it may."""
        self._left += left
        small = (len(self._reads.data) - self._seen) * (SMALL_BYTES + BYTES_A_READ) > SLICE_BYTES
        if small or self._left < 0:
            self._left += self._merge() * BYTES_A_READ
        self._seen = len(self._reads.data)
        given = min(self._left, SLICE_BYTES)
        self._left -= given
        return given

    def _merge(self) -> int:
        """Merge what has come since the last call; return how many reads fewer there are."""
        reads, start = self._reads, self._looked_at
        data, at_s = reads.data[start:], reads.at_s[start:]
        del reads.data[start:], reads.at_s[start:]
        for piece, piece_at_s in zip(data, at_s, strict=True):
            self._take(piece, piece_at_s)
        self._looked_at = len(reads.data)
        return start + len(data) - self._looked_at

    def _take(self, piece: bytes, at_s: float) -> None:
        reads = self._reads
        if self._open:
            reads.data[-1] += piece
            reads.at_s[-1] = at_s
        else:
            reads.data.append(piece)
            reads.at_s.append(at_s)
        body = b"".join(self._chunks.feed(piece)) if reads.chunked else piece
        ends_line = b"\n" in body or b"\r" in body
        self._open = not ends_line and len(reads.data) > 1 and len(reads.data[-1]) < MERGED_BYTES
