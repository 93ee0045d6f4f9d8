"""Where load is sent: one OpenAI-compatible server behind TCP or a Unix socket, and how a session to it is opened.

`workers.load.client` and the command line call it. A proxy, a pool limit or a connection that the server has already
given up must never get into a latency.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import re
import urllib.request
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from contract.specs import Api

KEEPALIVE_S = 2.0
"""An idle connection older than this is not used again. uvicorn closes its own after 5 s (and does so without a word:
a request sent at that moment would fail)."""

QUOTED_BYTES = 200
"""Of what a server says when it refuses."""

NO_SOCKET = {
    errno.EMFILE: "this process may open no more files (ulimit -n)",
    errno.ENFILE: "this host may open no more files (fs.file-max)",
    errno.EADDRNOTAVAIL: "this host has no local address or port left for it (net.ipv4.ip_local_port_range)",
}
"""Why a connection cannot be made that says nothing of the server: the client's host has no socket for it."""


class EndpointError(Exception):
    """A server that cannot be used, in one line. `status` is its HTTP status, None where none came."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(" ".join(message.split()))
        self.status = status


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One server and the model asked of it.

    Raises:
        ValueError: `base_url` is no http or https URL of a server, or `api_key` cannot be sent in a header.
    """

    base_url: str
    """Base URL, with or without `/v1`, `/v1/completions`, `/v1/chat/completions`. With `uds`, only its path counts."""
    model: str
    uds: str | None = None
    """Path of a Unix socket to connect to instead of the URL's host and port."""
    api_key: str | None = field(default=None, repr=False)
    """Sent as a bearer token; kept out of `repr`."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.query or parts.fragment or parts.username is not None or parts.password is not None:
            raise ValueError("the URL must have no query, fragment, user name or password")
        try:
            wellformed = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            wellformed = False
        if not wellformed or any(character.isspace() for character in self.base_url):
            raise ValueError(f"not an http:// or https:// URL: {self.base_url!r}")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise ValueError("the API key is empty or has characters that cannot be sent in a header")

    @property
    def root(self) -> str:
        """The URL that `/v1` follows."""
        root = self.base_url.rstrip("/")
        for tail in ("/chat/completions", "/completions", "/v1"):
            root = root.removesuffix(tail).rstrip("/")
        return root

    def load_url(self, api: Api) -> str:
        """Where completions or chats are asked for."""
        return f"{self.root}/v1/{'chat/completions' if api is Api.CHAT else 'completions'}"

    @property
    def tokenize_url(self) -> str:
        """Where vLLM says what tokens a text becomes."""
        return f"{self.root}/tokenize"

    @property
    def models_url(self) -> str:
        """Where the served models are listed."""
        return f"{self.root}/v1/models"

    @property
    def names_chat(self) -> bool:
        """Whether the URL is that of chat completions."""
        return self.base_url.rstrip("/").endswith("/chat/completions")

    def proxy(self) -> str | None:
        """Return the environment's proxy for this server; None for sockets, loopback and hosts in `no_proxy`.

        Looked up once a load, not by aiohttp's `trust_env`: that reads the environment and ~/.netrc in a thread before
        every single request, inside its latency.

        Raises:
            EndpointError: the environment names something else than an HTTP proxy.
        """
        parts = urlsplit(self.base_url)
        host = parts.hostname or ""
        if self.uds is not None or _is_loopback(host) or urllib.request.proxy_bypass(host):
            return None
        proxy = urllib.request.getproxies().get(parts.scheme)
        if proxy is not None and not (proxy.startswith(("http://", "https://")) and urlsplit(proxy).hostname):
            raise EndpointError(f"the proxy {_named(proxy)} (from {parts.scheme}_proxy) is no http:// URL")
        return proxy


def _named(proxy: str) -> str:
    """A proxy without its user name and password."""
    return re.sub(r"[^/]*@", "", proxy)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def open_session(endpoint: Endpoint) -> aiohttp.ClientSession:
    """Return a session for one load on `endpoint`, to be called in a running loop and closed by the caller.

    It has no connection limit (the closed loop is the limit), no time limit (the caller sets one), no cookies, no
    compression and no redirects of its own. The first request of each connection pays for connecting.
    """
    headers = {"Accept": "text/event-stream, application/json", "Accept-Encoding": "identity"}
    if endpoint.api_key is not None:
        headers["Authorization"] = f"Bearer {endpoint.api_key}"
    connector: aiohttp.BaseConnector
    if endpoint.uds is not None:
        connector = aiohttp.UnixConnector(endpoint.uds, limit=0, keepalive_timeout=KEEPALIVE_S)
    else:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S)
    return aiohttp.ClientSession(
        connector=connector,
        headers=headers,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
    )


async def served_models(endpoint: Endpoint, timeout_s: float) -> dict[str, int | None]:
    """Return the models `endpoint` serves, in its order; `endpoint.model` is not looked at.

    Each with its `max_model_len`, prompt and answer together in tokens; None where the server does not say (vLLM does).

    Raises:
        EndpointError: not reachable within `timeout_s` seconds, refused, or the answer is no list of models.
    """
    url = endpoint.models_url
    answer = await ask(endpoint, url, timeout_s)
    try:
        models = {entry["id"]: entry.get("max_model_len") for entry in answer["data"]}
    except (LookupError, TypeError, AttributeError):
        models = {}
    if not models or not all(isinstance(name, str) for name in models):
        raise EndpointError(f"{url} answered no list of models: no OpenAI-compatible server?", 200)
    return {name: length if type(length) is int else None for name, length in models.items()}


STREAMED = object()
"""What `ask` returns for an answer that came as a stream, wanted or not."""


async def ask(endpoint: Endpoint, url: str, timeout_s: float, body: Any = None) -> Any:
    """Return the JSON that the server answers at `url`, one of the endpoint's; `STREAMED` where that is a stream of
    events, None where it is neither.

    A GET, or with `body` a POST of it as JSON. For what is asked before a load; never inside a window.

    Raises:
        EndpointError: not reachable within `timeout_s` seconds, or refused (its `status` then says how).
    """
    timeout, proxy = aiohttp.ClientTimeout(total=timeout_s), endpoint.proxy()
    through = "" if proxy is None else f" through the proxy {_named(proxy)}"
    try:
        async with (
            open_session(endpoint) as session,
            session.request(
                "GET" if body is None else "POST", url, json=body, proxy=proxy, timeout=timeout,
                allow_redirects=False,
            ) as response,
        ):  # fmt: skip
            status, text, kind = response.status, await response.read(), response.content_type
    except TimeoutError:
        raise EndpointError(f"{url} did not answer{through} within {timeout_s:g} s") from None
    except (aiohttp.ClientError, OSError) as error:
        raise EndpointError(f"cannot reach {url}{through}: {in_words(error)}") from None
    if status in (401, 403):
        raise EndpointError(f"{url} wants another API key (HTTP {status})", status)
    if status != 200:
        words = text[:QUOTED_BYTES].decode(errors="replace")
        raise EndpointError(f"{url} answered HTTP {status} ({words}): no OpenAI-compatible server?", status)
    if kind == "text/event-stream":
        return STREAMED
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def in_words(error: Exception) -> str:
    """Return what an exception of aiohttp or of the system says, without aiohttp's own terms."""
    if isinstance(error, OSError) and error.errno in NO_SOCKET:
        return f"{NO_SOCKET[error.errno]}: the client's limit, not the server's"
    return re.sub(r" ssl:(default|True|False|None|<.*?>) ", " ", str(error)) or type(error).__name__
