"""The wheel: everything that the tool needs without a checkout, and nothing else.

Built from a copy, without a network, with the setuptools that is here.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("analysis", "contract", "orchestrator", "workers")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


def setuptools_is_new_enough() -> bool:
    try:
        return int(importlib.metadata.version("setuptools").partition(".")[0]) >= 77
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of what a build needs."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in (*PACKAGES, "conf", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not setuptools_is_new_enough():
        pytest.skip("building needs setuptools>=77")
    made = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(made)], cwd=source, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = made.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory as `pip install` would fill site-packages."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def modules(source: Path) -> set[str]:
    return {str(path.relative_to(source)) for name in PACKAGES for path in (source / name).rglob("*.py")}


def configuration(source: Path) -> set[str]:
    return {str(path.relative_to(source)) for path in (source / "conf").rglob("*.yaml")}


def setuptools_table() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    return table


def test_every_package_and_every_directory_of_the_grid_is_listed(source: Path) -> None:
    packages = {".".join(Path(name).parent.parts) for name in modules(source) if name.endswith("__init__.py")}
    grid = {".".join(("orchestrator", *Path(name).parent.parts)) for name in configuration(source)}
    listed = setuptools_table()["packages"]
    assert sorted(listed) == sorted(packages | grid)


def test_no_module_lies_outside_a_package(source: Path) -> None:
    assert [name for name in sorted(modules(source)) if not (source / name).with_name("__init__.py").exists()] == []


def test_the_wheel_has_every_module_the_grid_and_the_types_and_nothing_else(source: Path, wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = {name for name in names if name.partition("/")[0].endswith(".dist-info")}
    expected = modules(source) | {f"orchestrator/{name}" for name in configuration(source)}
    expected |= {f"{package}/py.typed" for package in PACKAGES}
    expected |= {f"analysis/report/page.{kind}" for kind in ("css", "js")}
    expected |= {
        f"workers/engines/forking/vllm_forking-1.dist-info/{name}" for name in ("METADATA", "entry_points.txt")
    }
    assert sorted(names - metadata) == sorted(expected)
    assert [name for name in metadata if name.endswith("licenses/LICENSE")]


def test_the_grid_in_the_wheel_is_the_grid_of_the_checkout(source: Path, installed: Path) -> None:
    for name in configuration(source):
        assert (installed / "orchestrator" / name).read_bytes() == (source / name).read_bytes(), name


def test_the_tool_composes_from_what_the_wheel_brings(installed: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", "+sweep=kv", "model=tiny", "engine=sim", "--cfg", "job"],
        cwd=installed, env={"PATH": "", "PYTHONPATH": str(installed)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "max_model_len:" in done.stdout
    script = "from orchestrator import compose; print(compose.config_dir(), *compose.sweeps())"
    asked = subprocess.run(
        [sys.executable, "-c", script], cwd=installed, env={"PYTHONPATH": str(installed)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    directory, *sweeps = asked.stdout.split()
    assert Path(directory) == installed.resolve() / "orchestrator" / "conf"
    assert {"kv", "concurrency", "batching"} <= set(sweeps)


def test_the_command_is_the_orchestrators_main(installed: Path) -> None:
    (metadata,) = installed.glob("*.dist-info")
    distribution = importlib.metadata.Distribution.at(metadata)
    (script,) = distribution.entry_points.select(group="console_scripts")
    assert (script.name, script.value) == ("vllm-capacity", "orchestrator.__main__:main")
    assert callable(script.load())
    assert distribution.metadata["License-Expression"] == "Apache-2.0"
