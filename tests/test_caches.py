"""Caches that outlive a run: whose they are, what is told of them, and that a shape keeps its path."""

import os
from pathlib import Path

import pytest

from contract.specs import ModelSpec
from tests.model_files import published
from tests.privileged import NOT_SHOWN
from workers import caches
from workers.models import cached_model_dir, write_model_dir
from workers.provenance import Places, shown_argv, shown_environment


def tiny() -> ModelSpec:
    return ModelSpec(name="tiny", config=published("tiny"), dummy_weights=True)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a place for the caches that nobody has made."""
    monkeypatch.setenv(caches.VARIABLE, str(tmp_path / "a" / "caches"))
    return tmp_path / "a" / "caches"


def test_the_root_is_made_for_this_user_alone(root: Path) -> None:
    assert caches.cache_root() == root
    assert root.stat().st_mode & 0o777 == 0o700
    assert caches.cache_root() == root


def test_a_root_that_others_can_write_to_is_not_used(root: Path) -> None:
    root.mkdir(parents=True)
    root.chmod(0o770)
    assert caches.cache_root() is None


def test_a_root_that_is_a_link_is_not_used(root: Path, tmp_path: Path) -> None:
    root.parent.mkdir()
    root.symlink_to(tmp_path)
    assert caches.cache_root() is None


@pytest.mark.skipif(os.getuid() != 0, reason=f"{NOT_SHOWN}: only root can give a directory away")
def test_a_root_of_another_user_is_not_used(root: Path) -> None:
    root.mkdir(parents=True, mode=0o700)
    os.chown(root, 12345, 12345)
    assert caches.cache_root() is None


def test_a_root_that_cannot_be_made_is_not_used(root: Path) -> None:
    root.parent.write_text("a file")
    assert caches.cache_root() is None
    assert caches.compile_caches(None) == {}


def test_what_the_user_has_set_is_left_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/elsewhere")
    told = caches.compile_caches(caches.cache_root())
    assert told == {"TORCHINDUCTOR_CACHE_DIR": f"{root}/inductor", "TRITON_CACHE_DIR": f"{root}/triton"}


def test_a_shape_keeps_its_path_and_another_has_its_own(tmp_path: Path) -> None:
    model = tiny()
    directory = cached_model_dir(model, tmp_path / "shapes")
    before = (directory / "config.json").stat().st_mtime_ns
    assert cached_model_dir(model, tmp_path / "shapes") == directory
    assert (directory / "config.json").stat().st_mtime_ns == before
    other = ModelSpec(name="tiny", config={**model.config, "num_hidden_layers": 7}, dummy_weights=True)
    assert cached_model_dir(other, tmp_path / "shapes") != directory
    assert len(list((tmp_path / "shapes").iterdir())) == 2


def test_a_shape_is_what_it_is_in_a_directory_of_its_own(tmp_path: Path) -> None:
    written, cached = write_model_dir(tiny(), tmp_path / "own"), cached_model_dir(tiny(), tmp_path / "shapes")
    names = sorted(path.name for path in written.iterdir())
    assert names == sorted(path.name for path in cached.iterdir())
    assert all((written / name).read_bytes() == (cached / name).read_bytes() for name in names)


def test_a_shape_that_was_cleaned_up_in_part_is_made_again(tmp_path: Path) -> None:
    directory = cached_model_dir(tiny(), tmp_path)
    (directory / "tokenizer.json").unlink()
    assert cached_model_dir(tiny(), tmp_path) == directory
    assert (directory / "tokenizer.json").is_file()


def test_rows_name_the_directories_and_not_their_paths() -> None:
    places = Places(Path("/tmp/vc-1"), Path("/var/tmp/c"))
    assert shown_argv(["x", "--model", "/var/tmp/c/shapes/1", "--uds", "/tmp/vc-1/s"], places) == [
        "x", "--model", "<cache>/shapes/1", "--uds", "<session>/s",
    ]  # fmt: skip
    shown = shown_environment({"TRITON_CACHE_DIR": "/var/tmp/c/triton", "TMPDIR": "/tmp/vc-1/t"}, places)
    assert shown == ["TMPDIR=<session>/t", "TRITON_CACHE_DIR=<cache>/triton"]
