"""Writing artifacts: whole or not at all, and never outside the run directory."""

from __future__ import annotations

import csv
import io
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_FORMULA = re.compile(r"[=@\t\r]|[+-](?!$|[\d.,]+(e[+-]?\d+)?( %| [\w/]+)?$|inf$)")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file beside `path` to fill, and move it there in one step unless an error is raised.

    A new, private file is made each time and links are replaced, not followed: a run directory may come from elsewhere.
    """
    path.parent.mkdir(exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes 0600; artifacts are meant to be read by colleagues
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_with(path: Path, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a file that then replaces `path` (`replacing`); return `path`."""
    with replacing(path) as temporary:
        write(temporary)
    return path


def write_text(path: Path, text: str) -> Path:
    """Write UTF-8 text with Unix line ends."""
    return write_with(path, lambda temporary: _fill(temporary, text))


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Path:
    """Write a CSV whose cells are already text; a cell with a comma or a quote is quoted.

    Words that a spreadsheet would compute (a model named `=...`) get a `'` before them; numbers stay as they are.
    Source: OWASP, CSV Injection.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([f"'{cell}" if _FORMULA.match(cell) else cell for cell in row] for row in rows)
    return write_text(path, buffer.getvalue())


def _fill(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
