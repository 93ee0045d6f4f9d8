"""What arrived of one body, read by read: kept by the wire, digested after the request."""

from __future__ import annotations

from dataclasses import dataclass, field

BYTES_A_READ = 100
"""What a read takes beside its bytes: two Python objects and their places (tests/test_load_memory.py)."""
BEGIN_BYTES = 2**12
"""Of a body that is given up: enough for a message to quote."""


@dataclass(slots=True)
class Reads:
    """Bytes and their stamps (`time.monotonic()`), one each a read."""

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
