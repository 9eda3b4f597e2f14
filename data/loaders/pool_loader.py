"""The streamer: batches of a pool, shuffled, in an order that depends on (seed, epoch) alone.

Images are shuffled in windows of some blocks of 256 rows, so a batch is read from a few mapped chunks. There is no copy of
the pool in memory, only the labels of a pool of up to 262,144 rows (20 bytes each) and the batches that wait to be taken.
"""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from lsmix.data.errors import RecipeError
from lsmix.data.loaders.batch import Batch, soft_target
from lsmix.data.loaders.epoch_loader import BatchReader, EpochLoader, to_batch
from lsmix.data.pool import Pool

__all__ = ["PoolLoader"]

_BLOCK_ROWS = 256  # divides the rows of a chunk, unless a recipe sets others
_ROWS_KEPT = 1 << 18  # rows of a pool whose labels are kept in memory: 5 MB, of up to 32 chunks


class PoolLoader(EpochLoader):
    """Goes over a pool in batches, one epoch at a time.

    Each sample comes once per epoch. Ranks get disjoint, equally many batches; with more than one rank, the up to
    ``world_size`` − 1 samples that would be left over are dropped. Inside ``torch.utils.data.DataLoader`` pass
    ``batch_size=None``; its workers share the batches, and the order stays the same. Call ``set_epoch`` before each
    pass; with ``persistent_workers=True`` it does not reach the workers.

    Args:
        pool: an open pool.
        batch_size: images in a batch of one rank.
        seed: names the order, together with the epoch.
        epoch: which pass comes first.
        rank: which of ``world_size`` equal parts of each step to take.
        world_size: number of parts.
        drop_last: leave out a last batch that is not full.
        shuffle: False keeps the pool's order.
        shuffle_blocks: blocks of 256 rows whose images are shuffled together. More shuffle better, but read from more
            chunks at a time, of which a process maps at most 64.
        read_ahead_bytes: size of the batches that a background thread may have ready; 0 for no thread.
        labels: "pair" gives ``Batch``; "soft" gives (images, target float32 (B, classes)). A pool that
            mixes more than two sources fits "soft" only.
        copies: "all" takes every copy in each epoch; "cycle" takes copy ``epoch % pool.copies``.
        check_crc: False skips the checksums of chunks, which are otherwise compared when first mapped.

    Images are uint8 (B, C, H, W), channels-last in memory, and belong to the caller.
    """

    def __init__(
        self,
        pool: Pool,
        batch_size: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        shuffle: bool = True,
        shuffle_blocks: int = 8,
        read_ahead_bytes: int = 8 << 20,
        labels: Literal["pair", "soft"] = "pair",
        copies: Literal["all", "cycle"] = "all",
        check_crc: bool = True,
    ) -> None:
        if labels not in _LABELS or copies not in ("all", "cycle") or shuffle_blocks < 1:
            raise RecipeError(
                "a pool loader takes labels 'pair' or 'soft', copies 'all' or 'cycle', and shuffle_blocks ≥ 1; "
                f"got labels={labels!r}, copies={copies!r}, shuffle_blocks={shuffle_blocks}."
            )
        if pool.sources > 2 and labels != "soft":
            raise RecipeError(
                f"pool {pool.location!r} mixes {pool.sources} sources, which two labels cannot tell; got "
                f"labels={labels!r}. Use labels='soft'."
            )
        self.pool = pool if check_crc else pool.reopen(check_crc=False)
        self.shuffle_blocks = shuffle_blocks
        self.labels = labels
        self.copies = copies
        super().__init__(
            batch_size,
            seed=seed,
            epoch=epoch,
            rank=rank,
            world_size=world_size,
            drop_last=drop_last,
            shuffle=shuffle,
            read_ahead_bytes=read_ahead_bytes,
            row_bytes=pool.image.row_bytes,
            block_rows=_BLOCK_ROWS,
            window_blocks=shuffle_blocks,
        )

    def _rows(self) -> range:
        if self.copies == "all":
            return range(len(self.pool))
        first = self.epoch % self.pool.copies * self.pool.images_per_copy
        return range(first, first + self.pool.images_per_copy)

    def _order_facts(self) -> dict[str, Any]:
        return {
            "pool": self.pool.manifest.content_digest,
            "copies": self.copies,
            "shuffle": self.shuffle,
            "shuffle_blocks": self.shuffle_blocks,
        }

    def _reader(self) -> BatchReader:
        # A worker opens the pool again: locks that another thread held while the process was forked would stay shut.
        pool = self.pool.reopen() if get_worker_info() else self.pool
        rows, classes, form = self._rows(), len(pool.class_names), _LABELS[self.labels]
        names = ["label_a", "label_b", "share_b", *(("label_more", "share_more") if pool.sources > 2 else ())]
        # Read at once where that is small; else with the images, at the cost of half of the speed.
        kept = pool.rows(rows.start, rows.stop, names) if len(rows) <= _ROWS_KEPT else {}

        def read(index: NDArray[np.int64]) -> Any:
            found = (
                {name: values[index - rows.start] for name, values in kept.items()}
                if kept
                else pool.gather(index, names)
            )
            label_a, label_b, share_b, *more = found.values()
            batch = form(to_batch(pool.image.gather(index), label_a, label_b, share_b), classes)
            if more:
                _add_more(batch[1], label_a, *more)
            return batch

        return read


def _pair(batch: Batch, _classes: int) -> Batch:
    return batch


def _soft(batch: Batch, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    return batch.images, soft_target(batch.label_a, batch.label_b, batch.share_b, classes)


def _add_more(
    target: torch.Tensor, label_a: NDArray[np.int64], label_more: NDArray[np.int64], share_more: NDArray[np.float32]
) -> None:
    """Give the third source and those behind it their shares of a soft target (B, classes), off the first one's."""
    shares = torch.from_numpy(share_more)
    target.scatter_add_(1, torch.from_numpy(label_more), shares)
    target.scatter_add_(1, torch.from_numpy(label_a)[:, None], -shares.sum(dim=1, keepdim=True))


_LABELS: dict[str, Callable[[Batch, int], Any]] = {"pair": _pair, "soft": _soft}
