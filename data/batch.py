"""What a loader hands to a training loop.

The one rule: every source of batches gives two labels and a share, plain images included, so that one loop trains on all.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

__all__ = ["Batch", "BatchSource"]


class Batch(NamedTuple):
    """Some images with their labels."""

    images: "torch.Tensor"  # uint8 (B, C, H, W), channels-last in memory
    label_a: "torch.Tensor"  # int64 (B,)
    label_b: "torch.Tensor"  # int64 (B,); equal to label_a where nothing was mixed
    share_b: "torch.Tensor"  # float32 (B,), weight of label_b, 0 to 1; label_a has the rest


class BatchSource(Protocol):
    """Anything that gives the batches of one epoch after the other."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next pass goes over."""

    def __iter__(self) -> Iterator[Any]:
        """Go over one epoch, in ``Batch``es unless the source was asked for another form of labels."""

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""

    def state_dict(self) -> dict[str, Any]:
        """Return where the source stands, as plain numbers and strings."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where ``state`` was taken, with the very next batch."""
