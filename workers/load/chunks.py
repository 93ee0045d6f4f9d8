"""HTTP's chunked bodies: the body without its chunks, and where it ends. Source: RFC 9112, section 7.1. Pure."""

from __future__ import annotations

import functools

MAX_LINE_BYTES = 1024
"""A longer size or trailer line is no HTTP that we want."""


class ChunkReader:
    """Takes a chunked body that comes in any pieces."""

    __slots__ = ("_in_trailer", "_left", "_rest", "behind", "broken", "ended")

    def __init__(self) -> None:
        self.ended = False
        self.behind = b""
        """What came behind the body's end."""
        self.broken = False
        """A size makes no sense, or a chunk does not end where it says: from there on nothing is known of the body."""
        self._rest = b""
        self._left = 0
        """Bytes still to come of the chunk that has begun, its line end included."""
        self._in_trailer = False

    @property
    def between(self) -> bool:
        """Whether the next byte begins a chunk."""
        return not (self._left or self._rest or self._in_trailer or self.ended or self.broken)

    def skip(self, data: bytes) -> bool:
        """Take the next bytes without looking at the body; return whether that was all: it has ended, or is broken."""
        whole = data.startswith(size_lines(len(data))) and data.endswith(b"\r\n")
        if whole and not (self._left or self._rest or self._in_trailer or self.broken):
            return False  # one read, one whole chunk, as servers of events write them
        self.feed(data)
        return self.ended or self.broken

    def feed(self, data: bytes) -> list[bytes]:
        """Take the next bytes; return what of the body is in them, cut where its chunks are."""
        found: list[bytes] = []
        if self.ended or self.broken:
            self.behind += data
            return found
        rest = self._rest + data if self._rest else data
        at, size = 0, len(rest)
        while at < size:
            if self._left:
                end = at + self._left
                if end > at + 2:
                    found.append(rest[at : min(end - 2, size)])
                if not b"\r\n"[-self._left :].startswith(rest[max(end - 2, at) : end]):
                    self.broken = True
                    break
                self._left = max(end - size, 0)
                at = min(end, size)
                continue
            line_end = rest.find(b"\r\n", at)
            if line_end < 0:
                self.broken = size - at > MAX_LINE_BYTES
                break
            line, at = rest[at:line_end], line_end + 2
            if self._in_trailer:
                if not line:
                    self.ended, self.behind = True, rest[at:]
                    at = size
                continue
            length = chunk_size(line)
            if length is None:
                self.broken = True
                break
            self._in_trailer, self._left = length == 0, length + 2 if length else 0
        self._rest = rest[at:]
        return found


@functools.lru_cache(4096)
def size_lines(length: int) -> tuple[bytes, ...]:
    """Return what a chunk of so many bytes, lines included, begins with: as most servers write it, and in capitals.

    Nothing where a chunk is shorter or longer: 262 bytes are too many for a size of two digits and too few for three.
    """
    for digits in range(1, 9):
        size = length - digits - len(b"\r\n\r\n")
        if size > 0 and len(b"%x" % size) == digits:
            return b"%x\r\n" % size, b"%X\r\n" % size
    return ()


def chunk_size(line: bytes) -> int | None:
    """Return the bytes that a size line announces; None where it is no hexadecimal number."""
    digits = line.partition(b";")[0].rstrip() if b";" in line else line
    return int(digits, 16) if digits and not digits.strip(_HEX) else None


_HEX = b"0123456789abcdefABCDEF"
