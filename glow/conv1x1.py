"""The invertible 1×1 convolution, W = P·L·(U + diag(sign·exp(log_diagonal))) [P §2; Glow §3.2].

The one rule: the small C×C matrices live in float64 from the product to the inverse, and only the result is rounded to
the activations' type; so the two directions differ by the rounding of one matrix, whatever its condition.

Axes: B batch, C channels, H height, W width.
"""

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from torch import nn

from lsmix.glow.network import fused_conv

__all__ = ["Conv1x1", "mix_channels"]


def mix_channels(x_BCHW: torch.Tensor, weight_CC: torch.Tensor, bias_C: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply the channels of each pixel by a matrix, then add a bias; the result is channels-last in memory.

    A matrix product on the NHWC view and no ``conv2d``, which keeps cuDNN's TF32 switch to the coupling networks, the
    only place where TF32 is harmless. On the CPU, where no gradient is wanted, oneDNN's convolution takes half the time.
    """
    if not torch.is_grad_enabled():
        y_BCHW = fused_conv(x_BCHW, weight_CC[:, :, None, None], bias_C)
        if y_BCHW is not None:
            return y_BCHW
    return F.linear(x_BCHW.permute(0, 2, 3, 1), weight_CC, bias_C).permute(0, 3, 1, 2)


class Conv1x1(nn.Module):
    """A learned mixing of channels that starts as a random rotation.

    Example:
        >>> import numpy as np, torch
        >>> from lsmix.glow.conv1x1 import Conv1x1
        >>> layer, x = Conv1x1(4), torch.ones(2, 4, 2, 2)
        >>> layer.reset(np.random.default_rng(0))
        >>> y, log_det = layer(x)
        >>> bool(torch.allclose(layer.inverse(y), x, atol=1e-5)), bool(log_det.abs().max() < 1e-5)
        (True, True)
    """

    permutation: torch.Tensor
    sign: torch.Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.lower = nn.Parameter(torch.zeros(channels, channels))  # only what is below the diagonal counts
        self.upper = nn.Parameter(torch.zeros(channels, channels))  # only what is above the diagonal counts
        self.log_diagonal = nn.Parameter(torch.zeros(channels))
        self.register_buffer("permutation", torch.arange(channels))  # row i of W is row permutation[i] of L·U
        self.register_buffer("sign", torch.ones(channels))

    @torch.no_grad()
    def reset(self, generator: np.random.Generator) -> None:
        """Start from a random orthogonal matrix."""
        channels = self.sign.numel()
        rotation_CC, triangle_CC = np.linalg.qr(generator.standard_normal((channels, channels)))
        rotation_CC *= np.sign(np.diag(triangle_CC))  # without it the rotations are not uniformly distributed
        P, L, U = torch.linalg.lu(torch.from_numpy(rotation_CC))
        diagonal_C = U.diagonal()
        self.lower.copy_(L.tril(-1))
        self.upper.copy_(U.triu(1))
        self.log_diagonal.copy_(diagonal_C.abs().log())
        self.sign.copy_(diagonal_C.sign())
        self.permutation.copy_(P.argmax(dim=1))

    def _triangles(self) -> tuple[torch.Tensor, torch.Tensor]:
        lower_CC, upper_CC = self.lower.double().tril(-1), self.upper.double().triu(1)
        ones_C = torch.ones_like(lower_CC[0])
        return (
            lower_CC + torch.diag(ones_C),
            upper_CC + torch.diag(self.sign.double() * self.log_diagonal.double().exp()),
        )

    def weight(self) -> torch.Tensor:
        """Return W, float64 (C, C)."""
        lower_CC, upper_CC = self._triangles()
        return (lower_CC @ upper_CC).index_select(0, self.permutation)

    def inverse_weight(self) -> torch.Tensor:
        """Return the inverse of W, float64 (C, C)."""
        lower_CC, upper_CC = self._triangles()
        eye_CC = torch.diag(torch.ones_like(lower_CC[0]))
        half_way_CC = torch.linalg.solve_triangular(lower_CC, eye_CC, upper=False, unitriangular=True)
        inverse_CC: torch.Tensor = torch.linalg.solve_triangular(upper_CC, half_way_CC, upper=True)
        return inverse_CC.index_select(1, self.permutation)

    def forward(self, x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return y (B, C, H, W) and the log-determinant (B,), float64."""
        B, _, H, W = x_BCHW.shape
        y_BCHW = mix_channels(x_BCHW, self.weight().to(x_BCHW.dtype))
        return y_BCHW, (self.log_diagonal.double().sum() * (H * W)).expand(B)

    def inverse(self, y_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the x (B, C, H, W) that ``forward`` maps to y."""
        return mix_channels(y_BCHW, self.inverse_weight().to(y_BCHW.dtype))

    def extra_repr(self) -> str:
        """Say the number of channels."""
        return f"{self.sign.numel()}"
