"""A run directory in, artifacts out. Called by the driver when a run ends, and alone: `python -m analysis RUN`.

Reads Parquet only; never imports `orchestrator`, `workers`, Ray or vLLM, and never writes outside the run directory.
"""

from analysis.artifacts import reduce
from analysis.errors import AnalysisError
from analysis.pages.answer import answer
from analysis.rows.tables import frame
from analysis.rows.targets import Targets

__all__ = ["AnalysisError", "Targets", "answer", "frame", "reduce"]
