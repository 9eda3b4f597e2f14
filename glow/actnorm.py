"""ActNorm: a scale and a shift per channel, set from one batch [P §2; Glow §3.1].

The one rule: ``forward`` never initialises anything; ``initialise`` is called once, by the trainer, and the flow's
state remembers it. So a loaded flow cannot initialise itself again, and no layer has to ask a flag on the way.

Axes: B batch, C channels, H height, W width.
"""

import torch
from torch import nn

__all__ = ["ActNorm"]

_LEAST_STD = 1e-6  # a channel that is constant over the whole first batch would be scaled to infinity


class ActNorm(nn.Module):
    """y = (x + shift) · exp(log_scale), per channel.

    Example:
        >>> import torch
        >>> from lsmix.glow.actnorm import ActNorm
        >>> layer, x = ActNorm(3), torch.arange(24.0).reshape(2, 3, 2, 2)
        >>> layer.initialise(x)
        >>> y, log_det = layer(x)
        >>> bool(torch.allclose(y.mean((0, 2, 3)), torch.zeros(3), atol=1e-6)), log_det.shape
        (True, torch.Size([2]))
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))

    @torch.no_grad()
    def initialise(self, x_BCHW: torch.Tensor) -> None:
        """Set scale and shift so that this very batch comes out with mean 0 and variance 1 in each channel."""
        std_C, mean_C = torch.std_mean(x_BCHW.double(), dim=(0, 2, 3), correction=0)
        self.shift.copy_(-mean_C)
        self.log_scale.copy_(-std_C.clamp_min(_LEAST_STD).log())

    def forward(self, x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return y (B, C, H, W) and the log-determinant (B,), float64."""
        B, _, H, W = x_BCHW.shape
        y_BCHW = (x_BCHW + self.shift[:, None, None]) * self.log_scale.exp()[:, None, None]
        return y_BCHW, (self.log_scale.double().sum() * (H * W)).expand(B)

    def inverse(self, y_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the x (B, C, H, W) that ``forward`` maps to y."""
        return y_BCHW * torch.exp(-self.log_scale)[:, None, None] - self.shift[:, None, None]

    def extra_repr(self) -> str:
        """Say the number of channels."""
        return f"{self.shift.numel()}"
