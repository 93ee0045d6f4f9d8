"""Which model an experiment means: a shape's own config, or the config.json of a directory or of the hub."""

from __future__ import annotations

from pathlib import Path

from contract.specs import ModelSpec
from orchestrator.problems import ConfigError
from orchestrator.schema import ModelConfig
from workers.models import ModelNotFound, read_config


def resolve(model: ModelConfig) -> ModelSpec:
    """Return the model with its config read. Raises `ConfigError` where it cannot be found."""
    if model.kind == "shape":
        return ModelSpec(model.name, model.config, dummy_weights=True, cut=model.cut)
    path = model.path or model.name
    directory = Path(path).expanduser()
    if directory.is_dir():
        path = str(directory.resolve())  # the server's own working directory is another
    try:
        config = read_config(path, model.revision)
    except ModelNotFound as error:
        raise ConfigError([f"model.name: {error}"]) from None
    return ModelSpec(model.name, config, dummy_weights=False, path=path, revision=model.revision)
