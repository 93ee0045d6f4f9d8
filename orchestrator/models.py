"""Which model an experiment means: a shape's own config, or the config.json of a directory or of the hub.

A model of the hub is pinned to the commit that its name means now: a branch may move before a run is gone on with.
"""

from __future__ import annotations

from pathlib import Path

from contract.specs import ModelSpec
from orchestrator.problems import ConfigError
from orchestrator.schema import Experiment, ModelConfig
from workers.models import ModelNotFound, read_commit


def resolve_all(experiments: list[Experiment]) -> list[tuple[Experiment, ModelSpec]]:
    """Return the experiments with their models pinned, and the models.

    Raises `ConfigError` where one cannot be found, or has two revisions: rows tell models apart by their names.
    """
    found = []
    specs: dict[str, ModelSpec] = {}
    revisions: dict[str, str | None] = {}
    for experiment in experiments:
        asked = experiment.model.model_dump_json()
        if asked not in specs:  # a grid has many experiments of one model, and the hub is asked over the network
            specs[asked] = resolve(experiment.model)
        spec = specs[asked]
        if revisions.setdefault(spec.name, spec.revision) != spec.revision:
            both = f"{revisions[spec.name]} and {spec.revision}"
            raise ConfigError([f"model.revision: {spec.name} at {both} in one run: make two runs of it"])
        model = experiment.model.model_copy(update={"revision": spec.revision})
        found.append((experiment.model_copy(update={"model": model}), spec))
    return found


def resolve(model: ModelConfig) -> ModelSpec:
    """Return the model with its config read. Raises `ConfigError` where it cannot be found."""
    if model.kind == "shape":
        return ModelSpec(model.name, model.config, dummy_weights=True, cut=model.cut)
    path = model.path or model.name
    directory = Path(path).expanduser()
    if directory.is_dir():
        path = str(directory.resolve())  # the server's own working directory is another
    try:
        config, commit = read_commit(path, model.revision)
    except ModelNotFound as error:
        raise ConfigError([f"model.name: {error}"]) from None
    return ModelSpec(model.name, config, dummy_weights=False, path=path, revision=commit or model.revision)
