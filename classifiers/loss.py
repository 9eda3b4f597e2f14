"""The loss of an image that carries two labels.

The one rule: a label's weight is its share of the image, so a plain image is the case share_b = 0.

Axes: B images, K classes.
"""

from torch import Tensor
from torch.nn import functional

__all__ = ["pair_loss"]


def pair_loss(logits: Tensor, label_a: Tensor, label_b: Tensor, share_b: Tensor) -> Tensor:
    """Return the batch's mean of (1 − share_b)·CE(label_a) + share_b·CE(label_b), a scalar in nats.

    ``logits`` is (B, K) float; the labels are int64 (B,) in 0..K−1; ``share_b`` is float (B,) in [0, 1]. It is the
    cross-entropy against the soft target that puts 1 − share_b on label_a and share_b on label_b.

    Example:
        >>> import torch
        >>> a, b = torch.tensor([0]), torch.tensor([1])
        >>> round(float(pair_loss(torch.zeros(1, 2), a, b, torch.tensor([0.25]))), 4)  # log 2, whatever the share
        0.6931
    """
    log_probability_BK = functional.log_softmax(logits.float(), dim=1)  # float32 also under autocast
    loss_a_B = -log_probability_BK.gather(1, label_a[:, None]).squeeze(1)
    loss_b_B = -log_probability_BK.gather(1, label_b[:, None]).squeeze(1)
    return ((1.0 - share_b) * loss_a_B + share_b * loss_b_B).mean()
