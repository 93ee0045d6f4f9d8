"""One trial: a run with its faults, at most one resume, and what the oracle says of both."""

import contextlib
import subprocess
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos import oracle, standin
from tests.chaos.hurt import Disk, Hurting
from tests.chaos.place import ChaosPlace
from tests.chaos.schedule import Fault, Kind, Role, Trial

GRID = (
    "-m", "+sweep=concurrency,kv", "engine=sim", "model=tiny", "controls=off", "server.extra_args={step_s: 0.02}",
    "engine.stop_grace_s=2", "engine.ready_timeout_s=20", "engine.memory_back_s=3", "load.requests_min=6",
    "load.requests_per_level=1", "load.output_tokens=12",
)  # fmt: skip
POINTS = 6 + 8
RUN_LIMIT_S = 150.0
BEGUN = "results in"
OK, BAD_CONFIGURATION, SOME_FAILED, INTERRUPTED = 0, 2, 3, 130
LOSING = (
    Kind.FULL_DISK, Kind.READ_ONLY, Kind.INTERRUPT, Kind.TWO_INTERRUPTS, Kind.SIGTERM,
    (Kind.KILL, Role.ACTOR), (Kind.KILL, Role.RAYLET), (Kind.KILL, Role.DRIVER),
)  # fmt: skip
"""What may cost a measurement that has just ended."""
FORBIDDEN = dict.fromkeys((Kind.FULL_DISK, Kind.READ_ONLY), " (mounting is not permitted here)")
ENDS = (OK, SOME_FAILED, INTERRUPTED, -9)


@dataclass
class Report:
    """What came of a trial. No findings: it survived."""

    trial: Trial
    done: list[Fault] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    resumed: bool = False
    statuses: Counter[str] = field(default_factory=Counter)
    starts: Counter[str] = field(default_factory=Counter)
    """Of the points' servers: a run that is to fork may have had to start them cold."""
    findings: list[str] = field(default_factory=list)
    said: str = ""
    may_mount: bool = True

    @property
    def not_tried(self) -> list[str]:
        """What was drawn and not done: nobody was there to do it to, the run had ended, or it is not permitted here."""
        left = [fault for fault in (*self.trial.during, *self.trial.after) if fault not in self.done]
        return [f"{fault.name}{'' if self.may_mount else FORBIDDEN.get(fault.kind, '')}" for fault in left]

    def __str__(self) -> str:
        faults = "; ".join([*map(str, self.done), *(f"not tried: {name}" for name in self.not_tried)])
        ended = ", ".join(f"{count} {status}" for status, count in sorted(self.statuses.items()))
        forked = f", {self.starts['warm']} on forked servers" if self.trial.warm else ""
        line = f"seed {self.trial.seed} on {self.trial.where}: exits {self.codes}: {ended}{forked}: {faults}"
        return "\n".join([line, *(f"  FOUND {finding}" for finding in self.findings)])


class _Voice:
    """What a program says, read as it says it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.said = ""
        self._process = process
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self.said += line

    def all(self) -> str:
        self._thread.join(5)  # a child that outlives it would keep the pipe open
        return self.said


def carry_out(trial: Trial, place: ChaosPlace, outputs: Path) -> Report:
    """Run a trial below `outputs`, an empty directory."""
    report = Report(trial)
    disk = Disk(outputs)
    disk.mount()
    report.may_mount = disk.mounted
    try:
        _first(trial, place, disk, report)
        _second(trial, place, outputs, report)
    finally:
        disk.unmount()
        place.clear()
    return report


def _first(trial: Trial, place: ChaosPlace, disk: Disk, report: Report) -> None:
    place.ready()
    how = [f"server.start={'warm' if trial.warm else 'cold'}", f"server.transport={'tcp' if trial.tcp else 'uds'}"]
    process = place.orchestrate(*GRID, *how, f"output_root={disk.root}")
    voice = _Voice(process)
    hurting = Hurting(place.faults, disk, process, place.processes, place.is_head)
    began, deadline = None, time.monotonic() + RUN_LIMIT_S
    waiting = list(trial.during)
    while process.poll() is None and time.monotonic() < deadline:
        hurting.tick()
        if began is None and BEGUN in voice.said:
            began = time.monotonic()
        if began is not None:
            for fault in [each for each in waiting if time.monotonic() >= began + each.at_s]:
                if hurting.try_to(fault):
                    waiting.remove(fault)
        time.sleep(0.02)
    hurting.end()
    _ended(process, voice, report)
    report.done += hurting.done
    disk.mend()
    left = [f"after the run: {what}" for what in place.left(killed=report.codes == [-9])]
    report.findings += left


def _second(trial: Trial, place: ChaosPlace, outputs: Path, report: Report) -> None:
    directories = [path for path in outputs.iterdir() if path.is_dir()]
    if len(directories) != 1 or not (directories[0] / "manifest.json").exists():
        report.findings.append(f"no run directory with a manifest: {directories}")
        return
    (directory,) = directories
    for fault in trial.after:
        shards = sorted(directory.glob("shards/*/*.parquet"))
        if shards:
            shard = shards[int(fault.pick * len(shards))]
            shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
            standin.tell(place.faults, "halved", shard.parent.name, shard.stem)
            report.done.append(fault)
    kept = oracle.kept_by(directory)
    if report.codes != [OK] or any(fault.kind is Kind.HALF_SHARD for fault in report.done):
        report.resumed = True
        place.ready()

        process = place.orchestrate(f"resume={directory}")
        voice = _Voice(process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(RUN_LIMIT_S)
        _ended(process, voice, report)
        report.findings += [f"after the resume: {what}" for what in place.left()]
        if report.codes[-1] not in (OK, SOME_FAILED):
            report.findings.append(f"the resume ended with {report.codes[-1]}")
    try:
        report.findings += oracle.findings(directory, POINTS, kept)
        losing = any(fault.kind in LOSING or (fault.kind, fault.role) in LOSING for fault in report.done)
        report.findings += oracle.repeated(directory, (place.faults / standin.TOLD).read_text(), losing)
    except (OSError, ValueError, KeyError) as error:
        report.findings.append(f"no store to look at: {type(error).__name__}: {error}")
    report.statuses, report.starts = oracle.statuses(directory), oracle.starts(directory)


def _ended(process: subprocess.Popen[str], voice: _Voice, report: Report) -> None:
    if process.poll() is None:
        report.findings.append(f"it hung: not ended after {RUN_LIMIT_S:.0f} s")
        process.kill()
    report.codes.append(process.wait())
    said = voice.all()
    report.said += f"--- exit {report.codes[-1]}\n{said}"
    if "Traceback" in said:
        report.findings.append("it said a traceback")
    if report.codes[-1] not in ENDS:
        report.findings.append(f"exit code {report.codes[-1]}")
