"""Does a trial's faults to a run: finds whom a signal goes to, and sees to it that what it stopped goes on."""

import contextlib
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.chaos.schedule import Fault, Kind, Role
from workers.launch.warm import PID_FILE

_REGISTERED = {Role.SERVER: "server", Role.CORE: "core", Role.GUARD: "guard"}
_TITLES = {Role.ACTOR: "ray::SessionActor", Role.LOAD_TASK: "ray::generate", Role.WARM_ACTOR: "ray::WarmActor"}
_TAKEN = {
    Kind.SLOW_STREAM: "slow", Kind.CUT_STREAM: "cut", Kind.PORT_TAKEN: "port", Kind.EARLY_READY: "early",
}  # fmt: skip
_ENDING = {Kind.INTERRUPT: signal.SIGINT, Kind.TWO_INTERRUPTS: signal.SIGINT, Kind.SIGTERM: signal.SIGTERM}
SECOND_INTERRUPT_S = 1.2
DISK_BYTES = 2**31


@dataclass
class Disk:
    """A small file system of its own for the run directories, which can be filled and made read-only."""

    root: Path
    mounted: bool = False

    def mount(self) -> None:
        """Mount it, where that is permitted."""
        self.mounted = _mounts("-t", "tmpfs", "-o", f"size={DISK_BYTES}", "chaos", str(self.root))

    def fill(self) -> bool:
        """Let nothing more fit."""
        return self.mounted and _mounts("-o", f"remount,size={shutil.disk_usage(self.root).used or 1}", str(self.root))

    def make_read_only(self) -> bool:
        """Take no more writes. The kernel refuses while a file is open for writing: tried again for a second."""
        deadline = time.monotonic() + 1
        while self.mounted and time.monotonic() < deadline:
            if _mounts("-o", "remount,ro", str(self.root)):
                return True
            time.sleep(0.01)
        return False

    def mend(self) -> None:
        """Undo both."""
        if self.mounted:
            assert _mounts("-o", f"remount,rw,size={DISK_BYTES}", str(self.root))

    def unmount(self) -> None:
        """Give it back."""
        if self.mounted:
            subprocess.run(["umount", "--lazy", str(self.root)], capture_output=True, check=True)
            self.mounted = False


@dataclass
class Hurting:
    """The faults of one run. `processes` gives what belongs to it now; `spared` are raylets that must live."""

    faults: Path
    disk: Disk
    driver: subprocess.Popen[str]
    processes: Callable[[], Iterable[psutil.Process]]
    spared: Callable[[psutil.Process], bool] = lambda process: False
    done: list[Fault] = field(default_factory=list)
    asked: list[Fault] = field(default_factory=list)
    """Of those that are taken: whether they were is known at the end."""
    _stopped: list[tuple[float, psutil.Process]] = field(default_factory=list)
    _second_at: float | None = None

    def try_to(self, fault: Fault) -> bool:
        """Do a fault. False where there is nobody (yet) that it could be done to."""
        if fault.role is not None:
            done = self._signal(fault)
        elif fault.kind in _TAKEN:
            (self.faults / _TAKEN[fault.kind]).touch()
            self.asked.append(fault)
            return True
        elif fault.kind in _ENDING:
            done = self._send(psutil.Process(self.driver.pid), _ENDING[fault.kind])
            if fault.kind is Kind.TWO_INTERRUPTS:
                self._second_at = time.monotonic() + SECOND_INTERRUPT_S
        else:
            done = self.disk.fill() if fault.kind is Kind.FULL_DISK else self.disk.make_read_only()
        if done:
            self.done.append(fault)
        return done

    def tick(self) -> None:
        """Let those go on whose time is over."""
        now = time.monotonic()
        for until, process in list(self._stopped):
            if now >= until:
                self._send(process, signal.SIGCONT)
                self._stopped.remove((until, process))
        if self._second_at is not None and now >= self._second_at:
            self._second_at = None
            with contextlib.suppress(psutil.Error):
                self._send(psutil.Process(self.driver.pid), signal.SIGINT)

    def end(self) -> None:
        """All go on; what nobody took is taken back."""
        for _, process in self._stopped:
            self._send(process, signal.SIGCONT)
        self._stopped.clear()
        for fault in self.asked:
            waiting = self.faults / _TAKEN[fault.kind]
            if waiting.exists():
                waiting.unlink()
            else:
                self.done.append(fault)

    def _signal(self, fault: Fault) -> bool:
        found = sorted(self._of(fault.role), key=lambda process: process.pid)  # type: ignore[arg-type]
        if fault.kind is Kind.KILL and fault.role is Role.RAYLET:
            found = [process for process in found if not self.spared(process)]
        if not found:
            return False
        target = found[int(fault.pick * len(found))]
        if fault.kind is Kind.KILL:
            return self._send(target, signal.SIGKILL)
        self._stopped.append((time.monotonic() + fault.seconds, target))
        return self._send(target, signal.SIGSTOP)

    def _of(self, role: Role) -> list[psutil.Process]:
        if role is Role.DRIVER:
            return [psutil.Process(self.driver.pid)] if self.driver.poll() is None else []
        if role in _REGISTERED:
            return list(registered(self.faults, _REGISTERED[role]))
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if role is Role.RAYLET:
                    fits = process.name() == "raylet"
                elif role is Role.WARM_PARENT:
                    fits = _is_warm_parent(process)
                else:
                    fits = " ".join(process.cmdline()).startswith(_TITLES[role])
                if fits:
                    found.append(process)
        return found

    @staticmethod
    def _send(process: psutil.Process, number: int) -> bool:
        try:
            process.send_signal(number)
        except psutil.Error:
            return False
        return True


def _is_warm_parent(process: psutil.Process) -> bool:
    """Its forks, guards and servers, have its command line: which of them it is stands in its directory."""
    words = process.cmdline()
    at = next((place for place, word in enumerate(words) if word.endswith("warm_parent.py")), None)
    if at is None:
        return False
    try:
        return int((Path(words[at + 3]) / PID_FILE).read_text()) == process.pid
    except (OSError, ValueError, IndexError):  # it is about to be there, or gone
        return False


def _mounts(*words: str) -> bool:
    return subprocess.run(["mount", *words], capture_output=True, check=False).returncode == 0


def registered(faults: Path, role: str) -> Iterable[psutil.Process]:
    """Give the living among those that servers have named, not later processes that have their numbers."""
    for path in faults.glob(f"{role}.*"):
        with contextlib.suppress(psutil.Error, OSError):
            process = psutil.Process(int(path.suffix[1:]))
            if process.create_time() <= path.stat().st_mtime + 0.05 and process.status() != psutil.STATUS_ZOMBIE:
                yield process
