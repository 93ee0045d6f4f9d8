"""Proof that the server just started is ready, and is the one that answers. Blocking; reads, never signals.

Used by `workers.session`, and later on by `workers.measuring`. On a Unix socket in our private directory nobody else
can answer. On TCP the port must be held by a process of the server's tree before anything is sent there, the session's
key least of all; the server must then know the key and refuse another one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from contract.failures import FailureClass
from contract.rows import Failure
from contract.specs import SessionSpec
from workers import probe, processes
from workers.launch import diagnosis
from workers.launch.process import ServerProcess
from workers.load.endpoint import Endpoint

POLL_S = 0.1
SILENT_LIMIT_S = 30.0


class StartFailed(Exception):
    """The server did not come up; `failure` says why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def wait_until_ready(
    process: ServerProcess,
    endpoint: Endpoint,
    spec: SessionSpec,
    stopping: Callable[[], bool],
    each_poll: Callable[[], None],
) -> None:
    """Return once this server answers `/health` and names our model with our length. Raises `StartFailed`.

    `each_poll` is called about ten times a second; what it raises ends the wait.
    """
    deadline = time.monotonic() + spec.timeouts.ready_s
    while True:
        if stopping():
            raise StartFailed(Failure(FailureClass.STOPPED, "stopped before the server was ready"))
        if not process.running:
            exit_code = process.wait_for_exit_code()
            raise StartFailed(diagnosis.of_start(process.log_text(), exit_code))
        if time.monotonic() > deadline:
            message = f"not ready after {spec.timeouts.ready_s:.0f} s"
            raise StartFailed(Failure(FailureClass.READY_TIMEOUT, message, process.log_tail()))
        each_poll()
        if _is_held(endpoint, process) and _is_healthy(endpoint):
            break
        time.sleep(POLL_S)
    _prove_identity(endpoint, spec, process)


def _is_held(endpoint: Endpoint, process: ServerProcess) -> bool:
    return endpoint.uds is not None or processes.listens(process.pid, urlsplit(endpoint.base_url).port or 0)


def _is_healthy(endpoint: Endpoint) -> bool:
    try:
        return probe.get(endpoint, "/health")[0] == 200
    except probe.NoAnswer:
        return False


def still_serves(endpoint: Endpoint, process: ServerProcess) -> bool:
    """Return whether a server that was ready says that it and its engine live: vLLM's front end outlives its engine by
    seconds. One that does not answer, for its host pauses say, is asked again for a while."""
    deadline = time.monotonic() + SILENT_LIMIT_S
    while process.running and time.monotonic() < deadline:
        try:
            return probe.get(endpoint, "/health")[0] == 200
        except probe.NoAnswer:
            time.sleep(POLL_S)
    return False


def _prove_identity(endpoint: Endpoint, spec: SessionSpec, process: ServerProcess) -> None:
    def refuse(message: str) -> StartFailed:
        return StartFailed(Failure(FailureClass.WRONG_SERVER, message, process.log_tail()))

    try:
        status, body = probe.get(endpoint, "/v1/models")
        models = {entry["id"]: entry for entry in json.loads(body)["data"]} if status == 200 else {}
        any_key = endpoint.uds is None and probe.get(endpoint, "/v1/models", api_key="not-the-key")[0] != 401
    except (probe.NoAnswer, ValueError, KeyError, TypeError) as error:
        raise refuse(f"/v1/models did not answer as vLLM does: {error!r}") from None
    if spec.model.name not in models:
        raise refuse(f"another server answers: it serves {sorted(models)}, not {spec.model.name}")
    length = models[spec.model.name].get("max_model_len")
    if length is not None and length != spec.server.max_model_len:
        raise refuse(f"the server's max_model_len is {length}, not {spec.server.max_model_len}")
    if any_key:
        raise refuse("another server answers on our port: it takes any key")
