"""Wide residual networks, WRN-D-K [P B.2; Zagoruyko and Komodakis 2016, arXiv:1605.07146, and their Torch code].

If the shorter side of the images has at least 64 pixels, the first group also halves them, so that the last grid is 8×8
for both 32×32 and 64×64.

Axes: B images, C channels, H rows, W columns, K classes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["WideResNet"]

_STEM = 16  # channels of the first convolution; the groups have 1, 2 and 4 times as many, times K
_LARGE = 64  # minimum shorter side, in pixels, for the first group to halve the grid


class WideResNet(nn.Module):
    """Map images (B, C, H, W) to logits (B, K).

    ``depth`` is 6n + 4, with n blocks in each of the three groups; ``widening`` is K in WRN-D-K. There is no dropout,
    as in the paper. Images may have any size, since the last grid is averaged.

    Example:
        >>> import torch
        >>> from lsmix.classifiers.wide_resnet import WideResNet
        >>> WideResNet(classes=10, in_channels=1, image_size=(8, 8), depth=10, widening=1)(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        classes: int,
        in_channels: int = 3,
        image_size: tuple[int, int] = (32, 32),
        depth: int = 28,
        widening: int = 10,
    ) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        widths = [_STEM * widening * factor for factor in (1, 2, 4)]
        self.image_size = image_size
        self.stem = nn.Conv2d(in_channels, _STEM, 3, padding=1, bias=False)
        self.groups = nn.Sequential(
            _group(_STEM, widths[0], blocks, stride=2 if min(image_size) >= _LARGE else 1),
            _group(widths[0], widths[1], blocks, stride=2),
            _group(widths[1], widths[2], blocks, stride=2),
        )
        self.norm = nn.BatchNorm2d(widths[2])
        self.head = nn.Linear(widths[2], classes)
        self._initialise()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return logits (B, K) of images (B, C, H, W)."""
        grid_BCHW = functional.relu(self.norm(self.groups(self.stem(x_BCHW))), inplace=True)
        logits_BK: Tensor = self.head(grid_BCHW.mean(dim=(2, 3)))
        return logits_BK

    def extra_repr(self) -> str:
        """Return the image size for ``repr``."""
        return f"image_size={self.image_size}"

    def _initialise(self) -> None:
        """Draw weights from the global generator like the authors' code: He by fan-out, torch's default for the head."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.head.bias)


class _Block(nn.Module):
    """x + conv(act(conv(act(x)))); act is batch norm and ReLU. If the shape changes, conv1×1(act(x)) replaces x."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        changes = stride != 1 or channels_in != channels_out
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False) if changes else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        active_BCHW = functional.relu(self.norm1(x_BCHW), inplace=True)
        shortcut_BCHW = x_BCHW if self.shortcut is None else self.shortcut(active_BCHW)
        inner_BCHW = functional.relu(self.norm2(self.conv1(active_BCHW)), inplace=True)
        return torch.add(self.conv2(inner_BCHW), shortcut_BCHW)


def _group(channels_in: int, channels_out: int, blocks: int, *, stride: int) -> nn.Sequential:
    rest = [_Block(channels_out, channels_out, 1) for _ in range(blocks - 1)]
    return nn.Sequential(_Block(channels_in, channels_out, stride), *rest)
