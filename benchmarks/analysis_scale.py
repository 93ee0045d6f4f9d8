"""How long `python -m analysis` takes on a run of ten million requests, and how much memory.

    python benchmarks/analysis_scale.py [REQUESTS_A_POINT [TIMES]]     # 5000 and 3; 2,000 points
    taskset -c 0,1 python benchmarks/analysis_scale.py                 # on two cores

Writes a synthetic run directory as the driver does (one shard a point, its requests, telemetry and server samples
nested; answers of 64 tokens with a gap for each further one), analyses it as a command of its own, prints wall and CPU
seconds and the peak of its resident memory, and removes it. TMPDIR says where: it takes about 1.2 GB, and as much again
for the tables. Numbers in it are made up; only their count and their layout are what they would be.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from contract.rows import SCHEMA_VERSION, PointRow, SessionRow, arrow_schema, to_table

SERVERS, REPEATS = 10, 20
LEVELS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
PROMPT_TOKENS, OUTPUT_TOKENS = 512, 64
LIMIT_TOK_S, HALF_AT = 9_000.0, 24.0
"""tok/s of an endless load, and the concurrency that reaches half of it."""


@dataclass(frozen=True)
class Place:
    """One point of the run."""

    server: int
    level: int
    repeat: int

    @property
    def session_id(self) -> str:
        return f"{self.server:016x}"

    @property
    def point_id(self) -> str:
        return f"{self.level:08x}{self.repeat:08x}"


def write_run(run_dir: Path, requests: int) -> int:
    """Write shards and manifest; return the number of request rows."""
    places = [Place(s, level, r) for s in range(SERVERS) for level in LEVELS for r in range(REPEATS)]
    for server in range(SERVERS):
        (run_dir / "shards" / f"{server:016x}").mkdir(parents=True)
        pq.write_table(to_table([_session(server)], SessionRow), run_dir / f"shards/{server:016x}/session.parquet")
    with ProcessPoolExecutor() as pool:
        list(pool.map(partial(_write_point, run_dir, requests), places, chunksize=20))
    (run_dir / "manifest.json").write_text(json.dumps({"slo": {"p95_e2e_s": 2.0, "p95_ttft_s": 0.2}}))
    return len(places) * requests


def _write_point(run_dir: Path, requests: int, place: Place) -> None:
    random = np.random.default_rng([place.server, place.level, place.repeat])
    tok_s = LIMIT_TOK_S * place.level / (place.level + HALF_AT) * random.lognormal(0, 0.01)
    mean_s = place.level * OUTPUT_TOKENS / tok_s
    e2e = mean_s * random.lognormal(0, 0.05, requests)
    ttft = 0.1 * e2e
    tpot = (e2e - ttft) / (OUTPUT_TOKENS - 1)
    sent = np.arange(requests) // place.level * mean_s
    duration = float(np.max(sent + e2e))
    gaps = (1e6 * tpot[:, None] * random.lognormal(0, 0.02, (requests, OUTPUT_TOKENS - 1))).astype(np.int64)
    row = replace(
        _point(place),
        num_requests=requests, completed=requests, failed=0, duration_s=duration, qps=requests / duration,
        tok_s=requests * OUTPUT_TOKENS / duration, total_tok_s=requests * (OUTPUT_TOKENS + PROMPT_TOKENS) / duration,
        mean_e2e_s=float(e2e.mean()), p50_e2e_s=float(np.median(e2e)), p95_e2e_s=float(np.percentile(e2e, 95)),
        p50_ttft_s=float(np.median(ttft)), p95_ttft_s=float(np.percentile(ttft, 95)),
        p50_tpot_s=float(np.median(tpot)), p95_tpot_s=float(np.percentile(tpot, 95)),
        achieved_concurrency=float(e2e.sum() / duration), running_max=place.level, waiting_max=0, preemptions=0,
        kv_usage_max=place.level / 2048, gpu_util_pct=93.0,
    )  # fmt: skip
    table = to_table([row], PointRow)
    lists = {
        "requests": {
            "ordinal": np.arange(requests), "sent_s": sent, "ok": np.ones(requests, bool), "ttft_s": ttft,
            "e2e_s": e2e, "tpot_s": tpot, "first_byte_s": 0.9 * ttft, "last_byte_s": 1.001 * e2e,
            "gaps_us": pa.ListArray.from_arrays(np.arange(requests + 1) * (OUTPUT_TOKENS - 1), gaps.ravel()),
            "body_bytes": np.full(requests, 18_000), "prompt_tokens": np.full(requests, PROMPT_TOKENS),
            "completion_tokens": np.full(requests, OUTPUT_TOKENS), "chunks": np.full(requests, OUTPUT_TOKENS),
            "finish_reason": ["length"] * requests, "http_status": np.full(requests, 200),
        },
        "telemetry": _samples(duration, 10, {"device_id": f"GPU-{place.server}", "utilization_pct": 93.0,
                                             "memory_used_bytes": 70 * 2**30, "power_w": 600.0}),
        "server_samples": _samples(duration, 2, {"running": place.level, "waiting": 0, "kv_usage": place.level / 2048}),
    }  # fmt: skip
    for name, columns in lists.items():
        field = table.schema.field(name)
        table = table.set_column(table.schema.get_field_index(name), field, _one_list(field.type, columns))
    if table.schema != arrow_schema(PointRow):
        raise SystemExit("the synthetic shard has not the schema of the driver's")
    path = run_dir / "shards" / place.session_id / f"{place.point_id}.parquet"
    pq.write_table(table, path)


def _samples(duration: float, hz: float, fixed: dict[str, object]) -> dict[str, Sequence[object]]:
    times = np.arange(0, duration, 1 / hz)
    return {"t_s": times, **{name: [value] * len(times) for name, value in fixed.items()}}


def _one_list(kind: pa.ListType, columns: dict[str, Sequence[object]]) -> pa.Array:
    """Return one list of structs; fields that no column is given for are empty."""
    items, size = kind.value_type, len(next(iter(columns.values())))
    fields = [items.field(i) for i in range(items.num_fields)]
    arrays = [pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(size, f.type) for f in fields]
    return pa.ListArray.from_arrays([0, size], pa.StructArray.from_arrays(arrays, fields=fields))


def _point(place: Place) -> PointRow:
    minute = f"{place.level % 60:02d}"
    return PointRow(
        schema_version=SCHEMA_VERSION, run_id="scale", session_id=place.session_id, point_id=place.point_id,
        sweep="concurrency", kind="load", purpose="concurrency", attempt=1, status="measured", simulated=True,
        started_at=f"2026-01-02T{place.server:02d}:{minute}:00Z", model="phi-3-mini-4k", dummy_weights=True,
        engine="sim", device="sim", device_name="simulated GPU", device_ids=[f"GPU-{place.server}"], gpus=1,
        mode="utilization", max_model_len=4096, gpu_memory_utilization=0.9, max_num_seqs=128 + place.server,
        concurrency=place.level, repeat=place.repeat, api="completions", prompt_tokens=PROMPT_TOKENS,
        output_tokens=OUTPUT_TOKENS,
    )  # fmt: skip


def _session(server: int) -> SessionRow:
    return SessionRow(
        schema_version=SCHEMA_VERSION, run_id="scale", session_id=f"{server:016x}", attempt=1, status="measured",
        simulated=True, started_at=f"2026-01-02T{server:02d}:00:00Z", ended_at=f"2026-01-02T{server:02d}:59:59Z",
        node="node-a", device_ids=[f"GPU-{server}"], ready_s=42.0, stop_s=0.2, memory_back_s=0.5,
    )  # fmt: skip


def analyse(run_dir: Path) -> str:
    """Run the command; return seconds and memory in words. Its own exit code other than 0 ends the benchmark."""
    begun = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "analysis", str(run_dir)], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"analysis ended with {process.returncode}")
    wall = time.monotonic() - begun
    cpu = f"{used.ru_utime:.1f} s user, {used.ru_stime:.1f} s system"
    return f"{wall:.1f} s wall, {cpu}, {used.ru_maxrss / 2**20:.2f} GiB peak"


def _mb(paths: Sequence[Path]) -> float:
    return sum(path.stat().st_size for path in paths) / 1e6


def main(requests: int, times: int) -> None:
    """Write, analyse, print, remove."""
    with tempfile.TemporaryDirectory() as root:
        run_dir = Path(root) / "run"
        rows = write_run(run_dir, requests)
        shards = list(run_dir.glob("shards/*/*.parquet"))
        cores = len(os.sched_getaffinity(0))
        print(f"{rows:,} requests in {len(shards):,} shards, {_mb(shards):,.0f} MB; {cores} cores")
        for _ in range(times):
            print(analyse(run_dir), flush=True)
        print(f"tables: {_mb(list(run_dir.glob('*.parquet'))):,.0f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requests", nargs="?", type=int, default=5000, help="a point; %(default)s where left out")
    parser.add_argument("times", nargs="?", type=int, default=3, help="%(default)s where left out")
    options = parser.parse_args()
    main(options.requests, options.times)
