"""A run directory: manifest, shards, logs. The driver's only; every file appears whole, by a rename.

A shard at shards/<session>/<point>.parquet makes its point done, if its status is a measurement or a result.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from contract.rows import FAILED, RESULT_STATUSES, PointRow, SessionEnd, SessionRow, arrow_schema, to_table
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

    def put(self, row: PointRow, instead: bool = True) -> None:
        """Write a point's shard; `instead` of one that is there, if there is one.

        A failed try that has no numbers never replaces one that has some: a level that its client limited, say.
        """
        path = self._shard(row.session_id, f"{row.point_id}.parquet")
        bare = row.status == FAILED and not row.requests
        if not path.exists() or (instead and not (bare and _has_requests(path))):
            self._write(path, [row], PointRow)

    def put_session(self, end: SessionEnd, instead: bool = True) -> None:
        """Write the row of a session's start beside those of its earlier ones, and its server's log, if there is one.

        Not `instead`: only where there is no row at all. The log of an earlier start is kept beside it, under the
        number of that start.
        """
        path = self._shard(end.row.session_id, SESSION_SHARD)
        if path.exists() and not instead:
            return
        earlier = [row for row in _rows_of_starts(path) if row.attempt != end.row.attempt]
        logs = self._path("logs")
        log = logs / f"{end.row.session_id}.log"
        with _kept(log):
            logs.chmod(0o700)  # a server that was told to log its requests has prompts in it
            if log.exists():
                last = max((row.attempt for row in earlier), default=end.row.attempt - 1)
                log.replace(logs / f"{end.row.session_id}.{last}.log")
        self._write(path, [*earlier, end.row], SessionRow)
        if end.log:
            _replace(log, end.log.encode())

    def starts(self) -> dict[str, int]:
        """Return how often each session was started, as far as the manifest and the rows of servers tell.

        Where those are lost (a shard that was torn) its points tell, as far as they are not.
        """
        folders = [folder for folder in self.directory.glob("shards/*") if folder.is_dir()]
        found = {folder.name: _last_start(folder) for folder in folders}
        for server in self.made_so_far().get("servers", []):
            if isinstance(server, dict) and isinstance(attempt := server.get("attempt"), int):
                session = str(server.get("session_id"))
                found[session] = max(attempt, found.get(session, 0))
        return found

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
                rows = [PointRow(**row) for row in written]
                ours = all((row.session_id, row.point_id) == (session_id, path.stem) for row in rows)  # no copy
                if rows and ours and all(row.status in RESULT_STATUSES for row in rows):
                    found[path.stem] = rows[-1]
        return found

    def discard_torn(self) -> list[Path]:
        """Set the shards aside that are not whole (`.NAME.torn`), and return where they were.

        Nobody need come by to replace one: a server whose points are done is not started again, and a point may not be
        planned any more. It would be in the way of all artifacts. Raises `ConfigError` where one cannot be looked at.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        aside = []
        for path in sorted(self.directory.glob("shards/*/[!.]*.parquet")):
            try:
                pq.ParquetFile(path).read()
            except (OSError, ValueError, pa.ArrowException) as error:  # Arrow's own have no number
                if isinstance(error, OSError) and error.errno is not None:  # it may be whole
                    raise ConfigError([f"{path} cannot be read ({error.strerror})"]) from None
                path.replace(path.with_name(f".{path.name}.torn"))
                aside.append(path)
        return aside

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


def _rows_of_starts(path: Path) -> list[SessionRow]:
    """Return what a session's shard holds, in this version's columns: nothing of what is not there, or not ours."""
    import pyarrow.parquet as pq

    with contextlib.suppress(OSError, ValueError, TypeError, LookupError):
        rows = pq.ParquetFile(path).read().to_pylist()
        ours = [row for row in rows if row["session_id"] == path.parent.name and isinstance(row["attempt"], int)]
        known = SessionRow.__dataclass_fields__
        return [SessionRow(**{name: value for name, value in row.items() if name in known}) for row in ours]
    return []


def _last_start(folder: Path) -> int:
    """Return the number of a session's last start that its folder still tells of; 0 where it was never started."""
    import pyarrow.parquet as pq

    rows = _rows_of_starts(folder / SESSION_SHARD)
    if rows:
        return max(row.attempt for row in rows)
    told = [1 for _ in folder.glob(".*.torn")]
    for path in folder.glob("[!.]*.parquet"):
        with contextlib.suppress(OSError, ValueError, LookupError):
            told += [int(attempt or 0) for attempt in pq.read_table(path, columns=["attempt"]).column(0).to_pylist()]
    return max(told, default=0)


def _has_requests(path: Path) -> bool:
    """Whether a point's shard is readable and holds what a load client saw."""
    import pyarrow.parquet as pq

    with contextlib.suppress(OSError, ValueError, LookupError):
        return any(row["requests"] for row in pq.read_table(path, columns=["requests"]).to_pylist())
    return False


def _made(directory: Path) -> Path:
    with _kept(directory):
        directory.mkdir(exist_ok=True)
    return directory


@contextlib.contextmanager
def _kept(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NotWritten(f"{path} could not be written: {error.strerror or error}") from error


@contextlib.contextmanager
def _written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary file to fill, which then becomes `path`, on the disk too: a host that fails in the moment after
    must not leave a name without a content. Raises `NotWritten`, and leaves nothing of it.
    """
    temporary = path.with_suffix(path.suffix + ".tmp")
    with _kept(path):
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    with contextlib.suppress(OSError):  # not every file system knows it of a directory
        _sync(path.parent)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


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
