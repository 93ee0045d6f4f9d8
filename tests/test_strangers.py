"""Another user of the same host reaches no server and no log, and is never taken for our server."""

import http.server
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest

from contract.failures import FailureClass
from contract.rows import FAILED, MEASURED, SCHEMA_VERSION, PointRow, SessionEnd, SessionRow
from contract.specs import Point
from orchestrator.cluster import Cluster
from orchestrator.fleet import local_fleet
from orchestrator.knock import _is_refused, heads_of
from orchestrator.store import Store
from tests.configs import experiment
from tests.privileged import not_shown
from tests.strangers import as_user, heard, start_as, stranger
from tests.test_session import spec, together
from workers import session as session_module
from workers.engines.base import Address
from workers.launch.warm import WarmParent
from workers.launch.workspace import Workspace
from workers.measuring import Measuring
from workers.session import Session


@pytest.fixture(scope="module")
def user() -> Iterator[int]:
    try:
        with stranger() as made:
            yield made
    except OSError as error:
        not_shown(f"users cannot be made ({error})")


@pytest.fixture
def reachable() -> Iterator[Path]:
    """Return a directory that everybody reaches, as a run directory on a shared host is."""
    import tempfile

    with tempfile.TemporaryDirectory(dir="/tmp") as made:
        Path(made).chmod(0o755)
        yield Path(made)


def connect(path: Path) -> str:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
    return "connected"


def read_all(directory: Path) -> dict[str, str]:
    """Every file below a directory that can be read, however deep."""
    files = [path for path in directory.rglob("*") if path.is_file() and os.access(path, os.R_OK)]
    return {str(path): path.read_text(errors="replace") for path in files}


def test_a_server_on_its_socket_and_its_log_are_out_of_reach(user: int) -> None:
    session = Session(spec(), "r", 1, ["0"], together)
    try:
        assert session.start().status == MEASURED
        workspace: Workspace = session._workspace
        assert connect(workspace.socket) == "connected"
        assert as_user(user, lambda: connect(workspace.socket))["raised"] == "PermissionError"
        assert as_user(user, lambda: workspace.log.read_text())["raised"] == "PermissionError"
        assert as_user(user, lambda: [str(path) for path in workspace.root.iterdir()])["raised"] == "PermissionError"
    finally:
        session.stop()


def test_a_warm_parent_is_out_of_reach(user: int) -> None:
    parent = WarmParent(("json",), dict(os.environ))
    try:
        assert as_user(user, lambda: connect(parent.socket))["raised"] == "PermissionError"
    finally:
        parent.close()


def test_logs_of_a_run_are_out_of_reach_where_its_tables_are_not(user: int, reachable: Path) -> None:
    store = Store(reachable / "run")
    (store.directory / "logs").mkdir(parents=True)  # as an older version made it
    row = SessionRow(SCHEMA_VERSION, "r", "s", 1, MEASURED, True, "2026-01-01")
    store.put_session(SessionEnd(row, "Request 1 details: prompt: 'a private matter'"))
    assert "private matter" in (store.directory / "logs" / "s.log").read_text()
    seen: dict[str, str] = as_user(user, lambda: read_all(store.directory))
    assert any(path.endswith("session.parquet") for path in seen)
    assert not any("private matter" in text for text in seen.values())


class Impostor(http.server.BaseHTTPRequestHandler):
    """Answers as our server would, and takes the first key it sees for its own."""

    key: ClassVar[str | None] = None

    def do_GET(self) -> None:
        asked = self.headers.get("Authorization")
        Impostor.key = Impostor.key or asked
        self.send_response(401 if self.path != "/health" and asked != Impostor.key else 200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": "tiny", "max_model_len": 512}]}).encode())

    def log_message(self, *_: Any) -> None:
        """Nothing."""


def impersonate(listener: socket.socket) -> str | None:
    """Serve on a listening socket until SIGTERM; return the key that was learned."""
    server = http.server.HTTPServer(("", 0), Impostor, bind_and_activate=False)
    server.socket = listener
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    server.serve_forever(poll_interval=0.05)
    return Impostor.key


def test_whoever_has_taken_our_port_is_not_taken_for_our_server_and_learns_no_key(
    user: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        child = start_as(user, lambda: impersonate(listener))
    monkeypatch.setattr(session_module, "_address", lambda *_: Address(port=port, api_key="the session's own key"))
    session = Session(spec("tcp", start_s=1.0), "r", 1, ["0"], together)
    try:
        row = session.start()
    finally:
        session.stop()
        os.kill(child[0], signal.SIGTERM)
    assert heard(*child) is None
    assert (row.status, row.failure_class) == (FAILED, FailureClass.PORT_TAKEN)


def test_a_server_that_ends_in_the_middle_is_no_measurement_though_another_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = Session(spec("tcp"), "r", 1, ["0"], together)
    try:
        assert session.start().status == MEASURED
        level = Measuring.level

        def measured_by_another(measuring: Measuring, point: Point) -> PointRow:
            row = level(measuring, point)
            assert session._process
            session._process.stop()
            return row

        monkeypatch.setattr(Measuring, "level", measured_by_another)
        row = session.measure(session.spec.points[1])
        assert (row.status, row.failure_class) == (FAILED, FailureClass.ENGINE_DEAD)
    finally:
        session.stop()


def raylet(script: Path, head: str, user: int | None = None) -> subprocess.Popen[bytes]:
    """Start what looks like a node of a Ray cluster."""
    process = subprocess.Popen([script, f"--gcs-address={head}"], stdin=subprocess.PIPE, user=user)
    while psutil.Process(process.pid).name() != script.name:
        time.sleep(0.01)
    return process


def test_another_users_processes_do_not_choose_the_cluster_that_auto_joins(user: int, reachable: Path) -> None:
    script = reachable / "raylet"
    script.write_text("#!/bin/sh\nread never\n")
    script.chmod(0o755)
    started = [raylet(script, "203.0.113.9:6379", user), raylet(script, "127.0.0.1:6379"), raylet(script, "")]
    try:
        assert heads_of(psutil.Process(each.pid) for each in started) == ["127.0.0.1:6379"]
        assert "203.0.113.9:6379" not in heads_of(psutil.process_iter())
    finally:
        for each in started:
            each.communicate()


@pytest.mark.ray
def test_a_private_ray_lets_nobody_in_without_its_key_and_its_files_are_out_of_reach(user: int) -> None:
    asked = experiment("kv", engine="sim", cluster__num_gpus=1)
    with Cluster(asked.cluster, local_fleet(asked.cluster, asked.engine)) as cluster:
        import ray

        head = ray.get_runtime_context().gcs_address
        assert _is_refused(head, None)
        assert not _is_refused(head, os.environ["RAY_AUTH_TOKEN"])
        token = os.environ["RAY_AUTH_TOKEN"]
        assert cluster._private is not None
        directory = cluster._private.path
        assert as_user(user, lambda: [str(path) for path in directory.iterdir()])["raised"] == "PermissionError"
        titles = [words for process in psutil.process_iter(["cmdline"]) for words in process.info["cmdline"] or []]
        assert str(head) in " ".join(titles), "Ray's own processes are among them"
        assert not any(token in words for words in titles)
