"""A loader for unmixed images in memory or in a memory map, with the same batch type as for pools.

Both labels are the label of the image, and the share of the second label is 0.
"""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsmix.data.errors import RecipeError
from lsmix.data.loaders.batch import Batch, to_batch
from lsmix.data.loaders.epoch_loader import BatchReader, EpochLoader
from lsmix.data.loaders.sampler import EpochOrder, plan_batches

__all__ = ["ArrayLoader"]


class ArrayLoader(EpochLoader[Batch]):
    """Iterates over images in batches, one epoch at a time, in a permutation that depends only on (seed, epoch).

    Args:
        images: uint8 (N, H, W, C), in memory or memory-mapped.
        labels: Integers (N,).
        batch_size: Images per batch and rank.
        seed: Determines the order, together with the epoch.
        epoch: The first epoch.
        parts: ``rank``, ``world_size`` and ``drop_last``, passed to ``plan_batches``.

    Example:
        >>> import numpy as np
        >>> from lsmix.data.loaders.array_loader import ArrayLoader
        >>> loader = ArrayLoader(np.zeros((10, 8, 8, 1), np.uint8), np.arange(10), batch_size=4)
        >>> [tuple(batch.images.shape) for batch in loader]
        [(4, 1, 8, 8), (4, 1, 8, 8), (2, 1, 8, 8)]
    """

    def __init__(
        self,
        images: NDArray[np.uint8],
        labels: NDArray[np.integer[Any]],
        batch_size: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        **parts: Any,
    ) -> None:
        if (
            images.ndim != 4
            or images.dtype != np.uint8
            or labels.shape != (len(images),)
            or labels.dtype.kind not in "iu"
        ):
            raise RecipeError(
                "an array loader needs uint8 images (N, H, W, C) and integer labels (N,); got "
                f"{images.dtype} {images.shape} and {labels.dtype} {labels.shape}."
            )
        self._images = np.asarray(images)  # indexing an np.memmap would return np.memmaps, which is slower
        self._labels = np.asarray(labels, np.int64)
        order = {"labels": hashlib.sha256(self._labels.tobytes()).hexdigest()}
        super().__init__(plan_batches(len(images), batch_size, **parts), order=order, seed=seed, epoch=epoch)

    def _open(self, epoch: int) -> BatchReader:
        rows = range(self.plan.total)
        order = EpochOrder(rows, block_rows=self.plan.total, window_blocks=1, seed=self.seed, epoch=epoch)

        def read(start: int, stop: int) -> Batch:
            index = order.slice(start, stop)
            label = self._labels[index]
            return to_batch(self._images[index], label, label.copy(), np.zeros(len(index), np.float32))

        return read
