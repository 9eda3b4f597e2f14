"""The two ranks of test_ranks.py: they train a flow and a classifier, and resume training that one process started."""

import os
import sys
from pathlib import Path

import msgspec
import numpy as np
import torch
from emulated_graphs import emulate_cuda_graphs
from safetensors.torch import load_file, save_file

from lsmix.classifiers.config import ClassifierTraining, PixelMix
from lsmix.classifiers.training import ClassifierTrainer
from lsmix.data.loaders.array_loader import ArrayLoader
from lsmix.data.loaders.ranks import ALONE, Ranks, join_ranks
from lsmix.data.progress import asked
from lsmix.glow.config import FlowConfig, FlowTraining
from lsmix.glow.flow import Flow
from lsmix.glow.training import FlowTrainer
from lsmix.pipeline.engine.torchrun import leave_ranks

__all__ = ["STEPS", "classifier", "epochs", "flow", "losses"]

STEPS = 6
DRAW = np.random.default_rng(0)
IMAGES, LABELS = DRAW.integers(0, 256, (41, 8, 8, 1), dtype=np.uint8), DRAW.integers(0, 3, 41)


def flow(ranks: Ranks = ALONE, seed: int = 0) -> FlowTrainer:
    """Return a float64 trainer with augmentation, warm-up, clipping and initialization from the first batch."""
    config = FlowConfig(height=8, width=8, channels=1, levels=2, steps=2, hidden=8)
    training = FlowTraining(batch_size=8, learning_rate=1e-3, warmup=3, grad_clip=5.0)
    return FlowTrainer(Flow(config, seed=seed).double(), training, IMAGES, ranks)


def losses(trainer: FlowTrainer, steps: int = STEPS) -> list[list[float]]:
    """Return losses and gradient norms of ``steps`` steps."""
    return [[step.loss_bits_per_dim, step.grad_norm] for step in (trainer.step() for _ in range(steps))]


def classifier(ranks: Ranks = ALONE, seed: int = 0) -> ClassifierTrainer:
    """Return a trainer with dropout, batch norm and mixes, whose last batch of 9 is split unequally."""
    config = ClassifierTraining(width=8, batch_size=16, optimiser="sgd", learning_rate=0.01, grad_clip=5.0, translate=1)
    mixes = [PixelMix(method="cutmix")]
    return ClassifierTrainer(config, 3, (8, 8, 1), seed, mixes=lambda epoch, index: mixes, ranks=ranks)


def epochs(trainer: ClassifierTrainer, count: int) -> list[list[float]]:
    """Return losses, updates and images of ``count`` epochs."""
    source = ArrayLoader(IMAGES, LABELS, 16, rank=0, world_size=1)
    return [[one.loss, one.updates, one.images] for one in (trainer.run_epoch(source) for _ in range(count))]


def _main(folder: Path) -> None:
    torch.use_deterministic_algorithms(True)
    ranks, found = join_ranks(), {}
    trainer = flow(ranks)
    found["flow"] = losses(trainer, 3)
    save_file(trainer.state_dict(), folder / f"flow-half-{ranks.rank}.safetensors")
    found["flow"] += losses(trainer, STEPS - 3)
    save_file(trainer.state_dict(), folder / f"flow-{ranks.rank}.safetensors")
    resumed = flow(ranks, seed=9)
    resumed.load_state_dict(load_file(folder / "flow-one.safetensors"))
    found["flow resumed"] = losses(resumed, STEPS - 3)
    with emulate_cuda_graphs() as recorder:
        found["flow recorded"] = losses(flow(ranks))
        found["recordings"] = recorder.captures
    learner = classifier(ranks)
    found["classifier"] = epochs(learner, 1)
    save_file(learner.state_dict(), folder / f"classifier-half-{ranks.rank}.safetensors")
    found["classifier"] += epochs(learner, 1)
    save_file(learner.state_dict(), folder / f"classifier-{ranks.rank}.safetensors")
    resumed_learner = classifier(ranks)
    resumed_learner.load_state_dict(load_file(folder / "classifier-one.safetensors"))
    found["classifier resumed"] = epochs(resumed_learner, 1)
    found["broadcast"] = ranks.broadcast(ranks.rank + 5)
    if not ranks.first:
        asked.set()
    try:
        ranks.stop_point()
    except KeyboardInterrupt:
        found["stopped"] = True
    (folder / f"{ranks.rank}.json").write_bytes(msgspec.json.encode(found))


if __name__ == "__main__":
    child = os.fork()  # so that torch is imported once
    rank = str(int(child == 0))
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
    _main(Path(sys.argv[1]))
    leave_ranks(int(child != 0 and os.waitpid(child, 0)[1] != 0))
