"""The layers of a step: squeeze, ActNorm, invertible 1×1 convolution and affine coupling [P §2; Glow §3].

The coupling's scale is bounded below by ½. The inverse divides by the scale, and flows whose scale may approach zero
decode mixed latents to infinity. The bound does not cost any bits.
"""

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's convention
from torch import nn

from lsmix.glow.config import Scale
from lsmix.glow.network import OUTPUT_GAIN, fused_conv

__all__ = [
    "ActNorm",
    "AffineCoupling",
    "Conv1x1",
    "depth_to_space",
    "log_scale_gradient",
    "log_scale_of",
    "mix_channels",
    "space_to_depth",
]

# "tanh" is exp(½·tanh 2r), in (0.61, 1.65); "sigmoid" is ½ + ½·sigmoid(r + 2), in (½, 1). Measured on CIFAR-10 (K=8,
# L=3, width 64, 300 steps of 32 images at 1e-3, one seed), tanh / sigmoid: 2.12 / 2.19 held-out bits per dimension,
# 0 / 2 of 128 LS-Mix images with over 2% of their pixels beyond ±0.6; round-trip error 1e-6, all finite, for both.
# After 2,500 steps of 64 images, "tanh" still decodes 1,000 of 1,000 LS-Mix images within ±0.92, so it is the default.


def log_scale_of(raw_BCHW: torch.Tensor, scale: str) -> torch.Tensor:
    """Return the log of the scale as a new tensor, from the network's raw output."""
    if scale == "sigmoid":
        return torch.log(0.5 + 0.5 * torch.sigmoid(raw_BCHW + 2.0))
    # ½·tanh 2r = σ(4r) − ½, and a sigmoid takes a quarter of a tanh's time.
    return torch.sigmoid(4.0 * raw_BCHW) - 0.5


def log_scale_gradient(log_scale_BCHW: torch.Tensor, scale: str) -> torch.Tensor:
    """Return the derivative of ``log_scale_of`` with respect to its input, given its result ``log_scale_BCHW``."""
    if scale == "sigmoid":
        factor_BCHW = log_scale_BCHW.exp()  # ½ + ½σ, so σ = 2·factor − 1
        return (2.0 * factor_BCHW - 1.0) * (1.0 - factor_BCHW) / factor_BCHW
    return 1.0 - 4.0 * log_scale_BCHW.square()


class AffineCoupling(nn.Module):
    """Transform half of the channels: y₂ = (x₂ + shift) · scale; a network of the other half computes shift and scale.

    The network is conv 3×3, ReLU, conv 1×1, ReLU, conv 3×3; the last one starts at zero and has a learned output scale.

    Example:
        >>> import torch
        >>> from lsmix.glow.layers import AffineCoupling
        >>> layer, x = AffineCoupling(4, hidden=8), torch.ones(2, 4, 2, 2)
        >>> y, log_det = layer(x)
        >>> bool(torch.allclose(layer.inverse(y), x)), log_det.shape
        (True, torch.Size([2]))
    """

    def __init__(self, channels: int, *, hidden: int, scale: Scale = "tanh") -> None:
        super().__init__()
        self.kept = channels // 2  # number of unchanged channels, the input of the network
        self.scale: Scale = scale
        self.weight_in = _conv_weight(hidden, self.kept, 3)
        self.bias_in = nn.Parameter(torch.zeros(hidden))
        self.weight_mid = _conv_weight(hidden, hidden, 1)
        self.bias_mid = nn.Parameter(torch.zeros(hidden))
        self.weight_out = _conv_weight(channels, hidden, 3)
        self.bias_out = nn.Parameter(torch.zeros(channels))
        self.log_gain_out = nn.Parameter(torch.zeros(channels))

    @torch.no_grad()
    def reset(self, generator: np.random.Generator) -> None:
        """Draw the hidden weights (He initialisation); the last convolution stays zero, so the step starts linear."""
        for weight in (self.weight_in, self.weight_mid):
            values = generator.standard_normal(weight.shape, dtype=np.float32)
            weight.copy_(torch.from_numpy(values) * (2.0 / weight[0].numel()) ** 0.5)

    def _network(self, x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the shift and the log-scale, each (B, C/2, H, W)."""
        h_BCHW = F.relu(F.conv2d(x_BCHW, self.weight_in, self.bias_in, padding=1))
        h_BCHW = F.relu(F.conv2d(h_BCHW, self.weight_mid, self.bias_mid))
        h_BCHW = F.conv2d(h_BCHW, self.weight_out, self.bias_out, padding=1)
        shift_BCHW, raw_BCHW = (h_BCHW * torch.exp(OUTPUT_GAIN * self.log_gain_out)[:, None, None]).chunk(2, dim=1)
        return shift_BCHW, log_scale_of(raw_BCHW, self.scale)

    def forward(self, x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return y (B, C, H, W) and the log-determinant (B,), float64."""
        x1_BCHW, x2_BCHW = x_BCHW.chunk(2, dim=1)
        shift_BCHW, log_scale_BCHW = self._network(x1_BCHW)
        y2_BCHW = (x2_BCHW + shift_BCHW) * log_scale_BCHW.exp()
        return torch.cat((x1_BCHW, y2_BCHW), dim=1), log_scale_BCHW.sum(dim=(1, 2, 3)).double()

    def inverse(self, y_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the x (B, C, H, W) that ``forward`` maps to y."""
        y1_BCHW, y2_BCHW = y_BCHW.chunk(2, dim=1)
        shift_BCHW, log_scale_BCHW = self._network(y1_BCHW)
        x2_BCHW = y2_BCHW * torch.exp(-log_scale_BCHW) - shift_BCHW
        return torch.cat((y1_BCHW, x2_BCHW), dim=1)

    def extra_repr(self) -> str:
        """Return channels, hidden width and scale for ``repr``."""
        return f"{2 * self.kept}, hidden={self.bias_in.numel()}, scale={self.scale!r}"


def _conv_weight(outputs: int, inputs: int, size: int) -> nn.Parameter:
    weight = torch.zeros(outputs, inputs, size, size)
    return nn.Parameter(weight.to(memory_format=torch.channels_last))


def mix_channels(x_BCHW: torch.Tensor, weight_CC: torch.Tensor, bias_C: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply the channels of each pixel by a matrix and add a bias; the result is channels-last in memory.

    Uses a matrix product on the NHWC view rather than ``conv2d``, so that cuDNN's TF32 switch affects only the coupling
    networks, where TF32 is harmless. On the CPU without gradients, oneDNN's convolution takes half the time.
    """
    if not torch.is_grad_enabled():
        y_BCHW = fused_conv(x_BCHW, weight_CC[:, :, None, None], bias_C)
        if y_BCHW is not None:
            return y_BCHW
    return F.linear(x_BCHW.permute(0, 2, 3, 1), weight_CC, bias_C).permute(0, 3, 1, 2)


class Conv1x1(nn.Module):
    """An invertible 1×1 convolution with learned weights, initialised to a random rotation.

    Example:
        >>> import numpy as np, torch
        >>> from lsmix.glow.layers import Conv1x1
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
        self.lower = nn.Parameter(torch.zeros(channels, channels))  # only entries below the diagonal are used
        self.upper = nn.Parameter(torch.zeros(channels, channels))  # only entries above the diagonal are used
        self.log_diagonal = nn.Parameter(torch.zeros(channels))
        # Row i of W is row permutation[i] of L·U. Created on the CPU: "meta" would import sympy, which takes a second.
        self.register_buffer("permutation", torch.arange(channels, device="cpu").to(self.lower.device))
        self.register_buffer("sign", torch.ones(channels))

    @torch.no_grad()
    def reset(self, generator: np.random.Generator) -> None:
        """Initialise W to a random orthogonal matrix."""
        channels = self.sign.numel()
        rotation_CC, triangle_CC = np.linalg.qr(generator.standard_normal((channels, channels)))
        rotation_CC *= np.sign(np.diag(triangle_CC))  # without this, rotations would not be uniformly distributed
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
        solved_CC = torch.linalg.solve_triangular(lower_CC, eye_CC, upper=False, unitriangular=True)
        inverse_CC: torch.Tensor = torch.linalg.solve_triangular(upper_CC, solved_CC, upper=True)
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
        """Return the number of channels for ``repr``."""
        return f"{self.sign.numel()}"


_MIN_STD = 1e-6  # without it, a channel that is constant in the first batch would be scaled to infinity


class ActNorm(nn.Module):
    """Scale and shift each channel: y = (x + shift) · exp(log_scale).

    Example:
        >>> import torch
        >>> from lsmix.glow.layers import ActNorm
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
        """Set scale and shift such that the outputs for this batch have mean 0 and variance 1 in each channel."""
        std_C, mean_C = torch.std_mean(x_BCHW.double(), dim=(0, 2, 3), correction=0)
        self.shift.copy_(-mean_C)
        self.log_scale.copy_(-std_C.clamp_min(_MIN_STD).log())

    def forward(self, x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return y (B, C, H, W) and the log-determinant (B,), float64."""
        B, _, H, W = x_BCHW.shape
        y_BCHW = (x_BCHW + self.shift[:, None, None]) * self.log_scale.exp()[:, None, None]
        return y_BCHW, (self.log_scale.double().sum() * (H * W)).expand(B)

    def inverse(self, y_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the x (B, C, H, W) that ``forward`` maps to y."""
        return y_BCHW * torch.exp(-self.log_scale)[:, None, None] - self.shift[:, None, None]

    def extra_repr(self) -> str:
        """Return the number of channels for ``repr``."""
        return f"{self.shift.numel()}"


def space_to_depth(x_BCHW: torch.Tensor) -> torch.Tensor:
    """Fold each 2×2 block of pixels into channels: (B, C, H, W) -> (B, 4C, H/2, W/2).

    H and W must be even. out[:, (2i+j)·C + c, h, w] = x[:, c, 2h+i, 2w+j]; the result is channels-last in memory.

    Example:
        >>> import torch
        >>> from lsmix.glow.layers import space_to_depth
        >>> space_to_depth(torch.arange(8).reshape(1, 1, 2, 4)).flatten(2).tolist()
        [[[0, 2], [1, 3], [4, 6], [5, 7]]]
    """
    B, C, H, W = x_BCHW.shape
    # Folding into the last axis of the NHWC view keeps the result channels-last, the fast layout for convolutions here.
    blocks = x_BCHW.permute(0, 2, 3, 1).reshape(B, H // 2, 2, W // 2, 2, C)
    return blocks.permute(0, 1, 3, 2, 4, 5).reshape(B, H // 2, W // 2, 4 * C).permute(0, 3, 1, 2)


def depth_to_space(x_BCHW: torch.Tensor) -> torch.Tensor:
    """Unfold channels into 2×2 blocks of pixels: (B, 4C, H, W) -> (B, C, 2H, 2W); inverts ``space_to_depth``."""
    B, C, H, W = x_BCHW.shape
    blocks = x_BCHW.permute(0, 2, 3, 1).reshape(B, H, W, 2, 2, C // 4)
    return blocks.permute(0, 1, 3, 2, 4, 5).reshape(B, 2 * H, 2 * W, C // 4).permute(0, 3, 1, 2)
