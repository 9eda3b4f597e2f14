"""The steps of a level as one operation with a gradient written by hand.

The one rule: the way back needs each step's output, its input, its log-scale and its network's activations. They are
kept, or, with ``rebuild``, made again from the level's output, going backwards; then the level's output is all that is
ever kept, whatever K is (RevNet's idea; a fifth more work, a small part of the memory).

Axes: B batch, C channels, H height, W width, K steps.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from lsmix.glow.conv1x1 import mix_channels
from lsmix.glow.coupling import log_scale_gradient, log_scale_of
from lsmix.glow.folding import Folded
from lsmix.glow.network import Activations, NetworkWeights, network_gradients, run_network

__all__ = ["LevelOptions", "couple_", "level_forward"]

_PARAMETERS = 7  # of a coupling


class LevelOptions(NamedTuple):
    """How a level is computed."""

    scale: str  # form of the coupling's scale
    network_dtype: torch.dtype | None  # type that the coupling networks compute in; None: that of the parameters
    rebuild: bool  # whether activations are rebuilt on the way back instead of kept


def level_forward(
    x_BCHW: torch.Tensor, folded: Folded, couplings: Sequence[torch.Tensor], options: LevelOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a level's output (B, C, H, W), and the sum of its log-scales (B,), float64; both have gradients.

    Args:
        x_BCHW: the level's input, behind the squeeze.
        folded: ActNorm and 1×1 convolution of its K steps.
        couplings: the 7 parameters of each step's coupling, K · 7 in all.
        options: how to compute.
    """
    *maps, _ = folded
    result: tuple[torch.Tensor, torch.Tensor] = _Level.apply(x_BCHW, *maps, options, *couplings)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return result


def couple_(x_BCHW: torch.Tensor, weights: NetworkWeights, scale: str) -> tuple[torch.Tensor, Activations]:
    """Turn a coupling's input into its output, in its own memory; return its log-scale and its network's activations."""
    x1_BCHW, x2_BCHW = x_BCHW.chunk(2, dim=1)
    out_BCHW, activations = run_network(x1_BCHW, weights)
    shift_BCHW, raw_BCHW = out_BCHW.chunk(2, dim=1)
    log_scale_BCHW = log_scale_of(raw_BCHW, scale)
    x2_BCHW.add_(shift_BCHW).mul_(log_scale_BCHW.exp())
    return log_scale_BCHW, activations


class _Step(NamedTuple):
    """What a step's gradient needs."""

    y_BCHW: torch.Tensor  # its output
    log_scale_BCHW: torch.Tensor
    h_in_BCHW: torch.Tensor
    h_mid_BCHW: torch.Tensor


class _Level(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BCHW: torch.Tensor,
        weight_KCC: torch.Tensor,
        bias_KC: torch.Tensor,
        inverse_weight_KCC: torch.Tensor,
        inverse_bias_KC: torch.Tensor,
        options: LevelOptions,
        *couplings: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y_BCHW = x_BCHW
        kept: list[torch.Tensor] = []
        log_scale_B = torch.zeros(len(x_BCHW), dtype=torch.float64, device=x_BCHW.device)
        for k in range(len(weight_KCC)):
            y_BCHW = mix_channels(y_BCHW, weight_KCC[k], bias_KC[k])
            weights = NetworkWeights.of(_of_step(couplings, k), options.network_dtype)
            log_scale_BCHW, activations = couple_(y_BCHW, weights, options.scale)
            log_scale_B += log_scale_BCHW.sum(dim=(1, 2, 3))
            if not options.rebuild:
                kept += _Step(y_BCHW, log_scale_BCHW, *activations)
        if options.rebuild:
            kept = [y_BCHW]
        ctx.options, ctx.count = options, len(weight_KCC)
        ctx.save_for_backward(x_BCHW, weight_KCC, inverse_weight_KCC, inverse_bias_KC, *couplings, *kept)
        return y_BCHW, log_scale_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_y_BCHW: torch.Tensor, g_log_scale_B: torch.Tensor) -> tuple[Any, ...]:
        x_BCHW, weight_KCC, inverse_weight_KCC, inverse_bias_KC, *rest = ctx.saved_tensors
        count, options = ctx.count, ctx.options
        couplings, kept = rest[: count * _PARAMETERS], rest[count * _PARAMETERS :]
        g_BCHW = g_y_BCHW.clone(memory_format=torch.channels_last)
        g_log_scale_BCHW = g_log_scale_B.to(g_BCHW.dtype)[:, None, None, None]
        g_weight_KCC, g_bias_KC = torch.empty_like(weight_KCC), torch.empty_like(weight_KCC[:, :, 0])
        g_couplings: list[torch.Tensor] = []
        y_BCHW = kept[0]
        for k in reversed(range(count)):
            parameters = _of_step(couplings, k)
            if options.rebuild:
                step, x_before_BCHW = _rebuilt(y_BCHW, parameters, options)
                y_BCHW = mix_channels(x_before_BCHW, inverse_weight_KCC[k], inverse_bias_KC[k])
                before_BCHW = y_BCHW
            else:
                step = _Step(*kept[4 * k : 4 * k + 4])
                before_BCHW = kept[4 * k - 4] if k else x_BCHW
            g_couplings[:0] = _coupling_gradients_(g_BCHW, g_log_scale_BCHW, step, parameters, options)
            g_pixels, x_pixels = _pixels(g_BCHW), _pixels(before_BCHW)
            torch.mm(g_pixels.t(), x_pixels, out=g_weight_KCC[k])
            torch.sum(g_pixels, dim=0, out=g_bias_KC[k])
            g_BCHW = mix_channels(g_BCHW, weight_KCC[k].t())
        return g_BCHW, g_weight_KCC, g_bias_KC, None, None, None, *g_couplings


def _coupling_gradients_(
    g_BCHW: torch.Tensor,
    g_log_scale_BCHW: torch.Tensor,
    step: _Step,
    parameters: list[torch.Tensor],
    options: LevelOptions,
) -> list[torch.Tensor]:
    """Turn the gradient behind a coupling into the one before it, in its own memory; return those of its parameters."""
    y1_BCHW, y2_BCHW = step.y_BCHW.chunk(2, dim=1)
    g1_BCHW, g2_BCHW = g_BCHW.chunk(2, dim=1)
    g_out_BCHW = torch.empty_like(g_BCHW)
    g_shift_BCHW, g_raw_BCHW = g_out_BCHW.chunk(2, dim=1)
    # y₂ = (x₂ + shift)·s, so ∂y₂/∂log s = y₂ and ∂y₂/∂shift = ∂y₂/∂x₂ = s.
    torch.mul(g2_BCHW, y2_BCHW, out=g_raw_BCHW)
    g_raw_BCHW.add_(g_log_scale_BCHW).mul_(log_scale_gradient(step.log_scale_BCHW, options.scale))
    g2_BCHW.mul_(step.log_scale_BCHW.exp())
    g_shift_BCHW.copy_(g2_BCHW)
    activations = Activations(step.h_in_BCHW, step.h_mid_BCHW)
    g_x1_BCHW, gradients = network_gradients(g_out_BCHW, y1_BCHW, activations, parameters)
    g1_BCHW.add_(g_x1_BCHW)
    return gradients


def _rebuilt(y_BCHW: torch.Tensor, parameters: list[torch.Tensor], options: LevelOptions) -> tuple[_Step, torch.Tensor]:
    """Return what a coupling's gradient needs, and its input, from its output alone."""
    y1_BCHW, y2_BCHW = y_BCHW.chunk(2, dim=1)
    out_BCHW, activations = run_network(y1_BCHW, NetworkWeights.of(parameters, options.network_dtype))
    shift_BCHW, raw_BCHW = out_BCHW.chunk(2, dim=1)
    log_scale_BCHW = log_scale_of(raw_BCHW, options.scale)
    x2_BCHW = y2_BCHW * torch.exp(-log_scale_BCHW) - shift_BCHW
    return _Step(y_BCHW, log_scale_BCHW, *activations), torch.cat((y1_BCHW, x2_BCHW), dim=1)


def _of_step(couplings: Any, k: int) -> list[torch.Tensor]:
    return list(couplings[_PARAMETERS * k : _PARAMETERS * (k + 1)])


def _pixels(x_BCHW: torch.Tensor) -> torch.Tensor:
    """Return the channels of all pixels as rows, (B·H·W, C), without a copy of what is channels-last."""
    return x_BCHW.permute(0, 2, 3, 1).reshape(-1, x_BCHW.shape[1])
