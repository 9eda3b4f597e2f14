"""The mix and encode stages, disk to disk, against a bare loop in memory; scaling with images and workers."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pools import smooth_images
from benchmarks.turns import Scores, measure, save

__all__ = ["Stages", "make_flow", "run"]

_STEPS = 32  # K of the paper, for the comparison with the bare loop
_COUNT = 4096  # images in that comparison
_FEW_STEPS = 4  # K for the scaling with N: with so light a flow, all other costs become visible
_BATCH = 64
_SIZES = (1024, 4096, 16384)
_CHUNK_ROWS = {"flow": 1024, "light": 0}  # 0: lsmix chooses chunks of about 25 MB
_RECIPE = """
format = 1
name = "bench"
[data]
format = "npz"
path = {data!r}
test = 10
limit = {images}
[flow]
path = {flow!r}
[latents]
batch_size = {batch}
[pools.lsmix]
alpha = 0.4
batch_size = {batch}
on_decode_failure = "keep"
chunk_rows = {chunk_rows}
"""


def run() -> None:
    """Measure and save."""
    import torch

    from lsmix.pipeline.engine.device import prepare_device

    prepare_device("cpu")
    torch.set_num_threads(os.cpu_count() or 1)
    tables: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        flow, light = make_flow(folder / "flow", _STEPS), make_flow(folder / "light", _FEW_STEPS)
        images = smooth_images(max(_SIZES))
        labels = np.arange(len(images)) % 10
        np.savez(
            folder / "data.npz",
            train_images=images,
            train_labels=labels,
            test_images=images[:10],
            test_labels=labels[:10],
        )
        stages = {count: Stages(folder, light, count, _CHUNK_ROWS["light"]) for count in _SIZES}
        deep = Stages(folder, flow, _COUNT, _CHUNK_ROWS["flow"])
        loops = _bare_loops(flow, images[:_COUNT])
        for stage in ("encode", "mix"):
            title = f"{stage}, {_COUNT} images, K={_STEPS}, all cores"
            work = {"bare loop in memory": loops[stage], f"the {stage} stage, disk to disk": deep.job(stage)}
            rows = measure(work, floor="bare loop in memory", title=title, turns=2 if stage == "encode" else 3)
            tables[title] = {"floor": "bare loop in memory", "unit": "images", "rows": rows}
            tables |= _growth(stage, stages)
        tables |= _workers(deep)
    save("mix", tables, batch=_BATCH)


def make_flow(folder: Path, steps: int) -> Path:
    """Write a flow for 32×32×3 images with ``steps`` steps per level, trained for three iterations."""
    from lsmix.glow.checkpoint import save_flow
    from lsmix.glow.config import FlowConfig, FlowTraining
    from lsmix.glow.flow import Flow
    from lsmix.glow.training import FlowTrainer

    flow = Flow(FlowConfig(height=32, width=32, channels=3, levels=3, steps=steps, hidden=128))
    trainer = FlowTrainer(flow, FlowTraining(batch_size=32), smooth_images(64))
    for _ in range(3):
        trainer.step()
    folder.mkdir()
    save_flow(folder, flow, {})
    return folder


class Stages:
    """A workspace with ``count`` images, in which stages are rebuilt repeatedly; 0 ``chunk_rows`` lets lsmix choose."""

    def __init__(
        self, folder: Path, flow: Path, count: int, chunk_rows: int, *, device: str = "cpu", batch: int = _BATCH
    ) -> None:
        self.count = count
        self._device = device
        self.workspace = folder / f"runs {flow.name} {count}"
        self._recipe = folder / f"{flow.name} {count}.toml"
        text = _RECIPE.format(
            data=str(folder / "data.npz"), flow=str(flow), images=count, batch=batch, chunk_rows=chunk_rows
        )
        self._recipe.write_text(text, encoding="utf-8")
        self._run("mix")

    def job(self, stage: str, **options: Any) -> Callable[[], Scores]:
        """Return a job that rebuilds a stage from its inputs and checks that it processed all images."""

        def make() -> Scores:
            shutil.rmtree(self.workspace / stage)
            begun = time.perf_counter()
            counts = self._run(stage, **options)
            seconds = time.perf_counter() - begun
            if counts["images"] != self.count or counts.get("exact_round_trips", self.count) != self.count:
                raise RuntimeError(f"{stage} did not process all images: {counts}")
            return Scores(self.count, seconds)

        return make

    def array_job(self, stage: str, parts: int) -> Callable[[], Scores]:
        """Return a job that rebuilds a stage by ``parts`` array tasks in parallel processes, then ``finalize``."""
        words = [sys.executable, "-m", "lsmix", stage, str(self._recipe), "--workspace", str(self.workspace), "-q"]
        threads = str(max(1, (os.cpu_count() or 1) // parts))
        quiet = {"env": {**os.environ, "OMP_NUM_THREADS": threads}, "stdout": subprocess.DEVNULL}

        def make() -> Scores:
            shutil.rmtree(self.workspace / stage)
            begun = time.perf_counter()
            tasks = [
                subprocess.Popen([*words, "--array-index", str(i), "--array-size", str(parts)], **quiet)
                for i in range(parts)
            ]
            if sum(task.wait() != 0 for task in tasks):
                raise RuntimeError(f"An array task of {stage} failed.")
            subprocess.run([*words[:3], "finalize", *words[4:]], check=True, **quiet)
            seconds = time.perf_counter() - begun
            if self._run(stage)["images"] != self.count:
                raise RuntimeError(f"{stage} did not process all images.")
            return Scores(self.count, seconds)

        return make

    def _run(self, stage: str, **options: Any) -> dict[str, Any]:
        from lsmix.pipeline.api import run

        result = run(self._recipe, workspace=self.workspace, stage=stage, device=self._device, **options)
        return next(item for item in result.built if item.stage == stage).manifest.counts


def _bare_loops(folder: Path, images: np.ndarray) -> dict[str, Callable[[], int]]:
    """Return the same passes through the flow, batch by batch and memory to memory, as in a simple script."""
    import torch

    from lsmix.glow.checkpoint import load_flow
    from lsmix.glow.pixels import dequantise, quantise

    flow = load_flow(folder)
    z = torch.from_numpy(flow.encode(images, batch_size=_BATCH))

    def decode() -> int:
        for start in range(0, len(z), _BATCH):
            quantise(flow.decode_batch(z[start : start + _BATCH])).numpy()
        return len(z)

    def encode() -> int:
        for start in range(0, len(images), _BATCH):
            flow.encode_batch(dequantise(torch.from_numpy(images[start : start + _BATCH])))
        return decode()  # the encode stage also decodes, to check the round trip

    return {"mix": decode, "encode": encode}


def _growth(stage: str, stages: dict[int, Stages]) -> dict[str, Any]:
    title = f"{stage}, scaling with the number of images, K={_FEW_STEPS}"
    work = {f"{count} images": it.job(stage) for count, it in stages.items()}
    floor = f"{_SIZES[0]} images"
    return {title: {"floor": floor, "unit": "images", "rows": measure(work, floor=floor, title=title, turns=1)}}


def _workers(stages: Stages) -> dict[str, Any]:
    title = f"mix, {_COUNT} images, K={_STEPS}, in process and on Dask workers (start-up included)"
    work = {"in process": stages.job("mix")}
    work |= {f"{count} worker{'s' if count > 1 else ''}": stages.job("mix", workers=count) for count in (1, 2)}
    return {
        title: {
            "floor": "in process",
            "unit": "images",
            "rows": measure(work, floor="in process", title=title, turns=1),
        }
    }
