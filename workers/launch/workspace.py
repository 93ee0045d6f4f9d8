"""The private directory of one session: socket, log, model and the server's temporary files; gone afterwards."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from workers.temporary import PREFIX, Owned

SOCKETS_BELOW = 45
"""Characters of /t/UUID, vLLM's own sockets."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """Paths below one 0700 directory. Everything of a session that is a file lives here."""

    root: Path
    _owned: Owned | None = None

    @classmethod
    def make(cls) -> Workspace:
        """Make the directory, which is this process's until it is removed."""
        owned = Owned(PREFIX, SOCKETS_BELOW)
        workspace = cls(owned.path, owned)
        workspace.temporary.mkdir()
        return workspace

    @property
    def socket(self) -> Path:
        """The server's HTTP socket."""
        return self.root / "s"

    @property
    def log(self) -> Path:
        """Standard output and error of the server."""
        return self.root / "server.log"

    @property
    def status(self) -> Path:
        """What the guard says of the server: pid and exit code."""
        return self.root / "status.json"

    @property
    def model(self) -> Path:
        """Directory of a shape's config and tokenizer."""
        return self.root / "model"

    @property
    def temporary(self) -> Path:
        """TMPDIR of the server."""
        return self.root / "t"

    @property
    def sim_state(self) -> Path:
        """What the stand-in server says it has allocated."""
        return self.root / "sim.json"

    @contextlib.contextmanager
    def fresh_directory(self) -> Iterator[Path]:
        """Make an empty directory that lasts as long as the block."""
        with tempfile.TemporaryDirectory(dir=self.root) as made:
            yield Path(made)

    def remove(self) -> None:
        """Remove the directory, where `make` has made it, and all in it."""
        if self._owned is not None:
            self._owned.remove()
