"""One run on this host whose driver, server or engine core is killed in its middle, and what comes of it.

Used by `tests.chaos.real`. The engine is whatever the run has: real vLLM, or the simulator, which has no engine core.
"""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import psutil
import pyarrow.parquet as pq

from contract.rows import CLIENT_LIMITED, MEASURED, MEMORY_LEFT_BYTES
from tests.chaos import oracle
from tests.chaos.servers import LiveServer, live_servers
from tests.chaos.shape import Shape, differences, shape_of
from tests.command_line import ROOT, Place, made_place
from workers import processes
from workers.devices.nvml import NvmlDevice, visible_cards
from workers.launch import guard

NOTHING_LEFT_S = 10.0
MEMORY_BACK_S = 15.0
LOOKED_S = 60.0
"""What is not gone by then is taken to stay."""
RUN_LIMIT_S = 900.0
SHARED_EVERY_S = 1.0
POLL_S = 0.02
RESUMES = 4
"""At most: one is for the kill, more are for levels whose client a busy host has limited."""
OK, SOME_FAILED, KILLED = 0, 3, -9
MIB = 2**20


class Victim(StrEnum):
    """Whom SIGKILL goes to."""

    DRIVER = "driver"
    SERVER = "server"
    ENGINE_CORE = "engine_core"


class Cards:
    """The memory of this host's GPUs together."""

    def __init__(self) -> None:
        cards = visible_cards()
        self._device = NvmlDevice([card.id for card in cards]) if cards else None

    def used_bytes(self) -> int | None:
        """Return what is in use now; None without GPUs."""
        return sum(self._device.memory_by_card(None)) if self._device else None


@dataclass
class Report:
    """What came of one run."""

    victim: Victim | None
    at_kill: str = ""
    exit_code: int | None = None
    starts: int = 0
    """Of its server, by the run itself."""
    how: str = ""
    """Its server was started last."""
    server_gone_s: float | None = None
    """From the kill until the processes, files and shared memory of the server that lived then were gone."""
    nothing_left_s: float | None = None
    """From the end of the driver."""
    memory_back_s: float | None = None
    """From the kill until GPU memory was what it was before the run, to what readings differ by."""
    shape: Shape | None = None
    resumes: int = 0
    unlike: list[str] = field(default_factory=list)
    """What is not as in the undisturbed run."""
    findings: list[str] = field(default_factory=list)
    said: str = ""

    @property
    def points(self) -> str:
        """How many are measured, of how many."""
        statuses = list(self.shape.statuses.values()) if self.shape else []
        return f"{statuses.count(MEASURED)} of {len(statuses)}, resumed {self.resumes} x"


@dataclass
class _Run:
    """Our program in a place of its own; what it says goes to a file beside its outputs."""

    place: Place
    said: Path

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-u", "-m", "orchestrator", *arguments]
        with self.said.open("ab") as said:
            return subprocess.Popen(
                command, cwd=ROOT, env=self.place.environment(), stdin=subprocess.DEVNULL, stdout=said,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def directory(self) -> Path:
        (directory,) = self.place.outputs.iterdir()
        return directory

    def points(self) -> list[Path]:
        """The shards of points that there are."""
        shards = self.place.outputs.glob("*/shards/*/*.parquet")
        return [path for path in shards if path.name != "session.parquet"]

    def starts(self) -> int:
        """The last start of the server in which a point was measured, or failed."""
        return max(pq.read_table(path, columns=["attempt"])["attempt"][0].as_py() for path in self.points())

    def how(self) -> str:
        """How the server that measured last, or failed, was started: `warm` or `cold`."""
        latest = max(self.points(), key=lambda path: path.stat().st_mtime)
        return pq.read_table(latest, columns=["start"])["start"][0].as_py() or "never started"

    def resume(self) -> list[int]:
        """Go on with it, again where nothing but the client was at fault; return the exit codes."""
        codes: list[int] = []
        while not codes or (codes[-1] == SOME_FAILED and len(codes) < RESUMES and self._was_client_limited()):
            codes.append(self.start(f"resume={self.directory()}").wait(RUN_LIMIT_S))
        return codes

    def _was_client_limited(self) -> bool:
        return oracle.statuses(self.directory()).keys() <= {MEASURED, CLIENT_LIMITED}

    def shared_memory(self) -> set[Path]:
        return guard.shared_memory([process.pid for process in processes.working_in(self.place.mark)])

    def end(self) -> None:
        """End whatever lives of it."""
        for process in processes.working_in(self.place.mark):
            with contextlib.suppress(psutil.Error):
                process.kill()


def undisturbed(asked: list[str], room: Path) -> Report:
    """Make a run that nobody is killed in, in the empty directory `room`."""
    with _made_run(room) as run:
        report = Report(None, exit_code=run.start(*asked, f"output_root={run.place.outputs}").wait(RUN_LIMIT_S))
        codes = run.resume() if report.exit_code == SOME_FAILED else []
        if (codes or [report.exit_code])[-1] == OK:
            report.resumes = len(codes)
            report.findings += [f"left: {what}" for what in run.place.leftovers()]
            report.starts, report.how, report.shape = run.starts(), run.how(), shape_of(run.directory())
        else:
            report.findings.append(f"the undisturbed run ended with {[report.exit_code, *codes]}")
        report.said = run.said.read_text(errors="replace")
    return report


def killed(victim: Victim, asked: list[str], room: Path, cards: Cards, like: Shape) -> Report:
    """Make the same run in `room`, kill the victim, look at what is left, go on with it, hold it against `like`."""
    report = Report(victim)
    with _made_run(room) as run:
        baseline = cards.used_bytes() or 0
        driver = run.start(*asked, f"output_root={run.place.outputs}")
        server = _under_way(driver, run)
        whom = _process_of(victim, driver, server) if server else None
        if server is None or whom is None:
            report.findings.append("no level came under way" if server is None else "it is not to be found")
        else:
            _kill(report, whom, driver, server, run, cards, baseline)
            _judge_end(report)
            _go_on(report, run, like)
        report.said = run.said.read_text(errors="replace")
    return report


def _under_way(driver: subprocess.Popen[bytes], run: _Run) -> LiveServer | None:
    """Wait until a point is done and requests of another are computed; None where the run ends before."""
    deadline = time.monotonic() + RUN_LIMIT_S
    while driver.poll() is None and time.monotonic() < deadline:
        if run.points():
            for server in live_servers(run.place.mark):
                if server.requests():
                    return server
        time.sleep(POLL_S)
    return None


def _process_of(victim: Victim, driver: subprocess.Popen[bytes], server: LiveServer) -> psutil.Process | None:
    if victim is Victim.DRIVER:
        return psutil.Process(driver.pid)
    return server.front_end if victim is Victim.SERVER else server.engine_core()


def _kill(
    report: Report, whom: psutil.Process, driver: subprocess.Popen[bytes], server: LiveServer, run: _Run, cards: Cards,
    baseline: int,
) -> None:  # fmt: skip
    """Kill, and look on until nothing is left, also while the run goes on with another server."""
    tree, shared = server.tree(), run.shared_memory()
    its_paths = {server.workspace.root, *guard.shared_memory([each.pid for each in tree])}
    while not (requests := server.requests()) and driver.poll() is None:  # all this took its time
        time.sleep(POLL_S)
    report.at_kill = f"{len(run.points())} points done, {requests} requests running"
    if (used := cards.used_bytes()) is not None:
        report.at_kill += f", {used / MIB:.0f} MiB of GPU memory in use, {baseline / MIB:.0f} before the run"
    began = looked = time.monotonic()
    whom.kill()
    ended: float | None = None
    while True:
        now = time.monotonic()
        if report.memory_back_s is None and (cards.used_bytes() or 0) <= baseline + MEMORY_LEFT_BYTES:
            report.memory_back_s = now - began
        if report.server_gone_s is None and not any(path.exists() for path in its_paths) and not any(map(_lives, tree)):
            report.server_gone_s = now - began
        if driver.poll() is None:
            if now > looked + SHARED_EVERY_S:
                looked = now
                shared |= run.shared_memory()
            if now > began + RUN_LIMIT_S:
                report.findings.append(f"it hung: not ended {RUN_LIMIT_S:.0f} s after the kill")
                run.end()
        else:
            ended = ended or now
            left = [*run.place.leftovers(), *(str(path) for path in shared if path.exists())]
            if not left and report.nothing_left_s is None:
                report.nothing_left_s = now - ended
            if None not in (report.nothing_left_s, report.memory_back_s, report.server_gone_s):
                break
            if now > ended + LOOKED_S:
                report.findings += [f"left: {what}" for what in left]
                break
        time.sleep(POLL_S)
    report.exit_code, report.starts, report.how = driver.wait(), run.starts(), run.how()


def _judge_end(report: Report) -> None:
    for what, seconds, limit_s in (
        ("the server was there", report.server_gone_s, NOTHING_LEFT_S),
        ("something was left", report.nothing_left_s, NOTHING_LEFT_S),
        ("GPU memory was in use", report.memory_back_s, MEMORY_BACK_S),
    ):
        if seconds is None or seconds > limit_s:
            report.findings.append(f"{what} for {shown(seconds)} s; {limit_s:.0f} are allowed")
    if report.exit_code not in ((KILLED,) if report.victim is Victim.DRIVER else (OK, SOME_FAILED)):
        report.findings.append(f"the run ended with {report.exit_code}")


def _go_on(report: Report, run: _Run, like: Shape) -> None:
    """Resume, and hold what there is then against the plan and the undisturbed run."""
    directory = run.directory()
    kept = oracle.kept_by(directory)
    codes = run.resume()
    report.resumes = len(codes)
    if codes[-1] != OK:
        report.findings.append(f"the resume ended with {codes}")
    report.findings += [f"left after the resume: {what}" for what in run.place.leftovers()]
    report.findings += oracle.findings(directory, len(like.statuses), kept)
    report.shape = shape_of(directory)
    report.unlike = differences(like, report.shape)


@contextmanager
def _made_run(room: Path) -> Iterator[_Run]:
    outputs = room / "outputs"
    outputs.mkdir()
    with made_place(outputs) as place:
        run = _Run(place, room / "said")
        try:
            yield run
        finally:
            run.end()


def _lives(process: psutil.Process) -> bool:
    """A later process of the same number is another one."""
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def shown(seconds: float | None) -> str:
    """Return seconds in words; None is what was not over when nobody looked any more."""
    return f"more than {LOOKED_S:.0f}" if seconds is None else f"{seconds:.1f}"
