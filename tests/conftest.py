"""What all tests share: one thread for the numerics, the real images, GPU tests, and how Hypothesis searches.

Threads are set by the environment, before anything imports torch, so that subprocesses and Dask workers
have them too and tests without torch never load it.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, settings

# Two test processes with two threads each on two cores take four times as long as with one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Times mean nothing on a busy machine. On CI the examples are the same each time, so that a red run can be repeated.
settings.register_profile(
    "lsmix", deadline=None, derandomize="CI" in os.environ, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("lsmix")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that are marked with ``gpu`` where there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; there is none"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real images, or skip: they are no part of the repository."""
    named = os.environ.get("LSMIX_SHARED_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real images at {str(folder)!r}; name their folder in LSMIX_SHARED_DATA")
    return folder


# A whole pipeline in a few seconds, and the command line without a new process, for the tests of pipeline/ and cli.py.

TINY_RECIPE = """\
name = "tiny"
[data]
format = "digits"
heldout = 30
test = 80
limit = 330
[flow]
levels = 2
steps = 2
hidden = 16
threads = 1
checkpoint_every = 10
evaluate_every = 20
evaluate_images = 64
[flow.training]
iterations = 40
batch_size = 32
learning_rate = 1e-3
warmup = 10
flip = false
translate = 1
[latents]
chunk_rows = 64
[pools.lsmix]
alpha = 0.4
copies = 2
chunk_rows = 128
[pools.zero]
lambdas = [0.0, 1.0]
[classifier]
threads = 1
width = 8
epochs = 2
batch_size = 64
flip = false
translate = 1
[runs.baseline]
seeds = [0, 1]
[runs.lsmix]
pool = "lsmix"
[report]
pairs = 2
bits_images = 64
"""


class CommandResult(NamedTuple):
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a recipe that runs the whole pipeline on digits in a few seconds; never change the file."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(TINY_RECIPE, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def finished_workspace(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the workspace of the tiny recipe with everything up to date; never change what is in it."""
    from lsmix.pipeline.api import run

    workspace = tmp_path_factory.mktemp("finished") / "runs"
    run(tiny_recipe, workspace=workspace, device="cpu")
    return workspace


@pytest.fixture
def tiny_workspace(finished_workspace: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished workspace, to be changed at will."""
    return Path(shutil.copytree(finished_workspace, tmp_path / "runs"))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., CommandResult]:
    """Return a function that runs ``lsmix`` with some arguments in this process, as its entry point does."""

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
    """Return a function that makes a small complete pool of two copies with invented contents."""
    import numpy as np
    from places import invented_plan

    from lsmix.data.artifact import Manifest, record_files, root_digest, write_manifest
    from lsmix.data.pool import create_pool, write_pool_shard

    def make(
        name: str = "pool",
        *,
        rows: int = 46,
        image_shape: tuple[int, int, int] = (4, 6, 3),
        class_names: tuple[str, ...] = ("cat", "dög", "../frog"),
        sources: int = 2,
        corners: bool = False,
    ) -> Path:
        folder, draw = tmp_path / name, np.random.default_rng(rows)
        origin = {
            "root": "f" * 64,
            "config": {"limit": rows},
            "licence": "CC-BY-4.0",
            "citation": "A. Author: *Images*",
            "train_images": rows // 2,
        }
        store = create_pool(
            folder,
            images_per_copy=rows // 2,
            copies=2,
            image_shape=image_shape,
            class_names=class_names,
            method="ls-mix",
            chunk_rows=16,
            sources=sources,
            corners=corners,
            attributes={"origin": origin},
        )
        for shard in range(store.shards):
            rows_here = np.asarray(store.shard_range(shard))
            count, more = len(rows_here), (len(rows_here), sources - 2)
            arrays = {
                "image": draw.integers(0, 256, (count, *image_shape), dtype=np.uint8),
                "source_a": rows_here % (rows // 2),
                "source_b": rows_here[::-1] % (rows // 2),
                "label_a": draw.integers(0, len(class_names), count),
                "label_b": draw.integers(0, len(class_names), count),
                "lam": draw.random(count, dtype=np.float32),
                "share_b": draw.random(count, dtype=np.float32),
                "status": draw.integers(0, 3, count).astype(np.uint8),
            }
            if sources > 2:
                arrays |= {"source_more": draw.integers(0, rows // 2, more), "label_more": draw.integers(0, 2, more)}
                arrays |= {name: draw.random(more, dtype=np.float32) for name in ("lam_more", "share_more")}
            if corners:
                arrays["corner"] = draw.integers(0, 4, count).astype(np.uint8)
            write_pool_shard(folder, shard, arrays)
        (folder / "plan.json").write_bytes(invented_plan(origin))
        files = record_files(folder)
        facts = {"stage": "mix", "stage_version": 2, "name": name, "key": "0123456789ab", "config": {"alpha": 0.4}}
        counts = {"images": rows, "decode_failed_rows": [3]}
        write_manifest(folder, Manifest(**facts, inputs=[], root=root_digest(files), files=files, counts=counts))
        return folder

    return make
