"""A level of the flow: its steps, their folded form for evaluation, and one autograd function with a manual gradient.

The backward pass needs each step's input, output, log-scale and network activations. They are stored or, with
``rebuild``, recomputed from the level's output.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from lsmix.glow.config import Scale
from lsmix.glow.layers import ActNorm, AffineCoupling, Conv1x1, log_scale_gradient, log_scale_of, mix_channels
from lsmix.glow.network import Activations, NetworkWeights, network_gradients, pixel_rows, run_network

__all__ = ["FlowLevel", "FlowStep", "Folded", "FrozenLevel", "LevelOptions", "couple_", "fold", "level_forward"]

_PARAMETERS = 7  # per coupling


class LevelOptions(NamedTuple):
    """Options for computing a level."""

    scale: str  # form of the coupling's scale
    network_dtype: torch.dtype | None  # compute type of the coupling networks; None: type of the parameters
    rebuild: bool  # whether the backward pass recomputes activations instead of storing them


class Folded(NamedTuple):
    """The affine maps y = W·x + b of K steps, and their inverses."""

    weight_KCC: torch.Tensor
    bias_KC: torch.Tensor
    inverse_weight_KCC: torch.Tensor  # without gradient; has zero steps if no inverse was requested
    inverse_bias_KC: torch.Tensor  # without gradient
    log_det_per_pixel: torch.Tensor  # sum over all steps, float64, no axes


def level_forward(
    x_BCHW: torch.Tensor, folded: Folded, couplings: Sequence[torch.Tensor], options: LevelOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a level's output (B, C, H, W) and the sum of its log-scales (B,), float64; both have gradients.

    Args:
        x_BCHW: Input of the level, after the squeeze.
        folded: ActNorm and 1×1 convolution of the level's K steps.
        couplings: The 7 parameters of each step's coupling, K · 7 in total.
        options: Options for the computation.
    """
    *maps, _ = folded
    result: tuple[torch.Tensor, torch.Tensor] = _Level.apply(x_BCHW, *maps, options, *couplings)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return result


def couple_(x_BCHW: torch.Tensor, weights: NetworkWeights, scale: str) -> tuple[torch.Tensor, Activations]:
    """Replace a coupling's input by its output in place; return the log-scale and the network's activations."""
    x1_BCHW, x2_BCHW = x_BCHW.chunk(2, dim=1)
    out_BCHW, activations = run_network(x1_BCHW, weights)
    shift_BCHW, raw_BCHW = out_BCHW.chunk(2, dim=1)
    log_scale_BCHW = log_scale_of(raw_BCHW, scale)
    x2_BCHW.add_(shift_BCHW).mul_(log_scale_BCHW.exp())
    return log_scale_BCHW, activations


class _Step(NamedTuple):
    """Values that the gradient of a step needs."""

    y_BCHW: torch.Tensor  # output of the step
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
                step, x_before_BCHW = _rebuild(y_BCHW, parameters, options)
                y_BCHW = mix_channels(x_before_BCHW, inverse_weight_KCC[k], inverse_bias_KC[k])
                before_BCHW = y_BCHW
            else:
                step = _Step(*kept[4 * k : 4 * k + 4])
                before_BCHW = kept[4 * k - 4] if k else x_BCHW
            g_couplings[:0] = _coupling_gradients_(g_BCHW, g_log_scale_BCHW, step, parameters, options)
            g_pixels, x_pixels = pixel_rows(g_BCHW), pixel_rows(before_BCHW)
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
    """Replace the gradient of a coupling's output by that of its input in place; return its parameters' gradients."""
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


def _rebuild(y_BCHW: torch.Tensor, parameters: list[torch.Tensor], options: LevelOptions) -> tuple[_Step, torch.Tensor]:
    """Recompute from a coupling's output the values that its gradient needs, and its input."""
    y1_BCHW, y2_BCHW = y_BCHW.chunk(2, dim=1)
    out_BCHW, activations = run_network(y1_BCHW, NetworkWeights.of(parameters, options.network_dtype))
    shift_BCHW, raw_BCHW = out_BCHW.chunk(2, dim=1)
    log_scale_BCHW = log_scale_of(raw_BCHW, options.scale)
    x2_BCHW = y2_BCHW * torch.exp(-log_scale_BCHW) - shift_BCHW
    return _Step(y_BCHW, log_scale_BCHW, *activations), torch.cat((y1_BCHW, x2_BCHW), dim=1)


def _of_step(couplings: Any, k: int) -> list[torch.Tensor]:
    return list(couplings[_PARAMETERS * k : _PARAMETERS * (k + 1)])


class FrozenLevel(NamedTuple):
    """Everything that evaluation computes from the parameters alone."""

    folded: Folded
    networks: list[NetworkWeights]


class FlowStep(nn.Module):
    """One step: ActNorm, then 1×1 convolution, then coupling."""

    def __init__(self, channels: int, *, hidden: int, scale: Scale) -> None:
        super().__init__()
        self.actnorm = ActNorm(channels)
        self.conv1x1 = Conv1x1(channels)
        self.coupling = AffineCoupling(channels, hidden=hidden, scale=scale)

    def reset(self, generator: np.random.Generator) -> None:
        """Draw the initial weights."""
        self.conv1x1.reset(generator)
        self.coupling.reset(generator)

    @torch.no_grad()
    def initialise(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Initialise ActNorm from this batch; return the step's output for it."""
        self.actnorm.initialise(x_BCHW)
        y_BCHW, _ = self.forward(x_BCHW)
        return y_BCHW

    def forward(self, x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return y (B, C, H, W) and the log-determinant (B,), float64."""
        y_BCHW, log_det_norm_B = self.actnorm(x_BCHW)
        y_BCHW, log_det_conv_B = self.conv1x1(y_BCHW)
        y_BCHW, log_det_coupling_B = self.coupling(y_BCHW)
        return y_BCHW, log_det_norm_B + log_det_conv_B + log_det_coupling_B

    def inverse(self, y_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the x (B, C, H, W) that ``forward`` maps to y."""
        x_BCHW: torch.Tensor = self.actnorm.inverse(self.conv1x1.inverse(self.coupling.inverse(y_BCHW)))
        return x_BCHW


class FlowLevel(nn.ModuleList):
    """The steps of a level: everything between the squeeze and factoring out.

    Example:
        >>> import torch
        >>> from lsmix.glow.level import FlowLevel
        >>> level, x = FlowLevel(4, steps=2, hidden=8, scale="tanh"), torch.ones(2, 4, 2, 2)
        >>> y, log_det = level(x)
        >>> bool(torch.allclose(level.inverse(y), x)), log_det.shape
        (True, torch.Size([2]))
    """

    def __init__(self, channels: int, *, steps: int, hidden: int, scale: Scale) -> None:
        super().__init__(FlowStep(channels, hidden=hidden, scale=scale) for _ in range(steps))
        self.scale: Scale = scale
        self.network_dtype: torch.dtype | None = None  # bfloat16 while a trainer uses that precision
        self.rebuild = False  # whether the backward pass recomputes activations: less memory, more work
        self._inverses: tuple[torch.Tensor, torch.Tensor] | None = None  # inverse maps for recomputing activations
        self._frozen: FrozenLevel | None = None
        self._frozen_from: tuple[object, ...] = ()
        self._locations: list[tuple[Mapping[str, torch.Tensor | None], str]] = []  # of parameters and buffers

    def steps(self) -> Iterator[FlowStep]:
        """Iterate over the steps."""
        return (cast(FlowStep, step) for step in self)

    def forward(self, x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return y (B, C, H, W) and the log-determinant (B,), float64."""
        if torch.is_grad_enabled():
            folded = fold(list(self.steps()), inverse=False)
            if self.rebuild and self._inverses is not None:
                folded = folded._replace(inverse_weight_KCC=self._inverses[0], inverse_bias_KC=self._inverses[1])
            couplings = [parameter for step in self.steps() for parameter in step.coupling.parameters()]
            options = LevelOptions(self.scale, self.network_dtype, self.rebuild)
            y_BCHW, log_det_B = level_forward(x_BCHW, folded, couplings, options)
        else:
            folded, networks = self.freeze()
            y_BCHW, log_det_B = x_BCHW, torch.zeros(len(x_BCHW), dtype=torch.float64, device=x_BCHW.device)
            for weight_CC, bias_C, network in zip(folded.weight_KCC, folded.bias_KC, networks, strict=True):
                y_BCHW = mix_channels(y_BCHW, weight_CC, bias_C)
                log_det_B += couple_(y_BCHW, network, self.scale)[0].sum(dim=(1, 2, 3))
        return y_BCHW, log_det_B + folded.log_det_per_pixel * (y_BCHW.shape[2] * y_BCHW.shape[3])

    def inverse(self, y_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the x (B, C, H, W) that ``forward`` maps to y."""
        if torch.is_grad_enabled():
            for step in reversed(list(self.steps())):
                y_BCHW = step.inverse(y_BCHW)
            return y_BCHW
        folded, networks = self.freeze()
        x_BCHW = y_BCHW.clone(memory_format=torch.channels_last)
        maps = zip(folded.inverse_weight_KCC, folded.inverse_bias_KC, networks, strict=True)
        for weight_CC, bias_C, network in reversed(list(maps)):
            y1_BCHW, y2_BCHW = x_BCHW.chunk(2, dim=1)
            shift_BCHW, raw_BCHW = run_network(y1_BCHW, network)[0].chunk(2, dim=1)
            log_scale_BCHW = log_scale_of(raw_BCHW, self.scale)
            y2_BCHW.mul_(log_scale_BCHW.neg_().exp_()).sub_(shift_BCHW)
            x_BCHW = mix_channels(x_BCHW, weight_CC, bias_C)
        return x_BCHW

    @torch.no_grad()
    def initialise(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Initialise every ActNorm from this batch; return the level's output for it."""
        for step in self.steps():
            x_BCHW = step.initialise(x_BCHW)
        return x_BCHW

    @torch.no_grad()
    def set_rebuild(self, rebuild: bool) -> None:
        """Choose whether the backward pass recomputes activations; if so, compute the inverse maps now.

        They are computed here and not in ``forward``, since not every triangular solver can be part of a CUDA graph.
        They stay at the same address, where a recorded graph reads them. Call this again after each parameter update.
        """
        self.rebuild = rebuild
        if not rebuild:
            return
        folded = fold(list(self.steps()))
        solved = folded.inverse_weight_KCC, folded.inverse_bias_KC
        kept = self._inverses
        if kept is None or (kept[0].device, kept[0].dtype) != (solved[0].device, solved[0].dtype):
            self._inverses = solved
        else:
            kept[0].copy_(solved[0])
            kept[1].copy_(solved[1])

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without values that can be recomputed from the parameters."""
        blank: dict[str, Any] = {"_inverses": None, "_frozen": None, "_frozen_from": (), "_locations": []}
        return {**self.__dict__, "rebuild": False, **blank}

    def train(self, mode: bool = True) -> "FlowLevel":
        """Switch between training and evaluation mode; discard the frozen weights."""
        self._frozen = None
        super().train(mode)
        return self

    def freeze(self) -> FrozenLevel:
        """Return the frozen weights, recomputed if a parameter was replaced, moved or written since the last call.

        torch's fused optimisers update parameters without incrementing their version (seen in 2.13), so versions alone
        cannot detect stale weights. Training mode therefore caches nothing, and ``train`` and ``eval`` clear the cache.
        """
        if not self._locations:  # iterating over all modules in every call would take 3% of a decode
            modules = list(self.modules())
            self._locations = [(module._parameters, name) for module in modules for name in module._parameters]
            self._locations += [(module._buffers, name) for module in modules for name in module._buffers]
        values = [cast(torch.Tensor, owner[name]) for owner, name in self._locations]
        state = (self.network_dtype, *[(id(value), value._version, value.data_ptr()) for value in values])
        if self.training or self._frozen is None or state != self._frozen_from:
            couplings = [step.coupling for step in self.steps()]
            networks = [NetworkWeights.of(list(coupling.parameters()), self.network_dtype) for coupling in couplings]
            self._frozen = FrozenLevel(fold(list(self.steps())), networks)
            self._frozen_from = state
        return self._frozen


def fold(steps: Sequence[FlowStep], *, inverse: bool = True) -> Folded:
    """Fold ActNorm and 1×1 convolution of each step into one affine map; gradients pass through.

    Args:
        steps: The steps of one level.
        inverse: Whether to compute the inverse maps as well.
    """
    norms, convs = [step.actnorm for step in steps], [step.conv1x1 for step in steps]
    dtype = norms[0].shift.dtype
    shift_KC = torch.stack([norm.shift for norm in norms]).double()
    log_scale_KC = torch.stack([norm.log_scale for norm in norms]).double()
    log_diagonal_KC = torch.stack([conv.log_diagonal for conv in convs]).double()
    sign_KC = torch.stack([conv.sign for conv in convs]).double()
    eye_CC = torch.diag(torch.ones_like(sign_KC[0]))
    lower_KCC = torch.stack([conv.lower for conv in convs]).double().tril(-1) + eye_CC
    upper_KCC = torch.stack([conv.upper for conv in convs]).double().triu(1)
    upper_KCC = upper_KCC + torch.diag_embed(sign_KC * log_diagonal_KC.exp())
    # A product with P is exact and, unlike indexing, has a deterministic gradient on every device.
    permuted_KCC = eye_CC[torch.stack([conv.permutation for conv in convs])]
    weight_KCC = permuted_KCC @ (lower_KCC @ upper_KCC) * log_scale_KC.exp()[:, None, :]
    bias_KC = (weight_KCC @ shift_KC[:, :, None])[:, :, 0]
    inverse_KCC = weight_KCC.detach()[:0]
    if inverse:
        inverse_KCC = (
            _inverse(lower_KCC.detach(), upper_KCC.detach(), permuted_KCC) / log_scale_KC.detach().exp()[:, :, None]
        )
    return Folded(
        weight_KCC.to(dtype),
        bias_KC.to(dtype),
        inverse_KCC.to(dtype),
        -shift_KC.detach().to(dtype),
        log_scale_KC.sum() + log_diagonal_KC.sum(),
    )


def _inverse(lower_KCC: torch.Tensor, upper_KCC: torch.Tensor, permuted_KCC: torch.Tensor) -> torch.Tensor:
    """Return the inverse of P·L·U: (L·U)⁻¹·Pᵀ."""
    solved_KCC = torch.linalg.solve_triangular(lower_KCC, permuted_KCC.mT, upper=False, unitriangular=True)
    inverse_KCC: torch.Tensor = torch.linalg.solve_triangular(upper_KCC, solved_KCC, upper=True)
    return inverse_KCC
