"""The streamer: batches of a pool, shuffled, in an order that depends on (seed, epoch) alone.

Images are shuffled in windows of some blocks of 256 rows, so a batch is read from a few mapped chunks. There is no copy of
the pool in memory, only the labels of a pool of up to 262,144 rows (20 bytes each) and the batches that wait to be taken.
"""

from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import torch

from lsmix.data.errors import RecipeError
from lsmix.data.loaders.batch import Batch, SoftBatch, soft_target, to_batch
from lsmix.data.loaders.epoch_loader import BatchReader, EpochLoader
from lsmix.data.loaders.sampler import EpochOrder, plan_batches
from lsmix.data.pool import Pool, open_pool

__all__ = ["PoolLoader"]

_BLOCK_ROWS = 256  # divides the rows of a chunk, unless a recipe sets others
_Batch = TypeVar("_Batch", covariant=True)
_ROWS_KEPT = 1 << 18  # rows of a pool whose labels are kept in memory: 5 MB, of up to 32 chunks


class PoolLoader(EpochLoader[_Batch]):
    """Goes over a pool in batches, one epoch at a time.

    Each sample comes once per epoch. Ranks get disjoint, equally many batches; with more than one rank, the up to
    ``world_size`` − 1 samples that would be left over are dropped. Inside ``torch.utils.data.DataLoader`` pass
    ``batch_size=None``; its workers share the batches, and the order stays the same. Call ``set_epoch`` before each
    pass.

    Args:
        pool: an open pool, or the path or URL of one.
        batch_size: images in a batch of one rank.
        seed: names the order, together with the epoch.
        epoch: which pass comes first.
        rank: which of ``world_size`` equal parts of each step to take; None for that of torch.distributed, if it is
            initialised, or of torchrun.
        world_size: number of parts; None as for ``rank``.
        drop_last: leave out a last batch that is not full.
        shuffle: False keeps the pool's order.
        shuffle_blocks: blocks of 256 rows whose images are shuffled together. More shuffle better, but read from more
            chunks at a time, of which a process maps at most 64.
        read_ahead_bytes: size of the batches that a background thread may have ready; 0 for no thread.
        labels: "pair" gives ``Batch``; "soft" gives ``SoftBatch``, (images, target float32 (B, classes)). A pool that
            mixes more than two sources fits "soft" only.
        copies: "all" takes every copy in each epoch; "cycle" takes copy ``epoch % pool.copies``.

    Images are uint8 (B, C, H, W), channels-last in memory, and belong to the caller.
    """

    @overload
    def __init__(
        self: "PoolLoader[Batch]",
        pool: Pool | Path | str,
        batch_size: int,
        *,
        labels: Literal["pair"] = "pair",
        **options: Any,
    ) -> None: ...
    @overload
    def __init__(
        self: "PoolLoader[SoftBatch]",
        pool: Pool | Path | str,
        batch_size: int,
        *,
        labels: Literal["soft"],
        **options: Any,
    ) -> None: ...
    def __init__(  # type: ignore[misc]  # which names the options that the overloads leave open
        self,
        pool: Pool | Path | str,
        batch_size: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        drop_last: bool = False,
        shuffle: bool = True,
        shuffle_blocks: int = 8,
        read_ahead_bytes: int = 8 << 20,
        labels: Literal["pair", "soft"] = "pair",
        copies: Literal["all", "cycle"] = "all",
    ) -> None:
        self.pool = pool if isinstance(pool, Pool) else open_pool(pool)
        if (
            labels not in ("pair", "soft")
            or copies not in ("all", "cycle")
            or shuffle_blocks < 1
            or read_ahead_bytes < 0
        ):
            raise RecipeError(
                "a pool loader takes labels 'pair' or 'soft', copies 'all' or 'cycle', shuffle_blocks ≥ 1 and "
                f"read_ahead_bytes ≥ 0; got labels={labels!r}, copies={copies!r}, shuffle_blocks={shuffle_blocks}, "
                f"read_ahead_bytes={read_ahead_bytes}."
            )
        if self.pool.sources > 2 and labels != "soft":
            raise RecipeError(
                f"pool {self.pool.location!r} mixes {self.pool.sources} sources, which two labels cannot tell; got "
                f"labels={labels!r}. Use labels='soft'."
            )
        batch_bytes = max(batch_size, 1) * self.pool.image.row_bytes
        self.shuffle = shuffle
        self.shuffle_blocks = shuffle_blocks
        self.labels = labels
        self.copies = copies
        super().__init__(
            plan_batches(
                len(self.pool) if copies == "all" else self.pool.images_per_copy,
                batch_size,
                rank=rank,
                world_size=world_size,
                drop_last=drop_last,
            ),
            order={
                "pool": self.pool.manifest.content_digest,
                "copies": copies,
                "shuffle": shuffle,
                "shuffle_blocks": shuffle_blocks,
            },
            seed=seed,
            epoch=epoch,
            batches_ahead=max(read_ahead_bytes // batch_bytes, min(read_ahead_bytes, 1)),
        )

    def _open(self, epoch: int) -> BatchReader:
        self.pool = pool = self.pool.of_this_process()
        first = epoch % pool.copies * self.plan.total if self.copies == "cycle" else 0
        rows = range(first, first + self.plan.total)
        order = EpochOrder(
            rows,
            block_rows=_BLOCK_ROWS,
            window_blocks=self.shuffle_blocks,
            seed=self.seed,
            epoch=epoch,
            shuffle=self.shuffle,
        )
        names = ["label_a", "label_b", "share_b", *(("label_more", "share_more") if pool.sources > 2 else ())]
        # Read at once where that is small; else with the images, at the cost of half of the speed.
        kept = pool.rows(rows.start, rows.stop, names) if len(rows) <= _ROWS_KEPT else {}

        def read(start: int, stop: int) -> Batch | SoftBatch:
            index = order.slice(start, stop)
            found = {name: values[index - first] for name, values in kept.items()} or pool.gather(index, names)
            label_a, label_b, share_b, *more = found.values()
            batch = to_batch(pool.image.gather(index), label_a, label_b, share_b)
            if self.labels == "pair":
                return batch
            target = soft_target(*batch[1:], classes=len(pool.class_names))
            if more:  # the third source and those behind it take their shares off the first one's
                labels, shares = map(torch.from_numpy, more)
                target.scatter_add_(1, labels, shares)
                target.scatter_add_(1, batch.label_a[:, None], -shares.sum(dim=1, keepdim=True))
            return SoftBatch(batch.images, target)

        return read
