"""Shared fixtures and settings: one thread per process, GPU tests, real images, Hypothesis, and finished workspaces.

The number of threads is set in the environment before torch is imported, so that it also applies to subprocesses and
Dask workers, and tests that do not need torch never load it.
"""

import contextlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import factory
import pytest
from hypothesis import HealthCheck, settings

# On two cores, two test processes with two threads each take four times as long as with one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No deadline, because busy machines are slow. On CI the examples are deterministic, so that failures can be reproduced.
settings.register_profile(
    "lsmix",
    deadline=None,
    max_examples=60,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("lsmix")


@pytest.fixture(autouse=True, scope="session")
def no_flush() -> Iterator[None]:
    """Replace fsync, which waits for the disk and matters only for power failures; no test simulates one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # also fails for a closed file
        yield


@pytest.fixture(autouse=True)
def no_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unset COLUMNS, which pytest-xdist sets in its workers, so that commands print complete lines as into a pipe."""
    monkeypatch.delenv("COLUMNS", raising=False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` if there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def waits_fail() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Return a context manager inside which every synchronization with the CUDA device, except by events, raises."""

    @contextlib.contextmanager
    def block() -> Iterator[None]:
        import torch

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that this mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return block


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real images, which are not in the repository; skip the test without them."""
    named = os.environ.get("LSMIX_SHARED_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real images in {str(folder)!r}; set LSMIX_SHARED_DATA to their folder")
    return folder


class CommandResult(NamedTuple):
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str


def finished(recipe: Path, folder: Path) -> Path:
    """Run a recipe in a new workspace below ``folder``, and return the workspace."""
    from lsmix.pipeline.api import run

    run(recipe, workspace=folder / "runs", device="cpu")
    return folder / "runs"


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a recipe that runs all stages on digits in a few seconds. Do not modify the file."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(factory.TINY_RECIPE, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def methods_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace for recipes that start with ``factory.METHODS_RECIPE`` and so share flow and latents."""
    return tmp_path_factory.mktemp("methods") / "runs"


@pytest.fixture(scope="session")
def finished_workspace(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the workspace of the tiny recipe with all artifacts up to date. Do not modify it."""
    return finished(tiny_recipe, tmp_path_factory.mktemp("finished"))


@pytest.fixture
def tiny_workspace(finished_workspace: Path, tmp_path: Path) -> Path:
    """Return a modifiable copy of the finished workspace of the tiny recipe."""
    return Path(shutil.copytree(finished_workspace, tmp_path / "runs"))


@pytest.fixture(scope="session")
def small_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a recipe for 16 images in two shards, with stages of a tenth of a second. Do not modify its files."""
    import numpy as np

    folder = tmp_path_factory.mktemp("small")
    factory.write_images(folder / "images.npz", np.arange(20) % 3, np.arange(6) % 3)
    (folder / "small.toml").write_text(factory.SMALL_RECIPE, encoding="utf-8")
    return folder / "small.toml"


@pytest.fixture(scope="session")
def small_finished(small_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the workspace of the small recipe with all artifacts up to date. Do not modify it."""
    return finished(small_recipe, tmp_path_factory.mktemp("small-finished"))


@pytest.fixture
def small_workspace(small_finished: Path, tmp_path: Path) -> Path:
    """Return a modifiable copy of the finished workspace of the small recipe."""
    return Path(shutil.copytree(small_finished, tmp_path / "runs"))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., CommandResult]:
    """Return a function that runs the ``lsmix`` command line in this process."""

    def call(*words: str | Path) -> CommandResult:
        from lsmix.cli import main

        monkeypatch.setattr("sys.argv", ["lsmix", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        return CommandResult(code, printed.out, printed.err)

    return call


@pytest.fixture
def invented_pool(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a small complete pool of two copies with a plan; see ``factory.write_pool``."""

    def make(name: str = "pool", *, rows: int = 46, **options: Any) -> Path:
        origin = {
            "content_digest": "f" * 64,
            "config": {"limit": rows},
            "licence": "CC-BY-4.0",
            "citation": "A. Author: *Images*",
            "train_images": rows // 2,
        }
        fields = {"stage_version": 2, "name": name, "config": {"alpha": 0.4}}
        counts = {"images": rows, "decode_failed_rows": [3]}
        shape = {"image_shape": (4, 6, 3), "class_names": ("cat", "dög", "../frog")}
        pool = {"method": "ls-mix", "seed": rows, "origin": origin, "counts": counts}
        return factory.write_pool(tmp_path / name, rows=rows, **{**shape, **pool, **fields, **options})

    return make
