"""Mixing the images of a batch with one another, and their targets by the same shares.

The one rule: the partners are a permutation of the batch, so every image counts once as the first and once as the second.

Axes: B images, C channels, H rows, W columns, K classes.
"""

import numpy as np
import torch
from torch import Tensor

from lsmix.classifiers.config import PixelMix
from lsmix.classifiers.mixing import mix_pixels
from lsmix.data.batch import to_device
from lsmix.data.methods import row_draws
from lsmix.data.seeds import generator

__all__ = ["mix_batch"]


def mix_batch(
    mix: PixelMix, images_BCHW: Tensor, target_BK: Tensor, seed: int, *words: str | int
) -> tuple[Tensor, Tensor]:
    """Return mixed images uint8 (B, C, H, W) and targets float32 (B, K), both on the images' device.

    Partners, λ and what else a method draws come from generators named by ``seed`` and ``words``.

    Raises:
        RecipeError: the method cannot be loaded, or breaks its contract.
    """
    count = len(images_BCHW)
    draws = generator(seed, *words, "pairs")
    partner_B = to_device(torch.from_numpy(draws.permutation(count)), images_BCHW.device)
    rates = draws.beta(mix.alpha, mix.alpha, count if mix.rate == "per-sample" else 1)
    lam_B = torch.from_numpy(np.broadcast_to(rates, (count,)).copy())
    # Gathered by whole pixels, which keeps channels-last memory.
    partner_BCHW = images_BCHW.permute(0, 2, 3, 1)[partner_B].permute(0, 3, 1, 2)
    mixed_BCHW, share_B = mix_pixels(mix.method, images_BCHW, partner_BCHW, lam_B, row_draws(seed, *words, "row"))
    share_B1 = to_device(share_B.to(target_BK.dtype), target_BK.device)[:, None]
    return mixed_BCHW, (1.0 - share_B1) * target_BK + share_B1 * target_BK[partner_B]
