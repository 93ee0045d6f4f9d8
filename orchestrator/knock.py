"""Whether a Ray head answers at an address, and takes our token: asked in a second, where Ray would try for twenty.

Called by `orchestrator.cluster` before it connects.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

LIMIT_S = 5.0
WHO_ARE_YOU = "/ray.rpc.NodeInfoGcsService/GetClusterId"
"""A call that every head answers to whoever it lets in."""
WHERE_TOKENS_ARE = (
    "on the head `ray get-auth-token` prints the token; here it is read from RAY_AUTH_TOKEN, or from a copy of the "
    "head's ~/.ray/auth_token"
)


def refusal(address: str) -> str | None:
    """Return why nothing can be had at `address` (HOST:PORT; `auto` with RAY_ADDRESS set), with what to do about it.

    None: a head answers, or the address is nothing that could be asked.
    """
    target = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
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
