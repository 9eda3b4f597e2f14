"""The same Glow architecture built with lsmix and with each peer's own layers, behind one small interface.

Every peer is built as its documentation shows, with the same coupling networks (3×3, 1×1 and 3×3 convolutions of one
width), affine coupling of one half, ActNorm, 1×1 convolutions and factoring out. Missing features count in favour of
the peer: FrEIA's 1×1 convolution is fixed, so it needs no gradient.

Axes: B batch, C channels, H height, W width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["HIDDEN", "LEVELS", "PEERS", "SIDE", "Model", "coupling_flops", "lsmix_model"]

LEVELS = 3  # L of the paper
HIDDEN = 128  # width of the paper's coupling networks
SIDE = 32  # pixels per side of an image with three channels


@dataclass(frozen=True)
class Model:
    """A flow behind one interface; y is float32 (B, 3, 32, 32) in (−½, ½)."""

    module: nn.Module
    log_prob: Callable[[torch.Tensor], torch.Tensor]  # y -> nats (B,)
    encode: Callable[[torch.Tensor], Any]  # y -> latent, in the library's own representation
    decode: Callable[[Any], torch.Tensor]  # latent -> y


def coupling_flops(steps: int) -> float:
    """Return the floating-point operations of a forward pass of one image through the coupling networks, K ``steps``."""
    flops = 0
    for level in range(LEVELS):
        channels, side = 12 << level, SIDE >> (level + 1)
        macs = channels // 2 * HIDDEN * 9 + HIDDEN * HIDDEN + HIDDEN * channels * 9
        flops += 2 * macs * side * side * steps
    return float(flops)


def lsmix_model(steps: int) -> Model:
    """Return the flow of lsmix as its trainer uses it."""
    from lsmix.glow.config import FlowConfig
    from lsmix.glow.flow import Flow

    flow = Flow(FlowConfig(height=SIDE, width=SIDE, channels=3, levels=LEVELS, steps=steps, hidden=HIDDEN))
    return Model(flow, flow.log_prob_y, lambda y: flow.encode_batch(y)[0], flow.decode_batch)


def _network(inputs: int, outputs: int) -> nn.Sequential:
    last = nn.Conv2d(HIDDEN, outputs, 3, padding=1)
    nn.init.normal_(last.weight, std=1e-3)  # near Glow's zeros, so that the flow stays invertible after a training step
    nn.init.zeros_(last.bias)
    first = nn.Conv2d(inputs, HIDDEN, 3, padding=1)
    return nn.Sequential(first, nn.ReLU(inplace=True), nn.Conv2d(HIDDEN, HIDDEN, 1), nn.ReLU(inplace=True), last)


def _normflows(steps: int) -> Model:
    import normflows as nf

    bases, merges, flows = [], [], []
    for level in reversed(range(LEVELS)):  # normflows lists the deepest level first
        channels, side = 12 << level, SIDE >> (level + 1)
        blocks = [nf.flows.GlowBlock(channels, HIDDEN, split_mode="channel", scale=True) for _ in range(steps)]
        flows.append([*blocks, nf.flows.Squeeze()])
        deepest = level == LEVELS - 1
        if not deepest:
            merges.append(nf.flows.Merge())
        shape = (channels if deepest else channels // 2, side, side)
        bases.append(nf.distributions.DiagGaussian(shape, trainable=False))
    model = nf.MultiscaleFlow(bases, flows, merges)
    return Model(
        model, lambda y: model.log_prob(y, None), lambda y: model.inverse_and_log_det(y)[0], _normflows_decode(model)
    )


def _normflows_decode(model: Any) -> Callable[[Any], torch.Tensor]:
    def decode(z: Any) -> torch.Tensor:
        y: torch.Tensor = model.forward_and_log_det(z)[0]
        return y

    return decode


def _nflows(steps: int) -> Model:
    from nflows import transforms
    from nflows.distributions.normal import StandardNormal
    from nflows.flows.base import Flow

    composite = transforms.MultiscaleCompositeTransform(num_transforms=LEVELS)
    shape: Any = (3, SIDE, SIDE)
    for _ in range(LEVELS):
        squeeze = transforms.SqueezeTransform()
        channels, height, width = squeeze.get_output_shape(*shape)
        mask = torch.ones(channels)
        mask[channels // 2 :] = -1
        layers = [squeeze]
        for _ in range(steps):
            layers += [
                transforms.ActNorm(channels),
                transforms.OneByOneConvolution(channels),
                transforms.AffineCouplingTransform(mask, lambda i, o: _WithContext(_network(i, o))),
            ]
        shape = composite.add_transform(transforms.CompositeTransform(layers), (channels, height, width))
    model = Flow(composite, StandardNormal((3 * SIDE * SIDE,)))
    return Model(model, model.log_prob, lambda y: model.transform_to_noise(y), lambda z: composite.inverse(z)[0])


class _WithContext(nn.Module):
    """A network that ignores the context that nflows passes to it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor, context: object = None) -> torch.Tensor:
        out: torch.Tensor = self.network(x)
        return out


def _freia(steps: int) -> Model:
    from FrEIA import framework, modules

    nodes = [framework.InputNode(3, SIDE, SIDE, name="input")]
    outputs = []
    for level in range(LEVELS):
        channels = 12 << level
        nodes.append(framework.Node(nodes[-1], modules.IRevNetDownsampling, {}))
        for _ in range(steps):
            rotation = torch.linalg.qr(torch.randn(channels, channels))[0]
            nodes.append(framework.Node(nodes[-1], modules.ActNorm, {}))
            nodes.append(framework.Node(nodes[-1], modules.Fixed1x1Conv, {"M": rotation}))
            nodes.append(framework.Node(nodes[-1], modules.AffineCouplingOneSided, {"subnet_constructor": _network}))
        split = framework.Node(nodes[-1], modules.Split, {"n_sections": 2})
        nodes.append(split)
        outputs.append(framework.OutputNode(split.out1))
        nodes_end = split.out0
        if level < LEVELS - 1:
            nodes.append(
                framework.Node(
                    nodes_end,
                    modules.Reshape,
                    {"output_dims": (channels // 2, SIDE >> (level + 1), SIDE >> (level + 1))},
                )
            )
        else:
            outputs.append(framework.OutputNode(nodes_end))
    model = framework.GraphINN([*nodes, *outputs])

    def log_prob(y: torch.Tensor) -> torch.Tensor:
        parts, log_det = model(y)
        squares = sum(part.square().sum(dim=(1, 2, 3)) for part in parts)
        return log_det - 0.5 * squares

    return Model(model, log_prob, lambda y: model(y)[0], lambda z: model(z, rev=True)[0])


PEERS: dict[str, Callable[[int], Model]] = {"normflows": _normflows, "nflows": _nflows, "FrEIA": _freia}
