"""The platform plugin that lets a forked server of the CPU build fork its engine, against a stand-in for vLLM."""

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import spawn
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from workers.engines.vllm import FORKING

METHOD = "VLLM_WORKER_MULTIPROC_METHOD"


class CpuPlatform:
    """Has all processes spawned, with libraries of its own choice, as vLLM's does."""

    preloads = "/torch/lib/libgomp.so.1"

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        os.environ[METHOD] = "spawn"
        os.environ["LD_PRELOAD"] = f"{cls.preloads}:{os.environ.get('LD_PRELOAD', '')}"


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.syspath_prepend(str(FORKING))
    monkeypatch.setenv(METHOD, "unset")
    monkeypatch.setenv("LD_PRELOAD", "")

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
    monkeypatch.setattr(spawn, "get_command_line", spawn.get_command_line)  # put back at the end
    monkeypatch.setenv(METHOD, asked)
    sys.modules["vllm_forking"].ForkingCpuPlatform.check_and_update_config(None)
    assert os.environ[METHOD] == here
    for hook in hooks:
        hook()
    assert bool(hooks) == (in_a_fork is not None)
    assert os.environ[METHOD] == (in_a_fork or here)


@pytest.mark.parametrize(("had", "forked"), [("", False), ("/usr/lib/libtcmalloc.so.4", True)])
def test_an_engine_that_would_have_another_allocator_is_spawned(
    had: str, forked: bool, plugin: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a build has new programs use tcmalloc, a fork of one without it would not."""
    plugin("vllm.platforms.cpu.CpuPlatform")
    hooks: list[Callable[[], None]] = []
    monkeypatch.setattr(os, "register_at_fork", lambda after_in_child: hooks.append(after_in_child))
    monkeypatch.setattr(CpuPlatform, "preloads", "/vllm/libs/libtcmalloc_minimal-1.so.4")
    monkeypatch.setenv(METHOD, "fork")
    monkeypatch.setenv("LD_PRELOAD", had)
    for _ in range(2):  # a server resolves more than one configuration
        sys.modules["vllm_forking"].ForkingCpuPlatform.check_and_update_config(None)
        assert (os.environ[METHOD], bool(hooks)) == (("fork", True) if forked else ("spawn", False))


def test_a_forked_engines_worker_imports_first_what_it_needs_and_then_runs_its_program(
    plugin: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin("vllm.platforms.cpu.CpuPlatform")
    monkeypatch.setattr(spawn, "get_command_line", lambda **given: ["python", "-c", f"run({given})", "--flag"])
    for _ in range(2):  # registered by every configuration that was resolved
        sys.modules["vllm_forking"]._spawn()
    python, option, program, flag = spawn.get_command_line(pipe_handle=7)
    assert (python, option, flag) == ("python", "-c", "--flag")
    imports, _, own = program.rpartition("; ")
    assert program.count("run_path") == 1
    assert own == "run({'pipe_handle': 7})"
    assert str(FORKING / "vllm_worker_imports.py") in imports


AFTER = """
import gc, runpy, sys
gc.set_threshold(700, 10, 10)
runpy.run_path(sys.argv[1])
import vllm.v1.executor.multiproc_executor as executor
print(*executor.found, *gc.get_threshold(), "vllm.entrypoints.openai.api_server" in sys.modules)
"""
EXECUTOR = "vllm/v1/executor/multiproc_executor"


def after_imports(directory: Path, **modules: str) -> list[str]:
    """The thresholds in the executor's import and after all; whether the server's module is still there."""
    for name in ("vllm/entrypoints/openai/api_server", EXECUTOR, *modules):
        module = directory / f"{name}.py"
        module.parent.mkdir(parents=True, exist_ok=True)
        for package in module.relative_to(directory).parents:
            (directory / package / "__init__.py").touch()
        module.write_text(modules.get(name, "import gc\nfound = gc.get_threshold()\n"))
    done = subprocess.run(
        [sys.executable, "-c", AFTER, str(FORKING / "vllm_worker_imports.py")],
        env={"PYTHONPATH": str(directory)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.split()


def test_imports_of_a_worker_collect_new_garbage_alone_and_leave_its_main_module_to_be_run(tmp_path: Path) -> None:
    assert after_imports(tmp_path) == ["700", "10", "1000000000", "700", "10", "10", "False"]  # no cpu_worker


def test_thresholds_that_a_worker_s_import_sets_are_kept(tmp_path: Path) -> None:
    executor = {EXECUTOR: "import gc\nfound = gc.get_threshold()\ngc.set_threshold(600, 9, 8)\n"}
    assert after_imports(tmp_path, **executor)[3:6] == ["600", "9", "8"]
