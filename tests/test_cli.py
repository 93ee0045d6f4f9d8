"""Command lines that must not start anything: one readable message, the right exit code, no traceback, no file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def orchestrate(cwd: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orchestrator", *arguments]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "no sweep named: add +sweep=NAME, NAME one of batching, capacity, concurrency"),
        (["+sweep=nothing"], 2, "Could not find 'sweep/nothing'"),
        (["+sweep=kv", "server.max_mdl_len=5", "load.output_tokens=0"], 2, "did you mean 'max_model_len'?"),
        (["+sweep=kv", "server.max_mdl_len=5", "load.output_tokens=0"], 2, "load.output_tokens: should be greater"),
        (["+sweep=kv", "sweep.max_model_len=[]"], 2, "sweep.max_model_len: must not be empty"),
        (["+sweep=kv", "sweep.max_model_len=[-512]"], 2, "sweep.max_model_len.0: should be greater"),
        (["+sweep=kv", "sweep.max_model_len=[16384]"], 2, "above the limit of tiny, 8192 tokens"),
        (["+sweep=kv", "model=hf"], 2, "model.name: is missing"),
        (["+sweep=kv", "model=hf", "model.name=/no/such/model"], 2, "/no/such/model"),
        (["+sweep=kv", "server.tensor_parallel_size=8"], 4, "no node has so many GPUs"),
        (["+sweep=kv", "cluster.num_gpus=2"], 4, "this node has 0 GPU(s)"),
        (["+sweep=kv", "engine.device=cuda"], 4, "NVML shows no GPU"),
        (["+sweep=kv", "output_root=/proc/nothing"], 2, "output_root: /proc cannot be written"),
        (["+sweep=kv", "output_root=/tmp/x/runtime_resources/working_dir_files/_ray_pkg_1/o"], 2, "package cache"),
        (["+sweep=kv", "seed=[1"], 2, "seed=[1: "),
        (["-m", "+sweep=kv", "engine=vllm,sim"], 2, "engine: experiments of one run must agree"),
        (["-m", "+sweep=kv", "server.max_num_seqs=0,-1"], 2, "got -1"),
        (["resume=/no/such/run"], 2, "is not a run directory"),
        (["resume=outputs/x", "+sweep=kv"], 2, "outputs/x is not a run directory"),
        (["resume=outputs/x", "server.max_num_seqs=8"], 2, "name a whole grid to add (+sweep=NAME ...)"),
        (["resume=outputs/x", "resume.strict=perhaps"], 2, "should be true or false"),
    ],
)
def test_refused_with_one_message_and_nothing_written(
    tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    done = orchestrate(tmp_path, *arguments)
    assert done.returncode == code, done.stdout + done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_card_that_is_named_where_there_is_none_is_not_ignored(tmp_path: Path) -> None:
    """A run on the CPU would not be what was asked for. Where no card is wanted, its name does not matter."""
    done = orchestrate(tmp_path, "+sweep=kv", "dry_run=true", CUDA_VISIBLE_DEVICES="97")
    assert done.returncode == 4, done.stdout + done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "97" in line)
    assert line.strip().startswith("CUDA_VISIBLE_DEVICES names '97', but this node has no")
    assert line.endswith("or unset it for all of them; engine.device=cpu needs none")
    assert "Traceback" not in done.stderr + done.stdout
    for wanted in ("engine.device=cpu", "engine=sim"):
        done = orchestrate(tmp_path, "+sweep=kv", "dry_run=true", wanted, CUDA_VISIBLE_DEVICES="97")
        assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_cfg_job_and_dry_run_import_nothing_heavy_and_write_nothing(tmp_path: Path) -> None:
    probe = (
        "import sys, runpy\nsys.argv = ['orchestrator', *sys.argv[1:]]\n"
        "try: runpy.run_module('orchestrator', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'ray', 'pandas', 'torch', 'vllm'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    for arguments in (["+sweep=kv", "--cfg", "job"], ["+sweep=kv", "dry_run=true"]):
        done = subprocess.run(
            [sys.executable, "-c", probe, *arguments], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert "8 sessions, 8 points" in done.stdout
    assert "estimated:" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_both_spellings_of_the_sweep_compose_the_same(tmp_path: Path) -> None:
    plain, plus = (orchestrate(tmp_path, word, "--cfg", "job").stdout for word in ("sweep=kv", "+sweep=kv"))
    assert plain == plus
    assert "kind: kv" in plain


def test_missing_vllm_names_the_extra(tmp_path: Path) -> None:
    hide = tmp_path / "hide"
    hide.mkdir()
    (hide / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'vllm' else find(name, *rest)\n"
    )
    done = orchestrate(tmp_path, "+sweep=kv", PYTHONPATH=f"{hide}:{ROOT}")
    assert done.returncode == 2
    assert "pip install vllm-capacity[cpu]" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["hide"]
