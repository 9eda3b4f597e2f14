"""One step of the flow: ActNorm, 1×1 convolution, coupling [P §2].

The one rule: without gradients, ActNorm and the 1×1 convolution are one matrix, kept between calls in eval mode alone,
and the coupling works in the memory of that matrix's result; with gradients, the layers stand for themselves.

Axes: B batch, C channels, H height, W width.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from lsmix.glow.actnorm import ActNorm
from lsmix.glow.config import Scale
from lsmix.glow.conv1x1 import Conv1x1, mix_channels
from lsmix.glow.coupling import AffineCoupling

__all__ = ["FlowStep"]


class _Folded(NamedTuple):
    """ActNorm and 1×1 convolution as one affine map of the channels, in both directions."""

    weight: torch.Tensor  # (C, C)
    bias: torch.Tensor  # (C,)
    inverse_weight: torch.Tensor  # (C, C)
    inverse_bias: torch.Tensor  # (C,)
    log_det_per_pixel: torch.Tensor  # float64, no axes


class FlowStep(nn.Module):
    """ActNorm, 1×1 convolution and coupling, one after the other."""

    def __init__(self, channels: int, *, hidden: int, scale: Scale) -> None:
        super().__init__()
        self.actnorm = ActNorm(channels)
        self.conv1x1 = Conv1x1(channels)
        self.coupling = AffineCoupling(channels, hidden=hidden, scale=scale)
        self._folded: _Folded | None = None
        self._folded_from: tuple[object, ...] = ()

    def reset(self, generator: np.random.Generator) -> None:
        """Draw the starting values."""
        self.conv1x1.reset(generator)
        self.coupling.reset(generator)

    @torch.no_grad()
    def initialise(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Let ActNorm initialise itself from this batch; return the step's output for it."""
        self.actnorm.initialise(x_BCHW)
        y_BCHW, _ = self.forward(x_BCHW)
        return y_BCHW

    def forward(self, x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return y (B, C, H, W) and the log-determinant (B,), float64."""
        if torch.is_grad_enabled():
            y_BCHW, log_det_norm_B = self.actnorm(x_BCHW)
            y_BCHW, log_det_conv_B = self.conv1x1(y_BCHW)
            y_BCHW, log_det_coupling_B = self.coupling(y_BCHW)
            return y_BCHW, log_det_norm_B + log_det_conv_B + log_det_coupling_B
        folded = self._fold()
        y_BCHW = mix_channels(x_BCHW, folded.weight, folded.bias)
        log_det_B = self.coupling.forward_(y_BCHW)
        return y_BCHW, log_det_B + folded.log_det_per_pixel * (y_BCHW.shape[2] * y_BCHW.shape[3])

    def inverse(self, y_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the x (B, C, H, W) that ``forward`` maps to y."""
        if torch.is_grad_enabled():
            x_BCHW: torch.Tensor = self.actnorm.inverse(self.conv1x1.inverse(self.coupling.inverse(y_BCHW)))
            return x_BCHW
        return self.inverse_(y_BCHW.clone(memory_format=torch.channels_last))

    def inverse_(self, y_BCHW: torch.Tensor) -> torch.Tensor:
        """Do ``inverse`` without gradients, spending the memory of y on the way."""
        folded = self._fold()
        self.coupling.inverse_(y_BCHW)
        return mix_channels(y_BCHW, folded.inverse_weight, folded.inverse_bias)

    def train(self, mode: bool = True) -> "FlowStep":
        """Switch between training and evaluation; forget the folded map."""
        self._folded = None
        super().train(mode)
        return self

    def _fold(self) -> _Folded:
        """Return the folded map, made again if a parameter was replaced, moved or written since the last time.

        torch's fused optimisers write parameters without raising their version (seen in 2.13), so versions alone would
        serve a stale map; hence nothing is kept in training mode, and ``train`` and ``eval`` forget what was.
        """
        if self.training:
            return self._make_fold()
        parameters = (*self.actnorm.parameters(), *self.conv1x1.parameters(), *self.conv1x1.buffers())
        made_from = tuple((id(value), value._version, value.device, value.dtype) for value in parameters)
        if self._folded is None or made_from != self._folded_from:
            self._folded, self._folded_from = self._make_fold(), made_from
        return self._folded

    def _make_fold(self) -> _Folded:
        dtype = self.actnorm.shift.dtype
        scale_C, shift_C = self.actnorm.log_scale.double().exp(), self.actnorm.shift.double()
        weight_CC = self.conv1x1.weight() * scale_C
        inverse_CC = self.conv1x1.inverse_weight() / scale_C[:, None]
        return _Folded(
            weight_CC.to(dtype),
            (weight_CC @ shift_C).to(dtype),
            inverse_CC.to(dtype),
            -shift_C.to(dtype),
            self.actnorm.log_scale.double().sum() + self.conv1x1.log_diagonal.double().sum(),
        )
