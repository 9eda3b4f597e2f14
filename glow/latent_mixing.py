"""Mixing of latent vectors: the methods, mixing by method name, zero fill, and the check for failed decodes.

For every method, λ and the share refer to the *second* vector.

Axes: B batch, C channels, H height, W width, D components; N vectors, any number.
"""

from typing import TypeVar

import numpy as np
import torch

from lsmix.data.errors import RecipeError
from lsmix.data.loaders.batch import to_device
from lsmix.data.mixing import LATENT_METHODS, Method, RowRng, checked_rates, row_rngs

__all__ = [
    "bern_mix",
    "is_failed_decode",
    "linear",
    "ls_mix",
    "mix_latents",
    "mix_on_device",
    "reverse_mix",
    "swap_mix",
    "zero_fill",
]

_Array = TypeVar("_Array", np.ndarray, torch.Tensor)


def mix_latents(
    method: str,
    z1: _Array,
    z2: _Array,
    lam: float | np.ndarray | torch.Tensor,
    *,
    seed: int = 0,
    draws: RowRng | None = None,
) -> tuple[_Array, _Array]:
    """Mix latent vectors pair by pair; return the mixed vectors (N, D) and the effective shares of z2, float32 (N,).

    z1 and z2 are both NumPy arrays or both torch tensors, floats (N, D) in latent order; the results have the same
    type. ``lam`` is a number or an array (N,) in [0, 1], converted to float64. Random methods draw row i from (seed, i),
    or from ``draws(i)`` if ``draws`` is given.

    Raises:
        RecipeError: The method is unknown, shapes or types differ, or λ is outside [0, 1].

    Example:
        >>> import numpy as np
        >>> from lsmix.glow.latent_mixing import mix_latents
        >>> z, share = mix_latents("ls-mix", np.zeros((1, 16)), np.ones((1, 16)), 5 / 16)
        >>> int(z.sum()), float(share[0])
        (5, 0.3125)
    """
    first, second = _tensor(z1), _tensor(z2)
    if first.ndim != 2 or first.shape != second.shape or first.dtype != second.dtype:
        raise RecipeError(
            f"cannot mix: expected two arrays (N, D) of the same shape and type, got "
            f"{first.dtype} {tuple(first.shape)} and {second.dtype} {tuple(second.shape)}."
        )
    rates = checked_rates(lam.detach().cpu().numpy() if isinstance(lam, torch.Tensor) else lam, len(first))
    mixed, share = mix_on_device(method, first, second, rates, draws or row_rngs(seed, "mix", "method"))
    if isinstance(z1, torch.Tensor):
        return mixed, share.to(mixed.device)
    return mixed.numpy(), share.numpy()


def mix_on_device(
    method: str, z1_ND: torch.Tensor, z2_ND: torch.Tensor, lam: np.ndarray, draws: RowRng
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix pairs on their device without waiting for it; return the mixed vectors and, on the CPU, the shares of z2.

    The CPU computes the shares, float32 (N,), and all draws from λ, float64 (N,), so they do not depend on the device.

    Raises:
        RecipeError: The method is unknown.
    """
    function: Method = LATENT_METHODS.load(method)
    mixed_ND, share_N = function(z1_ND, z2_ND, torch.from_numpy(lam), draws)
    return mixed_ND, share_N.to(torch.float32)


def _tensor(z: np.ndarray | torch.Tensor) -> torch.Tensor:
    if isinstance(z, torch.Tensor):
        return z
    # torch shares memory with writable arrays only; rows from a Zarr store may be read-only.
    return torch.from_numpy(z if z.flags.writeable else z.copy())


def zero_fill(z: _Array, n_last: int) -> _Array:
    """Return a copy of z (N, D) with the last ``n_last`` components set to zero, as in Fig. 3.

    Raises:
        RecipeError: ``n_last`` is outside 0..D.
    """
    D = z.shape[-1]
    if not 0 <= n_last <= D:
        raise RecipeError(f"cannot set the last {n_last} of {D} components to zero: expected 0 to {D}.")
    filled = z.clone() if isinstance(z, torch.Tensor) else z.copy()
    filled[..., D - n_last :] = 0.0
    return filled


def is_failed_decode(y_BCHW: torch.Tensor, *, tolerance: float, bad_pixel_fraction: float) -> torch.Tensor:
    """Return which images failed to decode, bool (B,).

    A decode failed if any value is not finite, or if more than ``bad_pixel_fraction`` (0 to 1) of the pixels lie outside
    [−½, ½] by more than ``tolerance`` in any channel. y is the result of ``Flow.decode_batch``, float (B, C, H, W).
    """
    inside_BCHW = y_BCHW.abs() <= 0.5 + tolerance  # also false for NaN
    outside_share_B = (~inside_BCHW).any(dim=1).double().mean(dim=(1, 2))
    return (outside_share_B > bad_pixel_fraction) | ~torch.isfinite(y_BCHW).flatten(1).all(dim=1)


_Mixed = tuple[torch.Tensor, torch.Tensor]


def _count(z_ND: torch.Tensor, lam_N: torch.Tensor) -> torch.Tensor:
    return torch.floor(lam_N * z_ND.shape[1])


def _first(z_ND: torch.Tensor, count_N: torch.Tensor) -> torch.Tensor:
    """Return bool (N, D): whether a component is among the first ``count``."""
    return torch.arange(z_ND.shape[1], device=z_ND.device) < to_device(count_N, z_ND.device)[:, None]


def ls_mix(z1_ND: torch.Tensor, z2_ND: torch.Tensor, lam_N: torch.Tensor, _draws: RowRng) -> _Mixed:
    """Take the first n components from z₂ and the rest from z₁: Eq. 1 and its text (Fig. 2's caption swaps them)."""
    count_N = _count(z1_ND, lam_N)
    return torch.where(_first(z1_ND, count_N), z2_ND, z1_ND), count_N / z1_ND.shape[1]


def linear(z1_ND: torch.Tensor, z2_ND: torch.Tensor, lam_N: torch.Tensor, _draws: RowRng) -> _Mixed:
    """Return (1 − λ)·z₁ + λ·z₂; the share is λ [P §4]."""
    weight_N1 = to_device(lam_N.to(z1_ND.dtype), z1_ND.device)[:, None]
    return (1.0 - weight_N1) * z1_ND + weight_N1 * z2_ND, lam_N.clone()


def bern_mix(z1_ND: torch.Tensor, z2_ND: torch.Tensor, lam_N: torch.Tensor, draws: RowRng) -> _Mixed:
    """Take each component from z₂ with probability λ, else z₁; the share is the realised fraction [P §4, ref. 12]."""
    count, D = z1_ND.shape
    uniform = np.stack([draws(row).random(D, dtype=np.float32) for row in range(count)]) if count else np.empty((0, D))
    from_second_ND = torch.from_numpy(uniform) < lam_N[:, None]  # draws are in [0, 1): none at λ = 0, all at λ = 1
    return torch.where(to_device(from_second_ND, z1_ND.device), z2_ND, z1_ND), from_second_ND.double().mean(dim=1)


def swap_mix(z1_ND: torch.Tensor, z2_ND: torch.Tensor, lam_N: torch.Tensor, _draws: RowRng) -> _Mixed:
    """Return concat(z₁[n:], z₂[:n]): the components of LS-Mix in swapped order, so both images move [P D]."""
    D = z1_ND.shape[1]
    count_N = _count(z1_ND, lam_N)
    shift_N1 = to_device(count_N.to(torch.int64), z1_ND.device)[:, None]
    index_ND = (torch.arange(D, device=z1_ND.device) + shift_N1) % D  # rolled by n: n, …, D − 1, 0, …, n − 1
    from_first_ND = _first(z1_ND, D - count_N)
    return torch.where(from_first_ND, z1_ND.gather(1, index_ND), z2_ND.gather(1, index_ND)), count_N / D


def reverse_mix(z1_ND: torch.Tensor, z2_ND: torch.Tensor, lam_N: torch.Tensor, draws: RowRng) -> _Mixed:
    """Reverse z₁, then apply LS-Mix; λ = 0 therefore returns the reverse of z₁, not z₁ [P D]."""
    return ls_mix(z1_ND.flip(1), z2_ND, lam_N, draws)
