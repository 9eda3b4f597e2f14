"""Glow: training step, encode and decode against normflows at one architecture, on one core and in float32."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.turns import measure, save
from lsmix.glow.config import FlowConfig, FlowTraining
from lsmix.glow.flow import Flow
from lsmix.glow.training import FlowTrainer

_STEPS = 4  # K; the paper's 32 only multiplies the same work
_HIDDEN = 128
_BATCH = 32


def _normflows() -> Any:
    """Return normflows' multi-scale Glow of the same shape, as its own documentation builds it."""
    import normflows as nf

    levels, channels, side = 3, 3, 32
    bases, merges, flows = [], [], []
    for level in range(levels):
        squeezed = channels * 2 ** (levels + 1 - level)
        blocks = [nf.flows.GlowBlock(squeezed, _HIDDEN, split_mode="channel", scale=True) for _ in range(_STEPS)]
        flows.append([*blocks, nf.flows.Squeeze()])
        if level > 0:
            merges.append(nf.flows.Merge())
            shape = (squeezed // 2, side // 2 ** (levels - level), side // 2 ** (levels - level))
        else:
            shape = (squeezed, side // 2**levels, side // 2**levels)
        bases.append(nf.distributions.DiagGaussian(shape, trainable=False))
    return nf.MultiscaleFlow(bases, flows, merges)


def _ours(images: np.ndarray) -> dict[str, Callable[[], int]]:
    flow = Flow(FlowConfig(height=32, width=32, channels=3, levels=3, steps=_STEPS, hidden=_HIDDEN))
    trainer = FlowTrainer(flow, FlowTraining(batch_size=_BATCH), images)
    trainer.step()
    frozen = Flow(flow.config)
    frozen.load_state_dict(flow.state_dict())
    frozen.eval()
    z = frozen.encode(images, batch_size=_BATCH)
    if not (frozen.decode(z, batch_size=_BATCH) == images).all():
        raise RuntimeError("decode(encode(x)) differs from x: the measurement would be of something broken")

    def train() -> int:
        trainer.step()
        return _BATCH

    return {
        "train": train,
        "encode": lambda: len(frozen.encode(images, batch_size=_BATCH)),
        "decode": lambda: len(frozen.decode(z, batch_size=_BATCH)),
    }


def _theirs(images: np.ndarray) -> dict[str, Callable[[], int]]:
    model = _normflows()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-4)
    y = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32) / 256 - 0.5)
    model.forward_kld(y[:_BATCH])  # initialises its ActNorm

    def train() -> int:
        optimiser.zero_grad()
        loss = model.forward_kld(y[:_BATCH])
        loss.backward()
        optimiser.step()
        return _BATCH

    def encode() -> int:
        with torch.no_grad():
            for start in range(0, len(y), _BATCH):
                model.log_prob(y[start : start + _BATCH], None)
        return len(y)

    def decode() -> int:
        with torch.no_grad():
            for _ in range(0, len(y), _BATCH):
                model.sample(_BATCH)
        return len(y)

    return {"train": train, "encode": encode, "decode": decode}


def run() -> None:
    """Measure and save."""
    torch.set_num_threads(1)
    images = np.random.default_rng(0).integers(0, 256, (4 * _BATCH, 32, 32, 3), dtype=np.uint8)
    ours, theirs = _ours(images), _theirs(images)
    results = {}
    for job in ("train", "encode", "decode"):
        print(f"{job}, images a second, K={_STEPS}, L=3, width {_HIDDEN}, batch {_BATCH}, one core")
        results[job] = measure({"normflows": theirs[job], "lsmix": ours[job]}, floor="normflows", turns=7)
    print(f"written to {save('glow', {'steps': _STEPS, 'hidden': _HIDDEN, 'batch': _BATCH, 'results': results})}")
