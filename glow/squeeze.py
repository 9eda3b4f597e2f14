"""Squeezing: folding 2×2 blocks of pixels into channels, and back [P §2].

The one rule: the channel order is TensorFlow's, (2i+j)·C + c, and not torch's ``pixel_unshuffle`` (4c + 2i + j), with
which the locality that LS-Mix lives on is gone.

Axes: B batch, C channels, H height, W width.
"""

import torch

__all__ = ["depth_to_space", "space_to_depth"]


def space_to_depth(x_BCHW: torch.Tensor) -> torch.Tensor:
    """Fold each 2×2 block of pixels into channels: (B, C, H, W) -> (B, 4C, H/2, W/2).

    H and W must be even. out[:, (2i+j)·C + c, h, w] = x[:, c, 2h+i, 2w+j]; the result is channels-last in memory.

    Example:
        >>> import torch
        >>> from lsmix.glow.squeeze import space_to_depth
        >>> space_to_depth(torch.arange(8).reshape(1, 1, 2, 4)).flatten(2).tolist()
        [[[0, 2], [1, 3], [4, 6], [5, 7]]]
    """
    B, C, H, W = x_BCHW.shape
    # Folding along the last axis of the NHWC view keeps the result channels-last, which all convolutions here want.
    blocks = x_BCHW.permute(0, 2, 3, 1).reshape(B, H // 2, 2, W // 2, 2, C)
    return blocks.permute(0, 1, 3, 2, 4, 5).reshape(B, H // 2, W // 2, 4 * C).permute(0, 3, 1, 2)


def depth_to_space(x_BCHW: torch.Tensor) -> torch.Tensor:
    """Unfold channels into 2×2 blocks of pixels: (B, 4C, H, W) -> (B, C, 2H, 2W); undo ``space_to_depth``."""
    B, C, H, W = x_BCHW.shape
    blocks = x_BCHW.permute(0, 2, 3, 1).reshape(B, H, W, 2, 2, C // 4)
    return blocks.permute(0, 1, 3, 2, 4, 5).reshape(B, 2 * H, 2 * W, C // 4).permute(0, 3, 1, 2)
