"""On PYTHONPATH of a chaos trial: every process that imports the simulator's engine gets the one that can be hurt, and
sessions and stores that tell what they do."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

INSTALLED = {
    "workers.engines.sim": "hurt_engine",
    "workers.session": "tell_of_measuring",
    "orchestrator.store": "tell_of_shards",
}
"""What of `tests.chaos.standin` is called with each module."""


class _Installs:
    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if (how := INSTALLED.pop(name, None)) is None:
            return None
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def load_and_install(module: ModuleType) -> None:
            load(module)
            from tests.chaos import standin

            getattr(standin, how)(module)

        spec.loader.exec_module = load_and_install  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Installs())  # type: ignore[arg-type]
