"""ActNorm and 1×1 convolution of all steps of a level as one affine map of the channels each, in both directions.

The one rule: everything is done for the whole level at once and in float64; so it costs a dozen small operations and not
a dozen a step, and only the results are rounded to the activations' type.

Axes: K steps, C channels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from lsmix.glow.step import FlowStep

__all__ = ["Folded", "fold"]


class Folded(NamedTuple):
    """The affine maps of K steps: y = W·x + b, and its inverse."""

    weight_KCC: torch.Tensor
    bias_KC: torch.Tensor
    inverse_weight_KCC: torch.Tensor  # carries no gradient; has no steps where no inverse was asked for
    inverse_bias_KC: torch.Tensor  # carries no gradient
    log_det_per_pixel: torch.Tensor  # of all steps together, float64, no axes


def fold(steps: Sequence[FlowStep], *, inverse: bool = True) -> Folded:
    """Fold the steps of a level; gradients flow through to their parameters where they are enabled.

    Args:
        steps: of one level.
        inverse: whether the maps of the way back are wanted.
    """
    norms, convs = [step.actnorm for step in steps], [step.conv1x1 for step in steps]
    dtype = norms[0].shift.dtype
    shift_KC = torch.stack([norm.shift for norm in norms]).double()
    log_scale_KC = torch.stack([norm.log_scale for norm in norms]).double()
    log_diagonal_KC = torch.stack([conv.log_diagonal for conv in convs]).double()
    sign_KC = torch.stack([conv.sign for conv in convs]).double()
    eye_CC = torch.diag(torch.ones_like(sign_KC[0]))
    lower_KCC = torch.stack([conv.lower for conv in convs]).double().tril(-1) + eye_CC
    upper_KCC = torch.stack([conv.upper for conv in convs]).double().triu(1)
    upper_KCC = upper_KCC + torch.diag_embed(sign_KC * log_diagonal_KC.exp())
    # A product with P is exact, and its gradient, unlike that of an index, deterministic on every device.
    permuted_KCC = eye_CC[torch.stack([conv.permutation for conv in convs])]
    weight_KCC = permuted_KCC @ (lower_KCC @ upper_KCC) * log_scale_KC.exp()[:, None, :]
    bias_KC = (weight_KCC @ shift_KC[:, :, None])[:, :, 0]
    inverse_KCC = weight_KCC.detach()[:0]
    if inverse:
        inverse_KCC = (
            _inverse(lower_KCC.detach(), upper_KCC.detach(), permuted_KCC) / log_scale_KC.detach().exp()[:, :, None]
        )
    return Folded(
        weight_KCC.to(dtype),
        bias_KC.to(dtype),
        inverse_KCC.to(dtype),
        -shift_KC.detach().to(dtype),
        log_scale_KC.sum() + log_diagonal_KC.sum(),
    )


def _inverse(lower_KCC: torch.Tensor, upper_KCC: torch.Tensor, permuted_KCC: torch.Tensor) -> torch.Tensor:
    """Return the inverse of P·L·U: (L·U)⁻¹·Pᵀ."""
    half_way_KCC = torch.linalg.solve_triangular(lower_KCC, permuted_KCC.mT, upper=False, unitriangular=True)
    inverse_KCC: torch.Tensor = torch.linalg.solve_triangular(upper_KCC, half_way_KCC, upper=True)
    return inverse_KCC
