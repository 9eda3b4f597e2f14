"""Normalisation of images to zero mean and unit variance per channel, with the statistics of a training set.

The statistics are buffers of the network and are saved with its weights.

Axes: B images, C channels, H rows, W columns, K classes.
"""

from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lsmix.data.errors import RecipeError

__all__ = ["ChannelStatistics", "Normalised", "channel_statistics"]

ChannelStatistics = tuple[NDArray[np.float64], NDArray[np.float64]]  # mean and standard deviation, (C,) each, in [0, 1]
_CHUNK_BYTES = 1 << 22  # of images summed at a time; the sums need eight times as much memory


def channel_statistics(images: NDArray[np.uint8]) -> ChannelStatistics:
    """Return mean and standard deviation, float64 (C,) each, of the channels of images scaled to [0, 1].

    ``images`` is uint8 (N, H, W, C), in memory or memory-mapped. Sums are computed in integers and rounded once, so the
    order of images does not matter. A constant channel has standard deviation 1, since images are divided by it.

    Raises:
        RecipeError: There are no images.

    Example:
        >>> import numpy as np
        >>> channel_statistics(np.array([0, 255], np.uint8).reshape(2, 1, 1, 1))
        (array([0.5]), array([0.5]))
    """
    if not images.size:
        raise RecipeError(f"mean and standard deviation need at least one image, got shape {images.shape}.")
    channels = images.shape[3]
    sums = np.zeros((2, channels), np.int64)
    rows = max(1, _CHUNK_BYTES // images[0].size)
    for start in range(0, len(images), rows):
        values = images[start : start + rows].reshape(-1, channels).astype(np.int64)
        sums += values.sum(axis=0), (values**2).sum(axis=0)
    total = images.size // channels
    mean = np.array([float(Fraction(first, 255 * total)) for first in sums[0].tolist()])
    variance = [
        float(Fraction(total * second - first**2, (255 * total) ** 2))
        for first, second in zip(*sums.tolist(), strict=True)
    ]
    return mean, np.array([value**0.5 or 1.0 for value in variance])


class Normalised(nn.Module):
    """A network that receives (x − mean) / std; initially mean is 0 and std is 1.

    Example:
        >>> import numpy as np, torch
        >>> model = Normalised(torch.nn.Flatten(), channels=1)
        >>> model.set_statistics((np.array([0.5]), np.array([0.25])))
        >>> model(torch.ones(1, 1, 1, 1))
        tensor([[2.]])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, channels: int) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def set_statistics(self, statistics: ChannelStatistics) -> None:
        """Set mean and std to a result of ``channel_statistics``."""
        for buffer, values in zip((self.mean, self.std), statistics, strict=True):
            buffer.copy_(torch.from_numpy(values))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the network's logits (B, K) of images (B, C, H, W) with values in [0, 1]."""
        logits_BK: Tensor = self.network((x_BCHW - self.mean[:, None, None]) / self.std[:, None, None])
        return logits_BK
