"""One step of the flow: ActNorm, 1×1 convolution, coupling [P §2].

The one rule: here the layers stand for themselves, one after the other; ``FlowLevel`` computes the same faster.

Axes: B batch, C channels, H height, W width.
"""

import numpy as np
import torch
from torch import nn

from lsmix.glow.actnorm import ActNorm
from lsmix.glow.config import Scale
from lsmix.glow.conv1x1 import Conv1x1
from lsmix.glow.coupling import AffineCoupling

__all__ = ["FlowStep"]


class FlowStep(nn.Module):
    """ActNorm, 1×1 convolution and coupling, one after the other."""

    def __init__(self, channels: int, *, hidden: int, scale: Scale) -> None:
        super().__init__()
        self.actnorm = ActNorm(channels)
        self.conv1x1 = Conv1x1(channels)
        self.coupling = AffineCoupling(channels, hidden=hidden, scale=scale)

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
        y_BCHW, log_det_norm_B = self.actnorm(x_BCHW)
        y_BCHW, log_det_conv_B = self.conv1x1(y_BCHW)
        y_BCHW, log_det_coupling_B = self.coupling(y_BCHW)
        return y_BCHW, log_det_norm_B + log_det_conv_B + log_det_coupling_B

    def inverse(self, y_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the x (B, C, H, W) that ``forward`` maps to y."""
        x_BCHW: torch.Tensor = self.actnorm.inverse(self.conv1x1.inverse(self.coupling.inverse(y_BCHW)))
        return x_BCHW
