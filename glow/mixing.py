"""Mixing latent vectors [P §3], one pure function per method, and the tools around it.

The one rule: λ weights the *second* vector in every method, and the share that comes back is what was really taken of
it, n/D, not the λ that was asked for.

Axes: B batch, C channels, H height, W width, D components; N vectors, any number.
"""

import difflib
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

from lsmix.data.errors import RecipeError

__all__ = ["METHODS", "Method", "is_corrupted", "mix_latents", "zero_fill"]

# (z1 (N, D), z2 (N, D), lam float64 (N,) on the CPU, seed) -> mixed (N, D), share float64 (N,) on the CPU.
Method = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
_Array = TypeVar("_Array", np.ndarray, torch.Tensor)


def _ls_mix(
    z1_ND: torch.Tensor, z2_ND: torch.Tensor, lam_N: torch.Tensor, _seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 1: the first n = ⌊λD⌋ components from z₂, the rest from z₁ (the text; Fig. 2's caption has it reversed)."""
    D = z1_ND.shape[1]
    taken_N = torch.floor(lam_N * D)
    from_second_ND = torch.arange(D, device=z1_ND.device) < taken_N.to(z1_ND.device)[:, None]
    return torch.where(from_second_ND, z2_ND, z1_ND), taken_N / D


METHODS: dict[str, Method] = {"ls-mix": _ls_mix}


def mix_latents(
    method: str, z1: _Array, z2: _Array, lam: float | np.ndarray | torch.Tensor, *, seed: int = 0
) -> tuple[_Array, _Array]:
    """Mix latent vectors pair by pair; return the mixed vectors (N, D) and the effective shares of z2, float32 (N,).

    z1 and z2 are both NumPy arrays or both torch tensors, floats (N, D) in latent order; the results are of the same
    kind. ``lam`` is a number or (N,) in [0, 1], taken as float64. Methods without chance ignore ``seed``.

    Raises:
        RecipeError: the method is unknown, shapes differ, or a λ lies outside [0, 1].

    Example:
        >>> import numpy as np
        >>> from lsmix.glow.mixing import mix_latents
        >>> z, share = mix_latents("ls-mix", np.zeros((1, 16)), np.ones((1, 16)), 5 / 16)
        >>> int(z.sum()), float(share[0])
        (5, 0.3125)
    """
    if method not in METHODS:
        near = difflib.get_close_matches(method, METHODS, n=1, cutoff=0.0)
        raise RecipeError(f"unknown mixing method {method!r}: did you mean {near[0]!r}? Known: {', '.join(METHODS)}.")
    first, second = _tensor(z1), _tensor(z2)
    if first.ndim != 2 or first.shape != second.shape or first.dtype != second.dtype:
        raise RecipeError(
            f"cannot mix: expected two arrays (N, D) of one shape and type, got {first.dtype} {tuple(first.shape)} and "
            f"{second.dtype} {tuple(second.shape)}."
        )
    mixed, share = METHODS[method](first, second, _checked_lam(lam, len(first)), seed)
    share = share.to(torch.float32)
    if isinstance(z1, torch.Tensor):
        return mixed, share.to(mixed.device)
    return mixed.numpy(), share.numpy()


def _tensor(z: np.ndarray | torch.Tensor) -> torch.Tensor:
    if isinstance(z, torch.Tensor):
        return z
    # torch shares memory only with arrays that may be written; rows of a store may not be.
    return torch.from_numpy(z if z.flags.writeable else z.copy())


def _checked_lam(lam: float | np.ndarray | torch.Tensor, count: int) -> torch.Tensor:
    values = lam.detach().cpu().numpy() if isinstance(lam, torch.Tensor) else lam
    lam_N = np.array(values, np.float64)
    if lam_N.shape not in ((), (count,)):
        raise RecipeError(f"λ has shape {lam_N.shape}: expected a number or one per pair, ({count},).")
    bad = lam_N[~((lam_N >= 0.0) & (lam_N <= 1.0))]
    if bad.size:
        raise RecipeError(f"λ must lie within [0, 1], got {float(bad.flat[0])!r}.")
    return torch.from_numpy(np.broadcast_to(lam_N, (count,)).copy())


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
