"""Mixing images by name in pixel space: the twin of mixing latent vectors in ``lsmix.glow.mixing``.

The one rule: λ and the share are the *second* image's, whatever the method; the methods stand in pixel_mixing.py.

Axes: B or N images, C channels, H rows, W columns.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lsmix.classifiers.methods import PIXEL_METHODS
from lsmix.data.errors import RecipeError
from lsmix.data.methods import Draws, Method, checked_rates, row_draws

__all__ = ["mix_images", "mix_pixels"]


def mix_images(
    method: str,
    x1: NDArray[np.uint8],
    x2: NDArray[np.uint8],
    lam: float | NDArray[np.float64],
    *,
    seed: int = 0,
    draws: Draws | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Mix images pair by pair; return uint8 (N, H, W, C) and the effective shares of x2, float32 (N,).

    x1 and x2 are uint8 (N, H, W, C). ``lam`` is a number or (N,) in [0, 1], taken as float64. Methods with chance draw
    row i from (seed, i), or from ``draws(i)`` where that is given.

    Raises:
        RecipeError: the method is unknown or breaks its contract, shapes or types differ, or a λ lies outside [0, 1].

    Example:
        >>> import numpy as np
        >>> from lsmix.classifiers.mixing import mix_images
        >>> black, white = np.zeros((1, 2, 2, 1), np.uint8), np.full((1, 2, 2, 1), 255, np.uint8)
        >>> mixed, share = mix_images("mixup", black, white, 0.25)
        >>> int(mixed[0, 0, 0, 0]), float(share[0])
        (64, 0.25)
    """
    if x1.ndim != 4 or x1.shape != x2.shape or x1.dtype != np.uint8 or x2.dtype != np.uint8:
        raise RecipeError(
            f"cannot mix: expected two arrays uint8 (N, H, W, C) of one shape, got {x1.dtype} {x1.shape} and "
            f"{x2.dtype} {x2.shape}."
        )
    lam_N = torch.from_numpy(checked_rates(lam, len(x1)))
    mixed, share = mix_pixels(method, _tensor(x1), _tensor(x2), lam_N, draws or row_draws(seed, "mix", "method"))
    return np.ascontiguousarray(mixed.permute(0, 2, 3, 1).numpy()), share.to(torch.float32).numpy()


def mix_pixels(method: str, x1_BCHW: Tensor, x2_BCHW: Tensor, lam_B: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """Mix tensors as a ``Method`` does, and check what comes back, since another package may have made it.

    Raises:
        RecipeError: the method is unknown, or gives other than uint8 like x1 and shares float64 (B,) in [0, 1] on the CPU.
    """
    function: Method = PIXEL_METHODS.load(method)
    mixed_BCHW, share_B = function(x1_BCHW, x2_BCHW, lam_B, draws)
    if (mixed_BCHW.shape, mixed_BCHW.dtype, mixed_BCHW.device) != (x1_BCHW.shape, torch.uint8, x1_BCHW.device):
        raise RecipeError(
            f"{PIXEL_METHODS.kind} {method!r} gave {mixed_BCHW.dtype} {tuple(mixed_BCHW.shape)} on {mixed_BCHW.device}; "
            f"expected torch.uint8 {tuple(x1_BCHW.shape)} on {x1_BCHW.device}."
        )
    fits = (share_B.shape, share_B.dtype, share_B.device.type) == (lam_B.shape, torch.float64, "cpu")
    if not fits or not bool(((share_B >= 0) & (share_B <= 1)).all()):
        raise RecipeError(
            f"{PIXEL_METHODS.kind} {method!r} gave shares {share_B.dtype} {tuple(share_B.shape)} on {share_B.device}; "
            f"expected torch.float64 {tuple(lam_B.shape)} on the CPU, all within 0 to 1."
        )
    return mixed_BCHW, share_B


def _tensor(images: NDArray[np.uint8]) -> Tensor:
    # torch shares memory only with arrays that may be written; rows of a store may not be.
    return torch.from_numpy(images if images.flags.writeable else images.copy()).permute(0, 3, 1, 2)
