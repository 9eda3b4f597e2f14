"""Conversion between pixels and the flow's values: dequantisation, quantisation, padding [P B.3].

y = 0 is mid-grey, and [−½, ½) covers the 256 pixel values for every bit depth of the flow. The low bits of an image can
therefore replace the noise, and decoding returns the same bytes.

Axes: B batch, C channels, H height, W width; images are uint8 (B, H, W, C), as in Zarr stores.
"""

import re

import numpy as np
import torch

from lsmix.data.errors import RecipeError
from lsmix.glow.config import Dequantise, Pad

__all__ = [
    "Padding",
    "dequantise",
    "draw_noise",
    "output_bits",
    "pad_images",
    "padding",
    "quantise",
    "reflected_index",
]

Padding = tuple[int, int, int, int]  # pixels added at the top, bottom, left, right
# 8 bits of pixel, 14 bits of noise and its half step fit float32's 24 bits: no rounding into the next cell.
_NOISE_BITS = 14


def draw_noise(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draw uniform noise for ``dequantise(..., "uniform")``: int16 in [0, 2¹⁴)."""
    return generator.integers(0, 1 << _NOISE_BITS, size=shape, dtype=np.int16)


def dequantise(
    images_BHWC: torch.Tensor, mode: Dequantise = "low-bits", *, bits: int = 5, noise_BHWC: torch.Tensor | None = None
) -> torch.Tensor:
    """Map uint8 images (B, H, W, C) to y, float32 (B, C, H, W) in (−½, ½), channels-last in memory.

    "low-bits" sets y to the middle of the pixel's 8-bit cell; its low 8 − ``bits`` bits replace the noise. "uniform"
    adds ``noise_BHWC`` (from ``draw_noise``) to the pixel's cell of ``bits`` bits; "center" uses the cell's middle.

    Example:
        >>> import torch
        >>> from lsmix.glow.pixels import dequantise, quantise
        >>> images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)
        >>> bool((quantise(dequantise(images), 8) == images).all())
        True
    """
    if mode == "low-bits":
        y_BHWC = (images_BHWC.float() + 0.5) / 256.0
    elif mode == "center":
        y_BHWC = ((images_BHWC >> (8 - bits)).float() + 0.5) / 2.0**bits
    elif mode == "uniform":
        if noise_BHWC is None:
            raise RecipeError("dequantise mode 'uniform' needs noise_BHWC: draw it with draw_noise.")
        noise = (noise_BHWC.float() + 0.5) / 2.0**_NOISE_BITS
        y_BHWC = ((images_BHWC >> (8 - bits)).float() + noise) / 2.0**bits
    else:
        raise RecipeError(f"unknown dequantise mode {mode!r}: expected 'low-bits', 'uniform' or 'center'.")
    return (y_BHWC - 0.5).permute(0, 3, 1, 2)


def quantise(y_BCHW: torch.Tensor, bits: int = 8) -> torch.Tensor:
    """Map y, float (B, C, H, W), to uint8 images (B, H, W, C): floor to ``bits`` bits and clip.

    If ``bits`` is below 8, the low bits are zero as in the paper: the maximum for 5 bits is 248. NaN becomes 0.
    """
    cells = torch.floor((y_BCHW + 0.5) * 2.0**bits).nan_to_num_(0.0).clamp_(0.0, 2.0**bits - 1)
    return (cells * 2.0 ** (8 - bits)).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def output_bits(output: str) -> int:
    """Return the number of bits in an option such as "8bit" or "5bit".

    Raises:
        RecipeError: ``output`` is not one of "1bit" to "8bit".
    """
    if not re.fullmatch("[1-8]bit", output):
        raise RecipeError(
            f"unknown output {output!r}: expected '8bit' (exact), '5bit' (as in the paper) or another '1bit'..'8bit'."
        )
    return int(output[0])


def padding(height: int, width: int, levels: int, pad: Pad = "reflect") -> Padding:
    """Return the padding (top, bottom, left, right) that extends both sides to multiples of 2**levels.

    Raises:
        RecipeError: ``pad`` is "refuse" and a side is not a multiple of 2**levels.

    Example:
        >>> from lsmix.glow.pixels import padding
        >>> padding(28, 32, 3)
        (2, 2, 0, 0)
    """
    step = 1 << levels
    rows, columns = -height % step, -width % step
    if pad == "refuse" and (rows or columns):
        raise RecipeError(
            f"images of {height}×{width} cannot be halved {levels} times: both sides must be multiples of {step}. "
            'Use fewer levels, or pad = "reflect".'
        )
    return rows // 2, rows - rows // 2, columns // 2, columns - columns // 2


def reflected_index(size: int, before: int, after: int) -> np.ndarray:
    """Return the int64 index that pads an axis by (repeated) reflection without repeating the edge.

    Example:
        >>> from lsmix.glow.pixels import reflected_index
        >>> reflected_index(3, 1, 3).tolist()
        [1, 0, 1, 2, 1, 0, 1]
    """
    return np.pad(np.arange(size), (before, after), mode="reflect" if size > 1 else "edge")


def pad_images(images_BHWC: np.ndarray, pads: Padding) -> np.ndarray:
    """Pad images (B, H, W, C) by reflection; return the same array if all pads are 0."""
    if not any(pads):
        return images_BHWC
    top, bottom, left, right = pads
    rows = reflected_index(images_BHWC.shape[1], top, bottom)
    columns = reflected_index(images_BHWC.shape[2], left, right)
    return images_BHWC[:, rows[:, None], columns]
