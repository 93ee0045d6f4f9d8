"""A run directory: manifest, shards, logs. The driver's only; every file appears whole, by a rename.

A shard at shards/<session>/<point>.parquet makes its point done, if its status is a measurement or a result.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from contract.rows import RESULT_STATUSES, PointRow, SessionEnd, SessionRow, arrow_schema, to_table
from orchestrator.problems import ConfigError

RAY_PACKAGE_CACHE = "/runtime_resources/working_dir_files/"
SESSION_SHARD = "session.parquet"
_OF_A_START = ("created_at", "argv", "python", "platform", "versions", "schema_version", "workload_version", "fleet")


class NotWritten(Exception):
    """The run directory took a file not at all: nothing more can be kept."""


class Store:
    """One run directory that exists."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @classmethod
    def create(cls, root: Path, name: str) -> Store:
        """Make a new run directory `<time>_<name>` below `root`."""
        stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        root.mkdir(parents=True, exist_ok=True)
        for suffix in ("", *(f"_{i}" for i in range(2, 100))):
            directory = root / f"{stamp}_{name}{suffix}"
            try:
                directory.mkdir()
            except FileExistsError:
                continue
            return cls(directory)
        raise ConfigError([f"output_root: {root} is full of runs of this second"])

    def put(self, row: PointRow) -> None:
        """Write a point's shard."""
        self._write(self._shard(row.session_id, f"{row.point_id}.parquet"), [row], PointRow)

    def put_session(self, end: SessionEnd) -> None:
        """Write a session's row and its server's log."""
        self._write(self._shard(end.row.session_id, SESSION_SHARD), [end.row], SessionRow)
        logs = self._path("logs")
        logs.chmod(0o700)  # a server that was told to log its requests has prompts in it
        _replace(logs / f"{end.row.session_id}.log", end.log.encode())

    def rows(self, session_id: str) -> dict[str, PointRow]:
        """Return the rows of a session whose points are done, by point id, without what is nested in them.

        Done is a point whose readable shard says that it was measured, or that its failure is its result.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        flat = [column.name for column in arrow_schema(PointRow) if not pa.types.is_nested(column.type)]
        found: dict[str, PointRow] = {}
        for path in (self.directory / "shards" / session_id).glob("[!.]*.parquet"):
            if path.name == SESSION_SHARD:
                continue
            with contextlib.suppress(OSError, ValueError, TypeError):
                file = pq.ParquetFile(path)
                written = file.read(columns=[name for name in flat if name in file.schema_arrow.names]).to_pylist()
                if written and all(row["status"] in RESULT_STATUSES for row in written):
                    found[path.stem] = PointRow(**written[-1])
        return found

    def discard_half_servers(self) -> list[Path]:
        """Remove the rows of servers that cannot be read, and return where they were.

        A point's half a shard is replaced as its point is measured again; a server whose points are done is not
        started again, and half a row of it would be in the way of all artifacts.
        """
        import pyarrow.parquet as pq

        removed = []
        for path in self.directory.glob(f"shards/*/{SESSION_SHARD}"):
            try:
                pq.read_metadata(path)
            except (OSError, ValueError):  # Arrow's own are ValueErrors
                path.unlink(missing_ok=True)
                removed.append(path)
        return removed

    def put_manifest(self, manifest: dict[str, Any]) -> None:
        """Write provenance and plan."""
        text = json.dumps(manifest, indent=1, default=asdict)
        _replace(self.directory / "manifest.json", text.encode() + b"\n")

    def manifest(self) -> dict[str, Any]:
        """Return the manifest. Raises `ConfigError` where it is missing or not ours."""
        try:
            content = json.loads((self.directory / "manifest.json").read_text())
            experiments = content.get("experiments") if isinstance(content, dict) else None
            if experiments and isinstance(experiments, list) and all(isinstance(each, dict) for each in experiments):
                return content  # type: ignore[no-any-return]
        except (OSError, ValueError, RecursionError):
            pass
        raise ConfigError([f"{self.directory} is not a run directory: it has no readable manifest.json"])

    def refuse_links(self) -> None:
        """Raise `ConfigError` where anything in it is a link: a run from elsewhere is written to inside it only."""
        for path in self.directory.rglob("*"):
            if path.is_symlink():
                raise ConfigError([f"{path} is a link: a run that holds links is not gone on with"])

    def made_so_far(self) -> dict[str, Any]:
        """Return what a manifest of a resumed run keeps of the one before: its servers, and with what it was made."""
        try:
            before = self.manifest()
        except ConfigError:
            return {}
        kept = {name: before[name] for name in _OF_A_START if name in before}
        return {"servers": list(before.get("servers", [])), "earlier": [*before.get("earlier", []), kept]}

    def _path(self, name: str) -> Path:
        return _made(self.directory / name)

    def _shard(self, session_id: str, name: str) -> Path:
        return _made(self._path("shards") / session_id) / name

    @staticmethod
    def _write(path: Path, rows: list[Any], row_class: type) -> None:
        import pyarrow.parquet as pq

        table = to_table(rows, row_class)
        with _written_whole(path) as temporary:
            # snappy, Arrow's own choice: zstd sets up a decoder for each of the many short columns, and saves little
            pq.write_table(table, temporary)


def rebuild(store: Store) -> str:
    """Return the command that makes the artifacts of what a run has measured."""
    return f"python -m analysis {store.directory}"


def _made(directory: Path) -> Path:
    try:
        directory.mkdir(exist_ok=True)
    except OSError as error:
        raise NotWritten(f"{directory} could not be made: {error.strerror}") from error
    return directory


@contextlib.contextmanager
def _written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary file to fill, which then becomes `path`. Raises `NotWritten`, and leaves nothing of it."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise NotWritten(f"{path} could not be written: {error.strerror or error}") from error


def _replace(path: Path, content: bytes) -> None:
    with _written_whole(path) as temporary:
        temporary.write_bytes(content)


def free_bytes(path: Path) -> int:
    """Return the bytes that are free where `path` is or will be."""
    return shutil.disk_usage(_existing(path)).free


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def check_root(root: str | Path, key: str = "output_root") -> Path:
    """Return the directory that `key` names as an absolute path, looked at but not made.

    Raises `ConfigError` with the way out where nothing can be kept there.
    """
    path = Path(root).expanduser().absolute()
    if RAY_PACKAGE_CACHE in f"{path}/":
        raise ConfigError(
            [f"{key}: {path} lies inside Ray's package cache, which Ray deletes: give an absolute {key} outside it"]
        )
    existing = _existing(path)
    if not existing.is_dir():
        raise ConfigError([f"{key}: {existing} is not a directory"])
    try:
        tempfile.TemporaryDirectory(dir=existing).cleanup()  # a look at permission bits would say yes to root
    except OSError as error:
        raise ConfigError([f"{key}: {existing} cannot be written ({error.strerror})"]) from None
    return path
