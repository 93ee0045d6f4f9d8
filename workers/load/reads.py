"""What arrived of one body, read by read: kept by the wire, digested after the request."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Reads:
    """Bytes and their stamps (`time.monotonic()`), one each a read."""

    data: list[bytes] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)
    chunked: bool = False
    """Whether the bytes are still in HTTP's chunks."""

    @property
    def size(self) -> int:
        """Bytes that arrived, chunk sizes included where there are any."""
        return sum(map(len, self.data))
