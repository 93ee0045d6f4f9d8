"""Which Ray head is meant, and whether it answers and takes our token: asked in a second where Ray tries for twenty.

Called by `orchestrator.cluster` before it connects.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable
from pathlib import Path

import psutil

LIMIT_S = 5.0
WHO_ARE_YOU = "/ray.rpc.NodeInfoGcsService/GetClusterId"
"""A call that every head answers to whoever it lets in."""
WHERE_TOKENS_ARE = (
    "on the head `ray get-auth-token` prints the token; here it is read from RAY_AUTH_TOKEN, or from a copy of the "
    "head's ~/.ray/auth_token"
)


HEAD_OF_A_RAYLET = "--gcs-address="


class NotOneHead(LookupError):
    """`auto` names no head, or several; with what to do about it."""


def named(address: str) -> str:
    """Return the address itself, or for `auto` what RAY_ADDRESS says, else the head of this user's raylets here.

    Ray would take `auto` from the command lines of all users' processes, and from a file that all may write; and what a
    head sends back is executed. Raises `NotOneHead`.
    """
    if address != "auto":
        return address
    if (said := os.environ.get("RAY_ADDRESS", "")) not in ("", "auto"):
        return said
    heads = heads_of(psutil.process_iter())
    if len(heads) == 1:
        return heads[0]
    seen = f"belongs to several clusters ({', '.join(heads)})" if heads else "runs no node of a Ray cluster"
    raise NotOneHead(
        f"cluster=auto: user {os.getuid()} {seen} on this host, and those of other users are not joined unnamed: "
        "say cluster.address=HOST:PORT, or export RAY_ADDRESS"
    )


def heads_of(processes: Iterable[psutil.Process]) -> list[str]:
    """Return the addresses of the heads that this user's raylets among some processes belong to, each once, sorted."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if process.uids().real == os.getuid() and process.name() == "raylet":
                words = [word for word in process.cmdline() if word.startswith(HEAD_OF_A_RAYLET)]
                found |= {word.removeprefix(HEAD_OF_A_RAYLET) for word in words}
    return sorted(found - {""})


def refusal(target: str) -> str | None:
    """Return why nothing can be had at an address (HOST:PORT), with what to do about it.

    None: a head answers, or the address is nothing that could be asked.
    """
    host, colon, port = target.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return None
    try:
        socket.create_connection((host.strip("[]"), int(port)), LIMIT_S).close()
    except OSError as error:
        return f"nobody listens at {target} ({error}): is `ray start --head` running there?"
    return None if target.startswith("ray://") else _token_refusal(target)


def _token_refusal(target: str) -> str | None:
    sends_token, token = os.environ.get("RAY_AUTH_MODE", "").lower() == "token", _token()
    if not _is_refused(target, token if sends_token else None):
        return None
    if not sends_token:
        return f"the cluster at {target} asks for a token: export RAY_AUTH_MODE=token; {WHERE_TOKENS_ARE}"
    if token is None:
        return f"the cluster at {target} asks for a token and there is none here; {WHERE_TOKENS_ARE}"
    return f"the cluster at {target} refuses the token that is here: it is another cluster's; {WHERE_TOKENS_ARE}"


def _token() -> str | None:
    """The token as Ray finds it."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return path.read_text().strip() or None
    except OSError:
        return None


def _is_refused(target: str, token: str | None) -> bool:
    """Whether the head says that it does not know us; anything else is for Ray itself to say."""
    import grpc

    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        call = channel.unary_unary(WHO_ARE_YOU)
        try:
            call(b"", timeout=LIMIT_S, metadata=[("authorization", f"Bearer {token}")] if token else None)
        except grpc.RpcError as error:
            return bool(error.code() is grpc.StatusCode.UNAUTHENTICATED)
    return False
