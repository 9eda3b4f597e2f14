"""The examples train on a pool as documented, and reading a pool needs little more than NumPy and torch."""

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import lsmix
from lsmix.data.dataset import open_dataset

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LINE = r"epoch {epoch}: loss (\d+\.\d+), [\d,]+ images/s"

# The functions of timm that timm_train.py calls, with the signatures of timm.
STAND_IN = """
import math, torch
def create_model(model_name, pretrained=False, *, num_classes, in_chans):
    assert (model_name, pretrained) == ("resnet18", False)
    return torch.nn.Sequential(torch.nn.Conv2d(in_chans, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
                               torch.nn.Linear(4, num_classes))
class SoftTargetCrossEntropy(torch.nn.CrossEntropyLoss):
    pass
def create_optimizer_v2(model_or_params, opt="sgd", lr=None, weight_decay=0.0):
    return {"adamw": torch.optim.AdamW}[opt](model_or_params.parameters(), lr=lr, weight_decay=weight_decay)
class CosineLRScheduler:
    def __init__(self, optimizer, t_initial, lr_min=0.0):
        assert t_initial > 0
    def step(self, epoch, metric=None):
        assert epoch > 0
"""


@pytest.fixture(scope="module")
def pool(finished_workspace: Path) -> Path:
    return next((finished_workspace / "mix").glob("lsmix-*"))


def example(name: str, *arguments: object, inside: Path) -> str:
    """Run an example in a folder, which is also on its import path, and return its output."""
    return python(str(ROOT / "examples" / name), *map(str, arguments), inside=inside)


def python(*words: str, inside: Path) -> str:
    path = os.pathsep.join(filter(None, [str(inside), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=inside, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_short_and_documented(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60
    for page in ("examples/README.md", "docs/training.md"):
        assert path.name in (ROOT / page).read_text(encoding="utf-8")


def test_examples_are_not_in_the_wheel() -> None:
    assert len(EXAMPLES) == 3
    assert not (ROOT / "examples" / "__init__.py").exists()
    assert "examples" not in (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[tool.ruff]")[0]


@pytest.mark.slow
def test_the_plain_example_resumes_in_the_middle_of_an_epoch_with_the_same_result(
    pool: Path, finished_workspace: Path, tmp_path: Path
) -> None:
    test = open_dataset(next((finished_workspace / "ingest").iterdir())).test
    np.savez(tmp_path / "test.npz", images=test.images, labels=test.labels)
    usual = (pool, "--epochs", 2, "--batch-size", 64, "--state")
    printed = example("plain_pytorch.py", *usual, "through.pt", "--test", "test.npz", inside=tmp_path)
    assert re.search(LINE.format(epoch=1), printed)
    assert re.search(LINE.format(epoch=2), printed)
    error = re.search(r"test error (\d+\.\d+) %", printed)
    assert error
    assert 0 <= float(error[1]) <= 100

    assert "epoch 1" in example("plain_pytorch.py", *usual, "stopped.pt", "--stop-after", 2, inside=tmp_path)
    middle = torch.load(tmp_path / "stopped.pt", weights_only=True)
    assert middle["loader"]["position"] == 128
    example("plain_pytorch.py", *usual, "stopped.pt", inside=tmp_path)
    through, stopped = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("through", "stopped"))
    assert through["loader"] == stopped["loader"]
    for name, values in through["model"].items():
        assert torch.equal(values, stopped["model"][name]), name


@pytest.mark.slow
def test_the_timm_example_trains_with_a_stand_in_for_timm(pool: Path, tmp_path: Path) -> None:
    (tmp_path / "timm").mkdir()
    for module in ("__init__", "loss", "optim", "scheduler"):
        (tmp_path / "timm" / f"{module}.py").write_text(STAND_IN, encoding="utf-8")
    printed = example("timm_train.py", pool, "--epochs", 2, "--size", 16, inside=tmp_path)
    assert re.search(LINE.format(epoch=2), printed)
    assert (tmp_path / "model.pt").is_file()


def test_the_timm_example_trains_with_timm(pool: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", "import timm"], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("needs timm and torchvision")
    assert re.search(LINE.format(epoch=1), example("timm_train.py", pool, "--epochs", 1, "--size", 32, inside=tmp_path))


@pytest.mark.slow
def test_the_lightning_example_trains(pool: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("lightning") is None:
        pytest.skip("needs lightning")
    printed = example("lightning_train.py", pool, "--epochs", 2, inside=tmp_path)
    assert re.search(LINE.format(epoch=1), printed)
    assert re.search(LINE.format(epoch=2), printed)


def documented(word: str) -> str:
    """Return the code block of the training page that contains ``word``."""
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    return next(block for block in re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL) if word in block)


class _Tracked(contextlib.nullcontext[Any]):
    """A stand-in for the objects that wandb.init and mlflow.start_run return."""

    def __init__(self, log: Callable[..., None]) -> None:
        super().__init__(self)
        self.log = log


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_trackers_receive_the_metrics_of_each_step_and_epoch(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(recipe: str, progress: Any) -> None:
        assert recipe == "my.toml"
        progress.start("train-glow f", 1, "iteration")
        progress.event("step", label="train-glow f", iteration=7, loss_bits_per_dim=4.5, train_bits_per_dim=None)
        progress.event("epoch", label="train c", epoch=2, loss=0.25, test_error=None)

    monkeypatch.chdir(tmp_path)
    seen: list[Any] = []
    if name == "tensorboard":
        pytest.importorskip("tensorboard")
    else:  # a stand-in with the functions of both that the page uses
        calls = {"init": lambda project: _Tracked(lambda values: seen.append((values, values.pop("at")))),
                 "start_run": lambda: _Tracked(print), "log_metrics": lambda values, step: seen.append((values, step))}  # fmt: skip
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**calls))
    names: dict[str, Any] = {"lsmix": SimpleNamespace(run=run, NullProgress=lsmix.NullProgress)}
    for word in ("NullProgress", f"import {name}" if name != "tensorboard" else name):
        exec(documented(word), names)
    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator("tensorboard").Reload()
        tags = ("train-glow f/loss_bits_per_dim", "train c/loss")
        seen = [({tag: one.value}, one.step) for tag in tags for one in events.Scalars(tag)]
    assert seen == [({"train-glow f/loss_bits_per_dim": 4.5}, 7), ({"train c/loss": 0.25}, 2)]


def test_the_transformers_trainer_trains_on_a_pool(pool: Path, tmp_path: Path) -> None:
    for package in ("transformers", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    before = (
        "import lsmix, torch\nfrom torch.nn.functional import cross_entropy\n"
        f"pool = lsmix.open_pool({str(pool)!r})\nmodel = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(10))\n"
        "model(torch.zeros(1, *pool.as_dataset()[0]['image'].shape))\n"
    )
    printed = python("-c", before + documented("transformers"), inside=tmp_path)
    assert re.search(r"'?train_loss'?: '?\d", printed)


BLOCKED = ("dask", "distributed", "zarr", "h5py", "matplotlib", "PIL", "click", "jinja2")
USE_A_POOL = """
import sys
blocked = {blocked!r}
sys.modules.update(dict.fromkeys([*blocked, "torch"]))
import lsmix
pool = lsmix.open_pool({pool!r})
assert len(pool.image[:10]) == 10 and pool[3].status == "ok" and sum(1 for _ in pool.label_a) == len(pool)
del sys.modules["torch"]
loader = lsmix.PoolLoader(pool, 64, labels="soft")
assert sum(len(images) for images, target in loader) == len(pool)
from torch.utils.data import DataLoader
assert sum(len(images) for images, _ in DataLoader(loader, batch_size=None)) == len(pool)
"""


def test_reading_a_pool_needs_no_torch_and_training_on_it_needs_neither_dask_nor_zarr_nor_the_flow(
    pool: Path, tmp_path: Path
) -> None:
    blocked = [*BLOCKED, *(f"lsmix.{package}" for package in ("glow", "classifiers", "pipeline"))]
    given = shutil.copytree(pool, tmp_path / "given")
    python("-c", USE_A_POOL.format(blocked=blocked, pool=str(given)), inside=tmp_path)
