"""Hosts of one Ray cluster on this machine, each started by hand as a user would; none outlives the block.

A host may have a network namespace of its own, joined to the other's by one link that a test can cut.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.command_line import ROOT

BIN = Path(sys.executable).parent
START_LIMIT_S = 90.0
END_LIMIT_S = 20.0


@dataclass
class RayHosts:
    """A head and its workers. `mark` is the TMPDIR of every process that belongs to them."""

    mark: Path
    addresses: tuple[str, ...] = ("127.0.0.1",)
    namespaces: tuple[str, ...] = ()
    token: str | None = None
    port: int = 0
    dashboard_port: int = 0
    variables: dict[str, str] = field(default_factory=dict)
    """More of the environment of every process."""
    _started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Of the head, as `cluster.address` takes it."""
        return f"{self.addresses[0]}:{self.port}"

    def environment(self, **more: str) -> dict[str, str]:
        """Return the environment of a user of these hosts."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        mine = {
            "HOME": str(self.mark / "home"),
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(self.mark),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_AUTH_MODE": "disabled",
            "RAY_health_check_failure_threshold": "2",  # a silent node is given up after half a minute, not a whole one
        }
        if self.token:
            mine |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        return {**inherited, **mine, **self.variables, **more}

    def command(self, host: int, *words: str) -> list[str]:
        """Return a command as it is run on a host."""
        inside = ["ip", "netns", "exec", self.namespaces[host]] if self.namespaces else []
        return [*inside, *words]

    def start_head(self, gpus: int, dashboard: bool = False) -> None:
        """Start the first host."""
        self.port, self.dashboard_port = _free_port(), _free_port()
        self._start(
            0, gpus, "--head", f"--port={self.port}", f"--ray-client-server-port={_free_port()}",
            f"--include-dashboard={'true' if dashboard else 'false'}", f"--dashboard-port={self.dashboard_port}",
            f"--temp-dir={self.mark}/r",
        )  # fmt: skip

    def start_worker(self, host: int, gpus: int) -> subprocess.Popen[str]:
        """Start another host, or another node of the only one; return the process that it hangs on."""
        return self._start(host, gpus, f"--address={self.address}")

    def _start(self, host: int, gpus: int, *words: str) -> subprocess.Popen[str]:
        own = self.addresses[min(host, len(self.addresses) - 1)]
        command = [
            str(BIN / "ray"), "start", "--block", *words, f"--node-ip-address={own}", "--num-cpus=4",
            f"--num-gpus={gpus}", "--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={2**27}",
        ]  # fmt: skip
        process = subprocess.Popen(
            self.command(host, *command), env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip
        self._started.append(process)
        assert process.stdout
        seen: list[str] = []
        while "Ray runtime started" not in "".join(seen[-1:]):
            seen.append(process.stdout.readline())
            assert process.poll() is None, "".join(seen)
        return process

    def orchestrate(self, *arguments: str, host: int = 0, **environment: str) -> subprocess.Popen[str]:
        """Start our program on a host."""
        command = self.command(host, sys.executable, "-u", "-m", "orchestrator", *arguments)
        return subprocess.Popen(
            command, cwd=ROOT, env=self.environment(**environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip

    def processes(self) -> list[psutil.Process]:
        """Return all that lives of these hosts."""
        found = []
        for process in psutil.process_iter(["environ", "status"]):
            if (process.info["environ"] or {}).get("TMPDIR", "").startswith(str(self.mark)):
                found.append(process)
        return found

    def servers(self) -> list[psutil.Process]:
        """Return the stand-in servers and guards that live."""
        words = ("sim_server.py", "guard.py")
        return [each for each in self.processes() if any(word in " ".join(_cmdline(each)) for word in words)]

    def kill_raylet(self, node: subprocess.Popen[str]) -> None:
        """Kill what a node is, as a crash would; what it has started is left to itself."""
        (raylet,) = [each for each in psutil.Process(node.pid).children(recursive=True) if each.name() == "raylet"]
        raylet.kill()

    def close(self) -> None:
        """End every process."""
        for process in reversed(self._started):
            process.send_signal(signal.SIGTERM)
        for process in self._started:
            try:
                process.communicate(timeout=END_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
        for process in self.processes():
            process.kill()


@contextmanager
def ray_hosts(token: str | None = None) -> Iterator[RayHosts]:
    """Lend hosts of this machine's own network; their directory's name is short enough for Ray's sockets."""
    with _made(RayHosts(_mark(), token=token)) as hosts:
        yield hosts


@contextmanager
def linked_hosts() -> Iterator[RayHosts]:
    """Lend two hosts in network namespaces, one link between them. Raises `OSError` where that is not permitted."""
    number = os.getpid() % 10000
    namespaces = (f"vct{number}a", f"vct{number}b")
    addresses = ("10.213.7.1", "10.213.7.2")
    try:
        for namespace in namespaces:
            _ip("netns", "add", namespace)
        _ip("-n", namespaces[0], "link", "add", "l0", "type", "veth", "peer", "name", "l0", "netns", namespaces[1])
        for namespace, own, other in zip(namespaces, addresses, reversed(addresses), strict=True):
            _ip("-n", namespace, "addr", "add", f"{own}/24", "dev", "l0")
            _ip("-n", namespace, "link", "set", "lo", "up")
            _ip("-n", namespace, "link", "set", "l0", "up")
            _ip("-n", namespace, "route", "add", "default", "via", other)  # Ray asks its routes which address it has
        with _made(RayHosts(_mark(), addresses, namespaces)) as hosts:
            yield hosts
    finally:
        for namespace in namespaces:
            subprocess.run(["ip", "netns", "del", namespace], check=False, capture_output=True)


def set_link(hosts: RayHosts, up: bool) -> None:
    """Cut the link between two hosts, or mend it."""
    _ip("-n", hosts.namespaces[1], "link", "set", "l0", "up" if up else "down")
    if up:  # routes went with the link
        _ip("-n", hosts.namespaces[1], "route", "replace", "default", "via", hosts.addresses[0])


def _ip(*words: str) -> None:
    try:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise OSError(f"ip {' '.join(words)}: {error.stderr.strip()}") from None


@contextmanager
def _made(hosts: RayHosts) -> Iterator[RayHosts]:
    (hosts.mark / "home").mkdir()
    try:
        yield hosts
    finally:
        hosts.close()
        shutil.rmtree(hosts.mark, ignore_errors=True)


def _mark() -> Path:
    return Path(tempfile.mkdtemp(prefix="vct-", dir="/tmp"))


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(words: str, process: subprocess.Popen[str], limit_s: float = START_LIMIT_S) -> str:
    """Read what a process says until it says `words`; return all of it."""
    assert process.stdout
    said = ""
    deadline = time.monotonic() + limit_s
    while words not in said:
        line = process.stdout.readline()
        said += line
        assert line or process.poll() is None, said
        assert time.monotonic() < deadline, said
    return said
