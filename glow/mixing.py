"""Mixing latent vectors by name, and the tools around it: zero fill, and what counts as corrupted.

The one rule: λ and the share are the *second* vector's, whatever the method; the methods stand in latent_mixing.py.

Axes: B batch, C channels, H height, W width, D components; N vectors, any number.
"""

from typing import TypeVar

import numpy as np
import torch

from lsmix.data.errors import RecipeError
from lsmix.data.methods import Draws, Method, checked_rates, row_draws
from lsmix.glow.methods import LATENT_METHODS

__all__ = ["is_corrupted", "mix_latents", "mix_on_device", "zero_fill"]

_Array = TypeVar("_Array", np.ndarray, torch.Tensor)


def mix_latents(
    method: str,
    z1: _Array,
    z2: _Array,
    lam: float | np.ndarray | torch.Tensor,
    *,
    seed: int = 0,
    draws: Draws | None = None,
) -> tuple[_Array, _Array]:
    """Mix latent vectors pair by pair; return the mixed vectors (N, D) and the effective shares of z2, float32 (N,).

    z1 and z2 are both NumPy arrays or both torch tensors, floats (N, D) in latent order; the results are of the same
    kind. ``lam`` is a number or (N,) in [0, 1], taken as float64. Methods with chance draw row i from (seed, i), or from
    ``draws(i)`` where that is given.

    Raises:
        RecipeError: the method is unknown, shapes differ, or a λ lies outside [0, 1].

    Example:
        >>> import numpy as np
        >>> from lsmix.glow.mixing import mix_latents
        >>> z, share = mix_latents("ls-mix", np.zeros((1, 16)), np.ones((1, 16)), 5 / 16)
        >>> int(z.sum()), float(share[0])
        (5, 0.3125)
    """
    first, second = _tensor(z1), _tensor(z2)
    if first.ndim != 2 or first.shape != second.shape or first.dtype != second.dtype:
        raise RecipeError(
            f"cannot mix: expected two arrays (N, D) of one shape and type, got {first.dtype} {tuple(first.shape)} and "
            f"{second.dtype} {tuple(second.shape)}."
        )
    rates = checked_rates(lam.detach().cpu().numpy() if isinstance(lam, torch.Tensor) else lam, len(first))
    mixed, share = mix_on_device(method, first, second, rates, draws or row_draws(seed, "mix", "method"))
    if isinstance(z1, torch.Tensor):
        return mixed, share.to(mixed.device)
    return mixed.numpy(), share.numpy()


def mix_on_device(
    method: str, z1_ND: torch.Tensor, z2_ND: torch.Tensor, lam: np.ndarray, draws: Draws
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix pairs where they are, without waiting for the device; return the shares of z2, float32 (N,), on the CPU.

    λ, float64 (N,), and all draws are the CPU's, so that the shares are the same bits on any device.

    Raises:
        RecipeError: the method is unknown.
    """
    function: Method = LATENT_METHODS.load(method)
    mixed_ND, share_N = function(z1_ND, z2_ND, torch.from_numpy(lam), draws)
    return mixed_ND, share_N.to(torch.float32)


def _tensor(z: np.ndarray | torch.Tensor) -> torch.Tensor:
    if isinstance(z, torch.Tensor):
        return z
    # torch shares memory only with arrays that may be written; rows of a store may not be.
    return torch.from_numpy(z if z.flags.writeable else z.copy())


def zero_fill(z: _Array, n_last: int) -> _Array:
    """Return a copy of z (N, D) with the last ``n_last`` components at zero, as in Fig. 3.

    Raises:
        RecipeError: ``n_last`` lies outside 0..D.
    """
    D = z.shape[-1]
    if not 0 <= n_last <= D:
        raise RecipeError(f"cannot set the last {n_last} of {D} components to zero: expected 0 to {D}.")
    filled = z.clone() if isinstance(z, torch.Tensor) else z.copy()
    filled[..., D - n_last :] = 0.0
    return filled


def is_corrupted(y_BCHW: torch.Tensor, *, margin: float, share: float) -> torch.Tensor:
    """Say which decoded images exploded: bool (B,).

    One did if any value is not finite, or if more than ``share`` (0 to 1) of its pixels leave [−½, ½] by more than
    ``margin`` in any channel. y is what ``Flow.decode_batch`` gives, float (B, C, H, W), neither clipped nor rounded.
    """
    inside_BCHW = y_BCHW.abs() <= 0.5 + margin  # false for NaN, too
    outside_share_B = (~inside_BCHW).any(dim=1).double().mean(dim=(1, 2))
    return (outside_share_B > share) | ~torch.isfinite(y_BCHW).flatten(1).all(dim=1)
