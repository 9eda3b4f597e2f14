"""The mixing methods in latent space [P §3, D], each one pure function on pairs of latent vectors.

The one rule: λ weights the *second* vector in every method, and the share that comes back is what was really taken of
it, n/D, not the λ that was asked for.

Each takes z₁ and z₂, float (N, D) in latent order; λ, float64 (N,) in [0, 1] on the CPU; and the rows' generators. Each
returns the mixed vectors, like z₁, and the share of z₂, float64 (N,) on the CPU. n = ⌊λD⌋.

Axes: N pairs, D components.
"""

import numpy as np
import torch

from lsmix.data.methods import Draws
from lsmix.glow.transfers import on_device

__all__ = ["bern_mix", "linear", "ls_mix", "reverse_mix", "swap_mix"]

_Mixed = tuple[torch.Tensor, torch.Tensor]


def _taken(z_ND: torch.Tensor, lam_N: torch.Tensor) -> torch.Tensor:
    return torch.floor(lam_N * z_ND.shape[1])


def _first(z_ND: torch.Tensor, count_N: torch.Tensor) -> torch.Tensor:
    """Return bool (N, D): whether a component is among the first ``count``."""
    return torch.arange(z_ND.shape[1], device=z_ND.device) < on_device(count_N, z_ND.device)[:, None]


def ls_mix(z1_ND: torch.Tensor, z2_ND: torch.Tensor, lam_N: torch.Tensor, _draws: Draws) -> _Mixed:
    """Eq. 1: the first n components from z₂, the rest from z₁ (the text; Fig. 2's caption has it reversed)."""
    taken_N = _taken(z1_ND, lam_N)
    return torch.where(_first(z1_ND, taken_N), z2_ND, z1_ND), taken_N / z1_ND.shape[1]


def linear(z1_ND: torch.Tensor, z2_ND: torch.Tensor, lam_N: torch.Tensor, _draws: Draws) -> _Mixed:
    """(1 − λ)·z₁ + λ·z₂; the share is λ [P §4]."""
    weight_N1 = on_device(lam_N.to(z1_ND.dtype), z1_ND.device)[:, None]
    return (1.0 - weight_N1) * z1_ND + weight_N1 * z2_ND, lam_N.clone()


def bern_mix(z1_ND: torch.Tensor, z2_ND: torch.Tensor, lam_N: torch.Tensor, draws: Draws) -> _Mixed:
    """Each component from z₂ with probability λ, from z₁ otherwise; the share is the fraction drawn [P §4, ref. 12]."""
    count, D = z1_ND.shape
    uniform = np.stack([draws(row).random(D, dtype=np.float32) for row in range(count)]) if count else np.empty((0, D))
    from_second_ND = torch.from_numpy(uniform) < lam_N[:, None]  # [0, 1) < λ: never at λ = 0, always at λ = 1
    return torch.where(on_device(from_second_ND, z1_ND.device), z2_ND, z1_ND), from_second_ND.double().mean(dim=1)


def swap_mix(z1_ND: torch.Tensor, z2_ND: torch.Tensor, lam_N: torch.Tensor, _draws: Draws) -> _Mixed:
    """concat(z₁[n:], z₂[:n]): what LS-Mix takes, in the other order, so that both images change their places [P D]."""
    D = z1_ND.shape[1]
    taken_N = _taken(z1_ND, lam_N)
    shift_N1 = on_device(taken_N.to(torch.int64), z1_ND.device)[:, None]
    index_ND = (torch.arange(D, device=z1_ND.device) + shift_N1) % D  # rolled: n, …, D − 1, 0, …, n − 1
    from_first_ND = _first(z1_ND, D - taken_N)
    return torch.where(from_first_ND, z1_ND.gather(1, index_ND), z2_ND.gather(1, index_ND)), taken_N / D


def reverse_mix(z1_ND: torch.Tensor, z2_ND: torch.Tensor, lam_N: torch.Tensor, draws: Draws) -> _Mixed:
    """LS-Mix after z₁ was turned end for end; so λ = 0 gives no z₁, but its reverse [P D]."""
    return ls_mix(z1_ND.flip(1), z2_ND, lam_N, draws)
