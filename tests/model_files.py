"""The models of conf/model, for tests that need a true config.json."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

MODELS = Path(__file__).parent.parent / "conf" / "model"


@functools.cache
def published(name: str) -> dict[str, Any]:
    """Return the config of one of our model files."""
    content = OmegaConf.to_container(OmegaConf.load(MODELS / f"{name}.yaml"))
    assert isinstance(content, dict)
    config: dict[str, Any] = content["config"]
    return config
