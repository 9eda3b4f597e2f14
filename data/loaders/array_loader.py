"""Batches of plain images in memory or in a memory map, in the same form as a pool's.

Nothing is mixed here, so both labels are the image's own and the second one's share is 0.
"""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsmix.data.errors import RecipeError
from lsmix.data.loaders.batch import Batch
from lsmix.data.loaders.epoch_loader import BatchReader, EpochLoader, to_batch

__all__ = ["ArrayLoader"]


class ArrayLoader(EpochLoader):
    """Goes over images in batches, one epoch at a time, in a full permutation that depends on (seed, epoch) alone.

    Args:
        images: uint8 (N, H, W, C), in memory or mapped.
        labels: integers (N,).
        batch_size: images in a batch of one rank.
        seed: names the order, together with the epoch.
        epoch: which pass comes first.
        rank: which of ``world_size`` equal parts of each step to take.
        world_size: number of parts; the up to ``world_size`` − 1 images that would be left over are dropped.
        drop_last: leave out a last batch that is not full.
        shuffle: False keeps the images' order.
        read_ahead_bytes: size of the batches that a background thread may have ready; 0 for no thread.

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
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        shuffle: bool = True,
        read_ahead_bytes: int = 0,
    ) -> None:
        if (
            images.ndim != 4
            or images.dtype != np.uint8
            or labels.shape != (len(images),)
            or labels.dtype.kind not in "iu"
        ):
            raise RecipeError(
                "an array loader takes uint8 images (N, H, W, C) and integer labels (N,); got "
                f"{images.dtype} {images.shape} and {labels.dtype} {labels.shape}."
            )
        self._images = np.asarray(images)  # batches of a np.memmap would be np.memmaps, at some cost
        self._labels = np.asarray(labels, np.int64)
        self._digest = hashlib.sha256(self._labels.tobytes()).hexdigest()
        super().__init__(
            batch_size,
            seed=seed,
            epoch=epoch,
            rank=rank,
            world_size=world_size,
            drop_last=drop_last,
            shuffle=shuffle,
            read_ahead_bytes=read_ahead_bytes,
            row_bytes=max(images[:1].nbytes, 1),
            block_rows=max(len(images), 1),
            window_blocks=1,
        )

    def _rows(self) -> range:
        return range(len(self._images))

    def _order_facts(self) -> dict[str, Any]:
        return {"labels": self._digest, "shuffle": self.shuffle}

    def _reader(self) -> BatchReader:
        def read(rows: NDArray[np.int64]) -> Batch:
            label = self._labels[rows]
            return to_batch(self._images[rows], label, label.copy(), np.zeros(len(rows), np.float32))

        return read
