"""What a load process imports: it starts for every level, and shares the host with the server that it measures."""

from __future__ import annotations

import subprocess
import sys

from mock_openai import MockOpenAI, serving

HEAVY = (
    "torch",
    "transformers",
    "pandas",
    "pyarrow",
    "scipy",
    "vllm",
    "orchestrator",
    "ray",
    "pydantic",
    "omegaconf",
    "hydra",
)

TASK = """
import sys
import workers.load.__main__  # the command line
from workers.load.process import generate  # Ray's task
from workers.load.endpoint import Endpoint
from workers.load.plan import LoadPlan

result = generate(LoadPlan(Endpoint(sys.argv[1], "mock"), 2, 4, 20, 8, 0, 256, 7, 20.0))
print(sum(row.ok for row in result.requests), *sorted(sys.modules.keys() & set(sys.argv[2:])))
"""


def test_a_load_process_imports_nothing_heavy() -> None:
    """Imported when it is started, or only while it sends and judges."""
    with serving(MockOpenAI()) as server:
        command = [sys.executable, "-c", TASK, server.url, *HEAVY]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.split(), done.returncode) == (["4"], 0), done.stderr
