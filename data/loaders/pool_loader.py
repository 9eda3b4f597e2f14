"""The loader that streams shuffled batches of a pool, in an order that depends only on (seed, epoch).

Images are shuffled within windows of several blocks of 256 rows, so a batch is read from a few memory-mapped chunks.
Only the labels of pools of up to 262,144 rows (20 bytes per row) and the batches read ahead are kept in memory.
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

_BLOCK_ROWS = 256  # divides the default number of rows per chunk
_Batch = TypeVar("_Batch", covariant=True)
_ROWS_KEPT = 1 << 18  # largest pool whose labels are kept in memory: 5 MB, from up to 32 chunks


class PoolLoader(EpochLoader[_Batch]):
    """Iterates over a pool in batches, one epoch at a time.

    Each sample is yielded once per epoch. All ranks get the same number of batches, with disjoint samples; with more
    than one rank, up to ``world_size`` − 1 remaining samples are dropped. To use a loader in a
    ``torch.utils.data.DataLoader``, pass ``batch_size=None``; its workers share the batches, and the order stays the
    same. Call ``set_epoch`` before each epoch.

    Images are uint8 (B, C, H, W), channels-last in memory, and may be modified by the caller.

    Args:
        pool: An open pool, or its path or URL.
        batch_size: Images per batch and rank.
        seed: Determines the order, together with the epoch.
        epoch: The first epoch.
        rank: Index of this process, 0 to ``world_size`` − 1; None for the rank in torch.distributed, if it is
            initialised, or in torchrun.
        world_size: Number of ranks that share an epoch; None as for ``rank``.
        drop_last: Omit the last batch if it is not full.
        shuffle: False keeps the pool's order.
        shuffle_blocks: Number of blocks of 256 rows that are shuffled together. More blocks shuffle better but read
            from more chunks at a time; a process maps at most 64 chunks.
        read_ahead_bytes: Total size of the batches that a background thread prepares; 0 for no thread.
        labels: "pair" yields ``Batch``; "soft" yields ``SoftBatch``, i.e. (images, target float32 (B, classes)). Pools
            that mix more than two sources need "soft".
        copies: "all" yields every copy in each epoch; "cycle" yields copy ``epoch % pool.copies``.
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
    def __init__(  # type: ignore[misc]  # names the options that the overloads summarise as **options
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
                "a pool loader needs labels 'pair' or 'soft', copies 'all' or 'cycle', shuffle_blocks ≥ 1 and "
                f"read_ahead_bytes ≥ 0; got labels={labels!r}, copies={copies!r}, shuffle_blocks={shuffle_blocks}, "
                f"read_ahead_bytes={read_ahead_bytes}."
            )
        if self.pool.sources > 2 and labels != "soft":
            raise RecipeError(
                f"pool {self.pool.location!r} mixes {self.pool.sources} sources, which labels={labels!r} cannot "
                "represent. Use labels='soft'."
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
        # Labels of small pools are read in advance. Reading them with each batch would halve the speed.
        kept = pool.rows(rows.start, rows.stop, names) if len(rows) <= _ROWS_KEPT else {}

        def read(start: int, stop: int) -> Batch | SoftBatch:
            index = order.slice(start, stop)
            found = {name: values[index - first] for name, values in kept.items()} or pool.gather(index, names)
            label_a, label_b, share_b, *more = found.values()
            batch = to_batch(pool.image.gather(index), label_a, label_b, share_b)
            if self.labels == "pair":
                return batch
            target = soft_target(*batch[1:], classes=len(pool.class_names))
            if more:  # subtract the shares of the third and all further sources from the first source's share
                labels, shares = map(torch.from_numpy, more)
                target.scatter_add_(1, labels, shares)
                target.scatter_add_(1, batch.label_a[:, None], -shares.sum(dim=1, keepdim=True))
            return SoftBatch(batch.images, target)

        return read
