"""Cores that a server's neighbours and load may use: affinity, what a server binds, and a container's CPU quota."""

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.fleet import local_fleet
from tests.configs import experiment
from workers import cores
from workers.cores import FreeCores, free_cores, usable_cores
from workers.load import tasks


def hosts(monkeypatch: pytest.MonkeyPatch, numbers: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(numbers)))


def files(root: Path, cgroup: str, limits: dict[str, str]) -> tuple[Path, Path]:
    """A /proc and a /sys/fs/cgroup with these."""
    proc, cgroups = root / "proc", root / "cgroup"
    for path, text in {"proc/self/cgroup": cgroup, **{f"cgroup/{name}": text for name, text in limits.items()}}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return proc, cgroups


@pytest.mark.parametrize(
    ("cgroup", "limits", "usable"),
    [
        ("0::/\n", {"cpu.max": "800000 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "20000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 96),
        ("0::/\n", {}, 96),
        ("0::/a.slice/b.scope\n", {"a.slice/cpu.max": "400000 100000\n", "a.slice/b.scope/cpu.max": "max 100000\n"}, 4),
        ("0::/kubepods/pod1/c\n", {"cpu.max": "1600000 100000\n"}, 16),
        (
            "4:memory:/\n3:cpu,cpuacct:/docker/c\n1:name=systemd:/\n0::/\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "1200000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
            12,
        ),
        ("2:cpu:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 96),
        ("3:cpuset:/\n2:cpuacct:/\n", {"cpuset/cpu.cfs_quota_us": "1\n", "cpuset/cpu.cfs_period_us": "1\n"}, 96),
    ],
    ids=[
        "v2", "rounded up", "at least one", "v2 without", "no files", "of a group above", "the host's path",
        "v1", "v1 without", "other controllers",
    ],
)  # fmt: skip
def test_a_cpu_quota_is_what_cores_can_be_kept_busy(
    cgroup: str, limits: dict[str, str], usable: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts(monkeypatch, 96)
    assert usable_cores(*files(tmp_path, cgroup, limits)) == usable


def test_a_quota_above_the_cores_of_the_process_gives_it_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts(monkeypatch, 4)
    assert usable_cores(*files(tmp_path, "0::/\n", {"cpu.max": "800000 100000\n"})) == 4
    assert usable_cores(tmp_path / "no proc", tmp_path) == 4


def test_cores_that_a_server_binds_are_left_to_it() -> None:
    every = sorted(os.sched_getaffinity(0))
    assert free_cores(os.getpid()).numbers == tuple(every)
    bound = subprocess.Popen(["sleep", "60"], preexec_fn=lambda: os.sched_setaffinity(0, every[:1]))
    try:
        assert free_cores(bound.pid).numbers == tuple(every[1:] or every)
    finally:
        bound.kill()
        bound.wait()


@given(every=st.integers(1, 128), bound=st.integers(0, 128), quota=st.integers(1, 128))
def test_what_a_server_has_bound_itself_to_is_not_free_of_the_quota_either(every: int, bound: int, quota: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        at = {0: set(range(every)), 7: set(range(min(bound, every))) or set(range(every))}
        patched.setattr(os, "sched_getaffinity", at.__getitem__)
        patched.setattr(cores, "tree", lambda pid: [pid])
        patched.setattr(cores, "usable_cores", lambda: min(every, quota))
        free = free_cores(7)
    taken = len(at[7]) % every  # bound to all of them is bound to none
    assert len(free.numbers) == every - taken
    assert 1 <= free.at_once <= min(len(free.numbers), quota)
    if quota > taken:
        assert free.at_once == min(every, quota) - taken
    assert free.has_quota == (free.at_once < every - taken)


def test_a_level_has_no_more_load_processes_than_the_quota_keeps_busy() -> None:
    free = FreeCores(tuple(range(96)), 8)
    assert tasks.processes_for(1024, free.at_once) == 4
    assert tasks.processes_again(4, 1024, free.at_once) == 4


def test_the_cpu_backend_has_places_for_what_its_quota_keeps_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: 20)
    asked = experiment("kv", engine__device="cpu", cluster__cores_per_session=8)
    (node,) = local_fleet(asked.cluster, asked.engine).nodes
    assert (node.slots, node.cores) == (2, 20)
