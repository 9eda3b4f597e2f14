"""Image regions that correspond to the first or last components of a latent, and hard cuts along them.

A region consists of complete cells of the coarsest grid, in latent order. The cell that contains the last component
taken from the second image is part of the region if more than half of its components were taken.
"""

import numpy as np
import numpy.typing as npt

from lsmix.glow.config import FlowConfig
from lsmix.glow.latent_order import cell_order
from lsmix.glow.pixels import padding

__all__ = ["hard_cut", "second_region", "trailing_region"]


def second_region(taken: int, config: FlowConfig) -> npt.NDArray[np.bool_]:
    """Return the image region of the first ``taken`` components of a latent: bool (height, width).

    ``taken`` is 0 to D. Cells refer to the padded image; the padding is cropped.

    Raises:
        ValueError: ``taken`` is outside 0 to D.

    Example:
        >>> config = FlowConfig(height=4, width=4, channels=1, levels=1, steps=1, hidden=4)
        >>> second_region(9, config).astype(int).tolist()
        [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    """
    top, bottom, left, right = padding(config.height, config.width, config.levels, config.pad)
    side = 1 << config.levels  # side of a cell, pixels
    rows, columns = (config.height + top + bottom) // side, (config.width + left + right) // side
    per_cell = side * side * config.channels
    if not 0 <= taken <= rows * columns * per_cell:
        raise ValueError(f"taken must be 0 to {rows * columns * per_cell}, got {taken}.")
    complete, rest = divmod(taken, per_cell)
    cells = np.zeros(rows * columns, bool)
    cells[cell_order(rows, columns)[: complete + (2 * rest > per_cell)]] = True
    pixels = cells.reshape(rows, columns).repeat(side, axis=0).repeat(side, axis=1)
    return pixels[top : top + config.height, left : left + config.width]


def trailing_region(taken: int, config: FlowConfig) -> npt.NDArray[np.bool_]:
    """Return the image region of the last ``taken`` components of a latent: bool (height, width)."""
    top, bottom, left, right = padding(config.height, config.width, config.levels, config.pad)
    dim = (config.height + top + bottom) * (config.width + left + right) * config.channels
    return ~second_region(dim - taken, config)


def hard_cut(
    x1: npt.NDArray[np.uint8], x2: npt.NDArray[np.uint8], region: npt.NDArray[np.bool_]
) -> npt.NDArray[np.uint8]:
    """Return x1 with the pixels of x2 in a region. Images are uint8 (N, H, W, C), regions bool (H, W) or (N, H, W)."""
    return np.where(region[..., None], x2, x1)
