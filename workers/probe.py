"""Single small requests to a server: health, models, metrics. Blocking; for polling and scraping, never for load."""

from __future__ import annotations

import http.client
import socket
from pathlib import Path
from urllib.parse import urlsplit

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
    key = api_key or endpoint.api_key
    connection: http.client.HTTPConnection
    if endpoint.uds is not None:
        connection = _UnixConnection(Path(endpoint.uds), timeout_s)
    else:
        parts = urlsplit(endpoint.base_url)
        connection = http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port, timeout=timeout_s)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {key}"} if key else {})
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        raise NoAnswer(str(error)) from None
    finally:
        connection.close()
