"""Hydra composes here, and only here: overrides in, validated experiments out. Nothing later sees OmegaConf.

Called by `orchestrator.__main__`. Imports neither Ray nor vLLM nor pandas, so that `--cfg job` answers at once.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

if TYPE_CHECKING:
    from orchestrator.schema import Experiment


def config_dir() -> Path:
    """Return the directory of the grid: beside this file in a wheel, beside the package in a checkout."""
    here = Path(__file__).resolve().parent
    for directory in (here / "conf", here.parent / "conf"):
        if (directory / "config.yaml").is_file():
            return directory
    raise FileNotFoundError("conf/ was not found next to the orchestrator package: the installation is incomplete")


def sweeps() -> list[str]:
    """Return the names of the sweeps that come with the tool."""
    return sorted(path.stem for path in (config_dir() / "sweep").glob("*.yaml"))


def compose(overrides: list[str], flags: list[str]) -> list[Experiment]:
    """Return the validated experiments that Hydra makes of `overrides` and its own `flags`, several for a multirun.

    Hydra prints its own errors and the answers to `--cfg` and the like. Raises `ConfigError` with the problems of every
    experiment, `SystemExit` where Hydra gives up.
    """
    composed: list[DictConfig] = []
    parsed(overrides)

    @hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")
    def collect(config: DictConfig) -> None:
        composed.append(config)

    throw_away = tempfile.mkdtemp(prefix="vc-hydra-")
    argv = sys.argv
    directories = [f"hydra.run.dir={throw_away}", f"hydra.sweep.dir={throw_away}"]
    sys.argv = ["orchestrator", *directories, *overrides, *flags]  # Hydra's parser wants its overrides in one row
    try:
        collect()
    finally:
        sys.argv = argv
        shutil.rmtree(throw_away, ignore_errors=True)
    return _validated(composed)


def parsed(overrides: list[str]) -> list[Override]:
    """Return overrides as Hydra reads them.

    Raises `ConfigError` with the one that it cannot read: Hydra's own message does not say which.
    """
    from orchestrator.problems import ConfigError

    parser, read = OverridesParser.create(), []
    for override in overrides:
        try:
            read.append(parser.parse_override(override))
        except HydraException as error:
            raise ConfigError([f"{override.lstrip('+')}: {str(error).splitlines()[0]}"]) from None
    return read


def _validated(composed: list[DictConfig]) -> list[Experiment]:
    if not composed:
        return []
    from orchestrator.problems import ConfigError
    from orchestrator.schema import validate

    experiments, problems = [], []
    for config in composed:
        try:
            experiments.append(validate(_plain(config), sweeps()))
        except ConfigError as error:
            problems += [p for p in error.problems if p not in problems]
        except OmegaConfBaseException as error:
            problems.append(str(error).splitlines()[0])
    if problems:
        raise ConfigError(problems)
    return experiments


def _plain(config: DictConfig) -> dict[str, Any]:
    content = OmegaConf.to_container(config, resolve=True)
    assert isinstance(content, dict)
    return {str(key): _without_missing(value) for key, value in content.items()}


def _without_missing(value: Any) -> Any:
    """Drop keys whose value is `???`, so that the schema reports them as missing with the rest."""
    if isinstance(value, dict):
        return {str(key): _without_missing(item) for key, item in value.items() if item != "???"}
    return value
