"""CNN-13, the 13-layer convolutional classifier of Table 5 of the paper.

For small images, a max-pool (but not its dropout) is omitted if it would leave less than a 3×3 grid for the valid 3×3
convolution. Images of 12×12 and larger use both pools, 8×8 only the first, 3×3 to 5×5 none.

Axes: B images, C channels, H rows, W columns, K classes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from lsmix.data.errors import RecipeError

__all__ = ["Cnn13", "pooled_sides"]

_SLOPE = 0.1  # negative slope of all leaky ReLUs [P Table 5]
_BATCH_NORM_MOMENTUM = 0.01  # weight of the latest batch in the running statistics
_BATCH_NORM_EPS = 1e-6
_VALID_KERNEL = 3  # side of the convolution with valid padding; minimum side of the last grid


class Cnn13(nn.Module):
    """Map images in [0, 1] of shape (B, C, H, W) to logits (B, K).

    ``width`` is the number of channels of the first block; the blocks have 1, 2, 4, 2 and 1 times as many. A width of
    128 yields the 128, 256, 512, 256, 128 of Table 5. ``final_batch_norm`` adds row 14, which the paper uses for SVHN
    only. The pools depend on ``image_size``, (height, width); see ``pooled_sides``.

    Raises:
        RecipeError: The images are smaller than 3×3.

    Example:
        >>> import torch
        >>> from lsmix.classifiers.cnn13 import Cnn13
        >>> Cnn13(classes=10, image_size=(8, 8), in_channels=1, width=16)(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        classes: int,
        in_channels: int = 3,
        image_size: tuple[int, int] = (32, 32),
        width: int = 128,
        final_batch_norm: bool = False,
    ) -> None:
        super().__init__()
        sides = pooled_sides(image_size)
        self.image_size = image_size
        self.final_grid = (sides[-1][0] - _VALID_KERNEL + 1, sides[-1][1] - _VALID_KERNEL + 1)
        self.features = nn.Sequential(
            _convolution(in_channels, width),
            _convolution(width, width),
            _convolution(width, width),
            _reduction(pool=sides[1] != sides[0]),
            _convolution(width, 2 * width),
            _convolution(2 * width, 2 * width),
            _convolution(2 * width, 2 * width),
            _reduction(pool=sides[2] != sides[1]),
            _convolution(2 * width, 4 * width, padding=0),
            _convolution(4 * width, 2 * width, kernel=1),
            _convolution(2 * width, width, kernel=1),
        )
        self.head = nn.Linear(width, classes)
        self.head_norm = (
            nn.BatchNorm1d(classes, eps=_BATCH_NORM_EPS, momentum=_BATCH_NORM_MOMENTUM)
            if final_batch_norm
            else nn.Identity()
        )
        self._initialise()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return logits (B, K) of images (B, C, H, W) with values in [0, 1]."""
        pooled_BC = self.features(x_BCHW).mean(dim=(2, 3))
        logits_BK: Tensor = self.head_norm(self.head(pooled_BC))
        return logits_BK

    def extra_repr(self) -> str:
        """Return the image size and the grid of the final average pool for ``repr``."""
        return f"image_size={self.image_size}, final_grid={self.final_grid}"

    def _initialise(self) -> None:
        """Draw He-normal weights from the global generator; only the head ignores the slope of the leaky ReLU."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=_SLOPE, nonlinearity="leaky_relu")
        nn.init.kaiming_normal_(self.head.weight, nonlinearity="linear")
        nn.init.zeros_(self.head.bias)


def pooled_sides(image_size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Return the (height, width) of the grid in the first block, in the second, and before the valid convolution.

    Raises:
        RecipeError: The images are smaller than 3×3.

    Example:
        >>> pooled_sides((32, 32)), pooled_sides((8, 8))
        (((32, 32), (16, 16), (8, 8)), ((8, 8), (4, 4), (4, 4)))
    """
    if min(image_size) < _VALID_KERNEL:
        raise RecipeError(
            f"CNN-13 needs images of at least 3×3 pixels, got {image_size[0]}×{image_size[1]}. Use larger images."
        )
    second = _pooled(image_size)
    return image_size, second, _pooled(second)


def _pooled(side: tuple[int, int]) -> tuple[int, int]:
    halved = (side[0] // 2, side[1] // 2)
    return halved if min(halved) >= _VALID_KERNEL else side


def _convolution(channels_in: int, channels_out: int, *, kernel: int = 3, padding: int | None = None) -> nn.Sequential:
    """Return convolution, batch norm and leaky ReLU; ``padding`` None preserves the grid size."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2 if padding is None else padding, bias=False),
        _BatchNorm2d(channels_out, eps=_BATCH_NORM_EPS, momentum=_BATCH_NORM_MOMENTUM),
        nn.LeakyReLU(_SLOPE, inplace=True),
    )


def _reduction(*, pool: bool) -> nn.Sequential:
    return nn.Sequential(nn.MaxPool2d(2) if pool else nn.Identity(), nn.Dropout(0.5))


class _BatchNorm2d(nn.BatchNorm2d):
    """Batch norm with bias correction: evaluation removes the initial values (0 and 1) from the running statistics.

    With momentum 0.01 the initial values still have a weight of 37% after 100 batches, which distorts the evaluation of
    short runs. Adam corrects its moments in the same way. Training and the stored statistics are unchanged.
    """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.training:
            return super().forward(x_BCHW)
        mean_C, var_C, batches = self.running_mean, self.running_var, self.num_batches_tracked
        if mean_C is None or var_C is None or batches is None:  # for the type checker; this layer always tracks them
            return super().forward(x_BCHW)
        start = torch.pow(1.0 - _BATCH_NORM_MOMENTUM, batches.to(torch.float64))
        start = torch.where(batches > 0, start, 0.0)  # never trained: use the initial values
        # Not in the type of x: under autocast that is bfloat16, which would lose 16 of 24 bits.
        mean_C = (mean_C.double() / (1.0 - start)).to(mean_C.dtype)
        var_C = ((var_C.double() - start).clamp(min=0.0) / (1.0 - start)).to(var_C.dtype)
        return functional.batch_norm(x_BCHW, mean_C, var_C, self.weight, self.bias, training=False, eps=self.eps)
