"""The batch types that loaders yield.

Every loader yields two labels and a share, even for unmixed images, so that one training loop works with all of them.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Batch", "SoftBatch", "soft_target", "to_batch", "to_device"]


class Batch(NamedTuple):
    """Images with two labels each."""

    images: torch.Tensor  # uint8 (B, C, H, W), channels-last in memory
    label_a: torch.Tensor  # int64 (B,)
    label_b: torch.Tensor  # int64 (B,); equal to label_a for unmixed images
    share_b: torch.Tensor  # float32 (B,), weight of label_b, 0 to 1; label_a has weight 1 − share_b


class SoftBatch(NamedTuple):
    """Images with a weight for every class."""

    images: torch.Tensor  # uint8 (B, C, H, W), channels-last in memory
    target: torch.Tensor  # float32 (B, classes); each row sums to 1


def soft_target(label_a: torch.Tensor, label_b: torch.Tensor, share_b: torch.Tensor, classes: int) -> torch.Tensor:
    """Return soft targets float32 (B, classes) with weight 1 − share_b for label_a and share_b for label_b.

    Example:
        >>> import torch
        >>> soft_target(torch.tensor([0, 2]), torch.tensor([1, 2]), torch.tensor([0.25, 0.5]), classes=3)
        tensor([[0.7500, 0.2500, 0.0000],
                [0.0000, 0.0000, 1.0000]])
    """
    target = share_b.new_zeros(len(share_b), classes)
    target.scatter_(1, label_a[:, None], 1 - share_b[:, None])
    return target.scatter_add_(1, label_b[:, None], share_b[:, None])


def to_batch(
    images: NDArray[np.uint8], label_a: NDArray[np.int64], label_b: NDArray[np.int64], share_b: NDArray[np.float32]
) -> Batch:
    """Wrap arrays as tensors without a copy; images (B, H, W, C) become (B, C, H, W), channels-last in memory."""
    parts = (torch.from_numpy(values) for values in (label_a, label_b, share_b))
    return Batch(torch.from_numpy(images).permute(0, 3, 1, 2), *parts)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the tensor on ``device``; copies from the CPU to CUDA are asynchronous."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # copies from pageable memory block the CPU
    return tensor.to(device, non_blocking=True)
