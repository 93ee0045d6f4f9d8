"""A process whose owner is out of reach ends by itself, and not before."""

import subprocess
import sys

from tests.command_line import ROOT

PROGRAM = """
import time
from workers.lease import Lease
lease = Lease(lambda: print("last act", flush=True), lease_s=0.5)
{renewals}
print("silent", flush=True)
time.sleep(60)
"""


def ended(renewals: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM.format(renewals=renewals)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)


def test_it_acts_once_more_and_ends() -> None:
    done = ended("")
    assert (done.stdout.split("\n")[:2], done.returncode) == (["silent", "last act"], 1)


def test_renewed_it_goes_on() -> None:
    done = ended("for _ in range(20): time.sleep(0.1); lease.renew()")
    assert (done.stdout.split("\n")[:2], done.returncode) == (["silent", "last act"], 1)


def test_a_last_act_that_fails_ends_it_too() -> None:
    program = PROGRAM.format(renewals="").replace('print("last act", flush=True)', "1 / 0")
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=30).returncode == 1
