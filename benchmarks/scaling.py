"""The cost model of docs/scaling.md against measurements: operations of the flow at three sizes, and bytes on disk."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.turns import measure, save


class Size(NamedTuple):
    """The image shape and the architecture of a flow."""

    side: int  # pixels per side
    channels: int
    levels: int
    steps: int
    hidden: int

    @property
    def flops(self) -> float:
        """Floating-point operations of a pass of one image through the coupling networks and 1×1 convolutions."""
        total = 0
        for level in range(self.levels):
            channels, pixels = 4 * self.channels << level, (self.side >> (level + 1)) ** 2
            macs = self.hidden * (channels // 2 * 9 + self.hidden + channels * 9) + channels * channels
            total += 2 * macs * pixels * self.steps
        return float(total)

    @property
    def dim(self) -> int:
        """The length of a latent vector."""
        return self.side * self.side * self.channels


_SIZES = {
    "digits, 8×8×1 (L=2, K=8, width 48)": Size(8, 1, 2, 8, 48),
    "32×32×3 (L=3, K=8, width 128)": Size(32, 3, 3, 8, 128),
    "64×64×3 (L=4, K=6, width 128)": Size(64, 3, 4, 6, 128),
}


def run() -> None:
    """Measure and save."""
    import torch

    from lsmix.pipeline.engine.device import prepare_device

    prepare_device("cpu")
    torch.set_num_threads(os.cpu_count() or 1)
    tables: dict[str, Any] = {}
    jobs = {name: _jobs(size) for name, size in _SIZES.items()}
    largest = list(_SIZES)[1]
    for job, passes in (("train", 3), ("encode", 1), ("decode", 1)):
        title = f"{job}, all cores: operations per second at three sizes"
        work = {name: _flops(jobs[name][job], passes * size.flops) for name, size in _SIZES.items()}
        rows = measure(work, floor=largest, title=title, turns=3, unit="FLOP")
        tables[title] = {"floor": largest, "unit": "FLOP", "rows": rows}
    tables["MFLOP per image and pass"] = {"figures": {name: size.flops / 1e6 for name, size in _SIZES.items()}}
    with tempfile.TemporaryDirectory() as temporary:
        tables["bytes per image"] = {
            "figures": {name: _bytes(Path(temporary, str(i)), size) for i, (name, size) in enumerate(_SIZES.items())}
        }
    save("scaling", tables)


def _jobs(size: Size) -> dict[str, Callable[[], int]]:
    from lsmix.glow.config import FlowConfig, FlowTraining
    from lsmix.glow.flow import Flow
    from lsmix.glow.training import FlowTrainer

    shape = {"height": size.side, "width": size.side, "channels": size.channels}
    flow = Flow(FlowConfig(**shape, levels=size.levels, steps=size.steps, hidden=size.hidden))
    images = np.random.default_rng(0).integers(0, 256, (64, size.side, size.side, size.channels), dtype=np.uint8)
    trainer = FlowTrainer(flow, FlowTraining(batch_size=32), images)
    trainer.step()
    frozen = Flow(flow.config)
    frozen.load_state_dict(flow.state_dict())
    frozen.eval()
    z = frozen.encode(images)
    if not (frozen.decode(z) == images).all():
        raise RuntimeError("decode(encode(x)) differs from x, so the measurement is invalid.")

    def train() -> int:
        trainer.step()
        return 32

    return {"train": train, "encode": lambda: len(frozen.encode(images)), "decode": lambda: len(frozen.decode(z))}


def _flops(job: Callable[[], int], image_flops: float) -> Callable[[], Any]:
    def run() -> Any:
        return job() * image_flops

    return run


def _bytes(folder: Path, size: Size) -> dict[str, float]:
    """Return the bytes per image of latents and pools, by the model and as stored, for 8,192 images."""
    from lsmix.data.latents import create_latents, write_latent_shard
    from lsmix.data.pool import create_pool, write_pool_shard

    count, shape = 8192, (size.side, size.side, size.channels)
    pool = create_pool(
        folder / "pool", images_per_copy=count, copies=1, image_shape=shape, class_names=("a", "b"), method="ls-mix"
    )
    latents = create_latents(folder / "latents", rows=count, dim=size.dim)
    for shard in range(pool.shards):
        n = len(pool.shard_range(shard))
        ints = {name: np.zeros(n, np.int64) for name in ("source_a", "source_b", "label_a", "label_b")}
        floats = {name: np.zeros(n, np.float32) for name in ("lam", "share_b")}
        write_pool_shard(
            folder / "pool",
            shard,
            {"image": np.zeros((n, *shape), np.uint8), **ints, **floats, "status": np.zeros(n, np.uint8)},
        )
    for shard in range(latents.shards):
        n = len(latents.shard_range(shard))
        numbers = {"log_prob": np.zeros(n), "bits_per_dim": np.zeros(n, np.float32)}
        write_latent_shard(
            folder / "latents",
            shard,
            {"z": np.zeros((n, size.dim), np.float32), "label": np.zeros(n, np.int64), **numbers},
        )
    stored = {
        name: sum(path.stat().st_size for path in (folder / name).rglob("*") if path.is_file())
        for name in ("pool", "latents")
    }
    return {
        "pool, model": size.dim + 41.0,
        "pool, measured": stored["pool"] / count,
        "latents, model": 4.0 * size.dim + 20.0,
        "latents, measured": stored["latents"] / count,
        "shards of a pool": float(pool.shards),
    }
