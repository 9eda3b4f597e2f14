"""Mixing latent vectors: the methods, mixing by name, zero fill, and the check for failed decodes.

With every method, λ and the share are those of the *second* vector.

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

    z1 and z2 are both NumPy arrays or both torch tensors, floats (N, D) in latent order; the results are of the same
    kind. ``lam`` is a number or (N,) in [0, 1], taken as float64. Methods with chance draw row i from (seed, i), or from
    ``draws(i)`` where that is given.

    Raises:
        RecipeError: the method is unknown, shapes differ, or a λ is outside [0, 1].

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
            f"cannot mix: expected two arrays (N, D) of one shape and type, got {first.dtype} {tuple(first.shape)} and "
            f"{second.dtype} {tuple(second.shape)}."
        )
    rates = checked_rates(lam.detach().cpu().numpy() if isinstance(lam, torch.Tensor) else lam, len(first))
    mixed, share = mix_on_device(method, first, second, rates, draws or row_rngs(seed, "mix", "method"))
    if isinstance(z1, torch.Tensor):
        return mixed, share.to(mixed.device)
    return mixed.numpy(), share.numpy()


def mix_on_device(
    method: str, z1_ND: torch.Tensor, z2_ND: torch.Tensor, lam: np.ndarray, draws: RowRng
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

    A decode failed if any value is not finite, or if more than ``bad_pixel_fraction`` (0 to 1) of its pixels leave [−½, ½] by more than
    ``tolerance`` in any channel. y is what ``Flow.decode_batch`` gives, float (B, C, H, W), neither clipped nor rounded.
    """
    inside_BCHW = y_BCHW.abs() <= 0.5 + tolerance  # false for NaN, too
    outside_share_B = (~inside_BCHW).any(dim=1).double().mean(dim=(1, 2))
    return (outside_share_B > bad_pixel_fraction) | ~torch.isfinite(y_BCHW).flatten(1).all(dim=1)


_Mixed = tuple[torch.Tensor, torch.Tensor]


def _taken(z_ND: torch.Tensor, lam_N: torch.Tensor) -> torch.Tensor:
    return torch.floor(lam_N * z_ND.shape[1])


def _first(z_ND: torch.Tensor, count_N: torch.Tensor) -> torch.Tensor:
    """Return bool (N, D): whether a component is among the first ``count``."""
    return torch.arange(z_ND.shape[1], device=z_ND.device) < to_device(count_N, z_ND.device)[:, None]


def ls_mix(z1_ND: torch.Tensor, z2_ND: torch.Tensor, lam_N: torch.Tensor, _draws: RowRng) -> _Mixed:
    """Eq. 1: the first n components from z₂, the rest from z₁ (the text; Fig. 2's caption has it reversed)."""
    taken_N = _taken(z1_ND, lam_N)
    return torch.where(_first(z1_ND, taken_N), z2_ND, z1_ND), taken_N / z1_ND.shape[1]


def linear(z1_ND: torch.Tensor, z2_ND: torch.Tensor, lam_N: torch.Tensor, _draws: RowRng) -> _Mixed:
    """(1 − λ)·z₁ + λ·z₂; the share is λ [P §4]."""
    weight_N1 = to_device(lam_N.to(z1_ND.dtype), z1_ND.device)[:, None]
    return (1.0 - weight_N1) * z1_ND + weight_N1 * z2_ND, lam_N.clone()


def bern_mix(z1_ND: torch.Tensor, z2_ND: torch.Tensor, lam_N: torch.Tensor, draws: RowRng) -> _Mixed:
    """Each component from z₂ with probability λ, from z₁ otherwise; the share is the fraction drawn [P §4, ref. 12]."""
    count, D = z1_ND.shape
    uniform = np.stack([draws(row).random(D, dtype=np.float32) for row in range(count)]) if count else np.empty((0, D))
    from_second_ND = torch.from_numpy(uniform) < lam_N[:, None]  # [0, 1) < λ: never at λ = 0, always at λ = 1
    return torch.where(to_device(from_second_ND, z1_ND.device), z2_ND, z1_ND), from_second_ND.double().mean(dim=1)


def swap_mix(z1_ND: torch.Tensor, z2_ND: torch.Tensor, lam_N: torch.Tensor, _draws: RowRng) -> _Mixed:
    """concat(z₁[n:], z₂[:n]): what LS-Mix takes, in the other order, so that both images change their places [P D]."""
    D = z1_ND.shape[1]
    taken_N = _taken(z1_ND, lam_N)
    shift_N1 = to_device(taken_N.to(torch.int64), z1_ND.device)[:, None]
    index_ND = (torch.arange(D, device=z1_ND.device) + shift_N1) % D  # rolled: n, …, D − 1, 0, …, n − 1
    from_first_ND = _first(z1_ND, D - taken_N)
    return torch.where(from_first_ND, z1_ND.gather(1, index_ND), z2_ND.gather(1, index_ND)), taken_N / D


def reverse_mix(z1_ND: torch.Tensor, z2_ND: torch.Tensor, lam_N: torch.Tensor, draws: RowRng) -> _Mixed:
    """LS-Mix after z₁ was turned end for end; so λ = 0 gives no z₁, but its reverse [P D]."""
    return ls_mix(z1_ND.flip(1), z2_ND, lam_N, draws)
