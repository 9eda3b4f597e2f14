"""Augmentation of a batch: translation by a few pixels into a zero border, and horizontal flips.

Which image moves where is drawn from the NumPy generator alone, so the result is the same on every device.

Axes: B images, C channels, H rows, W columns.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lsmix.data.loaders.batch import to_device

__all__ = ["augment"]


def augment(images: Tensor, *, translate: int, flip: bool, generator: np.random.Generator) -> Tensor:
    """Return each image moved by −translate..translate pixels on either axis, and flipped half of the time.

    ``images`` is (B, C, H, W) of any dtype and is left as it was; pixels from beyond its edges are 0. The result has
    the same shape, dtype and device, in channels-last memory.

    Example:
        >>> import numpy as np, torch
        >>> moved = augment(torch.ones(4, 3, 8, 8), translate=2, flip=True, generator=np.random.default_rng(0))
        >>> moved.shape, bool((moved <= 1).all())
        (torch.Size([4, 3, 8, 8]), True)
    """
    count, _, height, width = images.shape
    # All three are always drawn, so that turning flips on does not change how the images move.
    down = generator.integers(-translate, translate, size=count, endpoint=True)
    right = generator.integers(-translate, translate, size=count, endpoint=True)
    mirrored = generator.integers(0, 1, size=count, endpoint=True).astype(bool) & flip
    if translate == 0 and not flip:
        return images.contiguous(memory_format=torch.channels_last)
    columns = np.where(mirrored[:, None], np.arange(width)[::-1], np.arange(width)) - right[:, None] + translate
    rows = np.arange(height) - down[:, None] + translate

    images_BHWC = images.permute(0, 2, 3, 1)
    padded_BHWC = functional.pad(images_BHWC, (0, 0, translate, translate, translate, translate))
    rows_BH = to_device(torch.from_numpy(rows), images.device)
    columns_BW = to_device(torch.from_numpy(columns), images.device)
    index_B = torch.arange(count, device=images.device)
    return padded_BHWC[index_B[:, None, None], rows_BH[:, :, None], columns_BW[:, None, :]].permute(0, 3, 1, 2)
