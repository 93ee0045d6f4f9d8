"""How much the queue adds: twelve equal simulated sessions of about 20 s on four pretended GPUs.

    python benchmarks/queue_overhead.py

Prints (last stop - first start) / (three rounds of a session's own time, the median): 1.0 would be no overhead at all.
The sessions are simulated; what is measured is our own scheduling and Ray's actors.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq

SESSIONS, GPUS, SESSION_S = 12, 4, 20.0


def main() -> None:
    """Run and print."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    lengths = ",".join(str(512 + 16 * i) for i in range(SESSIONS))
    with tempfile.TemporaryDirectory() as root:
        subprocess.run(
            [
                sys.executable, "-m", "orchestrator", "+sweep=kv", f"sweep.max_model_len=[{lengths}]",
                "sweep.modes=[committed]", "engine=sim", f"cluster.num_gpus={GPUS}",
                f"server.extra_args={{start_s: {SESSION_S - 1.0}}}", f"output_root={root}",
            ],
            check=True,
            cwd=Path(__file__).parent.parent,
        )  # fmt: skip
        (run,) = Path(root).iterdir()
        rows = pq.read_table(run / "sessions.parquet").to_pylist()
    starts = [_seconds(row["started_at"]) for row in rows]
    ends = [_seconds(row["ended_at"]) for row in rows]
    own = sorted(end - start for start, end in zip(starts, ends, strict=True))
    total, alone = max(ends) - min(starts), SESSIONS / GPUS * statistics.median(own)
    print(f"{len(rows)} sessions of {own[0]:.1f} to {own[-1]:.1f} s on {GPUS} pretended GPUs: {total:.1f} s")
    print(f"{total / alone:.3f} of {alone:.1f} s")


def _seconds(stamp: str) -> float:
    return datetime.datetime.fromisoformat(stamp).timestamp()


if __name__ == "__main__":
    main()
