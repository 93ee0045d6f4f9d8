"""Single small requests to a server: health, models, metrics. Blocking; for polling and scraping, never for load."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from workers import metrics
from workers.load.endpoint import Endpoint


class NoAnswer(Exception):
    """Nobody answered in time."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def get(endpoint: Endpoint, path: str, timeout_s: float = 5.0, api_key: str | None = None) -> tuple[int, str]:
    """Return status and body of GET `path`. `api_key` replaces the endpoint's own. Raises `NoAnswer`."""
    return _ask(endpoint, "GET", path, None, timeout_s, api_key or endpoint.api_key)


def post(endpoint: Endpoint, path: str, body: Any, timeout_s: float) -> tuple[int, str]:
    """Return status and body of POST `path` with `body` as JSON. Raises `NoAnswer`."""
    return _ask(endpoint, "POST", path, json.dumps(body), timeout_s, endpoint.api_key)


def server_metrics(endpoint: Endpoint) -> metrics.ServerMetrics:
    """Return what `/metrics` says; empty where the server has none. Raises `NoAnswer`."""
    status, text = get(endpoint, "/metrics")
    return metrics.parse(text) if status == 200 else metrics.ServerMetrics()


def _ask(
    endpoint: Endpoint, method: str, path: str, body: str | None, timeout_s: float, key: str | None
) -> tuple[int, str]:
    connection: http.client.HTTPConnection
    if endpoint.uds is not None:
        connection = _UnixConnection(Path(endpoint.uds), timeout_s)
    else:
        parts = urlsplit(endpoint.base_url)
        connection = http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port, timeout=timeout_s)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    if body is not None:
        headers["Content-Type"] = "application/json"
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        raise NoAnswer(str(error)) from None
    finally:
        connection.close()
