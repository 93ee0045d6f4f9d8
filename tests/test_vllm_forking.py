"""The platform plugin that lets a forked server of the CPU build fork its engine, against a stand-in for vLLM."""

import importlib.metadata
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from workers.engines.vllm import FORKING

METHOD = "VLLM_WORKER_MULTIPROC_METHOD"


class CpuPlatform:
    """Has all processes spawned, as vLLM's does."""

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        os.environ[METHOD] = "spawn"


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.syspath_prepend(str(FORKING))
    monkeypatch.setenv(METHOD, "unset")

    def load(chosen: str) -> Any:
        for name in ("vllm", "vllm.platforms", "vllm.platforms.cpu"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setattr(sys.modules["vllm.platforms"], "cpu_platform_plugin", lambda: chosen, raising=False)
        monkeypatch.setattr(sys.modules["vllm.platforms.cpu"], "CpuPlatform", CpuPlatform, raising=False)
        monkeypatch.delitem(sys.modules, "vllm_forking", raising=False)
        (entry,) = importlib.metadata.entry_points(group="vllm.platform_plugins", name="forking_cpu")
        return entry.load()

    return load


def test_the_plain_cpu_platform_is_replaced_and_no_other(plugin: Callable[[str], Any]) -> None:
    assert plugin("vllm.platforms.cpu.CpuPlatform")() == "vllm_forking.ForkingCpuPlatform"
    assert plugin("vllm.platforms.zen_cpu.ZenCpuPlatform")() is None


@pytest.mark.parametrize(("asked", "here", "in_a_fork"), [("fork", "fork", "spawn"), ("spawn", "spawn", None)])
def test_the_engine_is_forked_where_asked_and_spawns_its_worker(
    asked: str, here: str, in_a_fork: str | None, plugin: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin("vllm.platforms.cpu.CpuPlatform")
    hooks: list[Callable[[], None]] = []
    monkeypatch.setattr(os, "register_at_fork", lambda after_in_child: hooks.append(after_in_child))
    monkeypatch.setenv(METHOD, asked)
    sys.modules["vllm_forking"].ForkingCpuPlatform.check_and_update_config(None)
    assert os.environ[METHOD] == here
    for hook in hooks:
        hook()
    assert bool(hooks) == (in_a_fork is not None)
    assert os.environ[METHOD] == (in_a_fork or here)
