"""Two drivers and one run directory."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.problems import ConfigError
from orchestrator.run_lock import NAME, held
from tests.command_line import ROOT

HOLDS = "import sys, time; from pathlib import Path; from orchestrator.run_lock import held\n"
HOLDS += "with held(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def test_a_second_driver_is_refused_and_told_who_has_the_run(tmp_path: Path) -> None:
    with held(tmp_path):
        with pytest.raises(ConfigError, match=rf"is being measured by process {os.getpid()} on .* since 20"):
            held(tmp_path).__enter__()
        with pytest.raises(ConfigError):  # the refused one has not let go of it
            held(tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []
    with held(tmp_path):
        assert (tmp_path / NAME).stat().st_mode & 0o777 == 0o600


def test_a_driver_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"process {other.pid} "):
        held(tmp_path).__enter__()
    other.send_signal(signal.SIGKILL)
    other.wait()
    with held(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / NAME).read_text()


def test_only_of_another_hosts_lock_it_is_said_how_to_be_rid_of_it(tmp_path: Path) -> None:
    with held(tmp_path):
        with pytest.raises(ConfigError, match=r"or stop it$"):
            held(tmp_path).__enter__()
        (tmp_path / NAME).write_text("process 7 on node9 since 2026-11-24T10:15:00+01:00\n")
        with pytest.raises(ConfigError, match=rf"; where that host is gone for good, remove {tmp_path / NAME}$"):
            held(tmp_path).__enter__()
        (tmp_path / NAME).write_text("")
        with pytest.raises(ConfigError, match=r"measured by another driver: wait for its end, or stop it$"):
            held(tmp_path).__enter__()


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with held(tmp_path):
        assert "takes no locks (Function not implemented)" in capsys.readouterr().out


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="cannot be written"):
        held(tmp_path).__enter__()
    assert not (tmp_path / "elsewhere").exists()
