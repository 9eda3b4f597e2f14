"""The streamer: batches of a pool, shuffled, in an order that depends on (seed, epoch) alone.

A batch's images come straight from the mapped shards, from a few chunks at a time; there is no copy of the
pool in memory, only the labels of a pool of up to 262,144 rows (20 bytes each) and the batches that wait to be taken.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from lsmix.data.errors import CorruptError, RecipeError
from lsmix.data.loaders.batch import Batch, soft_target
from lsmix.data.loaders.epoch_loader import BatchReader, EpochLoader, to_batch
from lsmix.data.loaders.sampler import EpochOrder
from lsmix.data.pool import Pool

__all__ = ["PoolLoader"]

_ROWS_KEPT = 1 << 18  # rows of a pool whose labels are kept in memory: 5 MB, of up to 32 shards


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
        buffer_chunks: inner chunks whose images are mixed with one another. More shuffle better; as they are mapped,
            not copied, they cost no memory of the process.
        read_ahead_bytes: size of the batches that a background thread may have ready; 0 for no thread.
        labels: "pair" gives ``Batch``; "soft" gives (images, target float32 (B, classes)). A pool that
            mixes more than two sources fits "soft" only.
        copies: "all" takes every copy in each epoch; "cycle" takes copy ``epoch % pool.copies``.
        check_crc: False skips the checksums of chunks, which are otherwise compared when first touched.

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
        buffer_chunks: int = 8,
        read_ahead_bytes: int = 8 << 20,
        labels: Literal["pair", "soft"] = "pair",
        copies: Literal["all", "cycle"] = "all",
        check_crc: bool = True,
    ) -> None:
        if labels not in _LABELS or copies not in ("all", "cycle") or buffer_chunks < 1:
            raise RecipeError(
                "a pool loader takes labels 'pair' or 'soft', copies 'all' or 'cycle', and buffer_chunks ≥ 1; "
                f"got labels={labels!r}, copies={copies!r}, buffer_chunks={buffer_chunks}."
            )
        if pool.sources > 2 and labels != "soft":
            raise RecipeError(
                f"pool {pool.location!r} mixes {pool.sources} sources, which two labels cannot tell; got "
                f"labels={labels!r}. Use labels='soft'."
            )
        self.pool = pool if check_crc else pool.reopen(check_crc=False)
        self.shuffle = shuffle
        self.buffer_chunks = buffer_chunks
        self.labels = labels
        self.copies = copies
        super().__init__(
            batch_size,
            seed=seed,
            epoch=epoch,
            rank=rank,
            world_size=world_size,
            drop_last=drop_last,
            read_ahead_bytes=read_ahead_bytes,
        )

    def _total(self) -> int:
        return len(self.pool) if self.copies == "all" else self.pool.images_per_copy

    def _rows(self) -> range:
        first = 0 if self.copies == "all" else self.epoch % self.pool.copies * self.pool.images_per_copy
        return range(first, first + self._total())

    def _order(self) -> EpochOrder:
        return EpochOrder(
            self._rows(),
            chunk_rows=self.pool.image.chunk_rows,
            buffer_chunks=self.buffer_chunks,
            seed=self.seed,
            epoch=self.epoch,
            shuffle=self.shuffle,
        )

    def _order_facts(self) -> dict[str, Any]:
        return {
            "pool": self.pool.manifest.root,
            "copies": self.copies,
            "shuffle": self.shuffle,
            "buffer_chunks": self.buffer_chunks,
        }

    def _reader(self) -> BatchReader:
        # A worker opens the pool anew: locks that another thread held while the process was forked would stay shut.
        pool = self.pool.reopen() if get_worker_info() else self.pool
        rows, classes, form = self._rows(), len(pool.class_names), _LABELS[self.labels]
        names = ["label_a", "label_b", "share_b", *(("label_more", "share_more") if pool.sources > 2 else ())]
        columns = [pool.columns[name] for name in names]
        # Read at once where that is small; else with the images that they belong to, at the cost of a tenth of the speed.
        kept = [
            _checked(pool, column[rows.start : rows.stop], classes) for column in columns if len(rows) <= _ROWS_KEPT
        ]

        def read(index: NDArray[np.int64], parts: Sequence[slice]) -> Iterator[Any]:
            located, own = pool.image.locate(index), index - rows.start
            label_a, label_b, share_b, *more = (
                [part[own] for part in kept]
                if kept
                else [_checked(pool, column.gather(index), classes) for column in columns]
            )
            for part in parts:
                first = label_a[part].copy()  # so that no batch keeps the labels of many alive
                batch = to_batch(located.take(part.start, part.stop), first, label_b[part].copy(), share_b[part].copy())
                labelled = form(batch, classes)
                if more:
                    label_more, share_more = more
                    _add_more(labelled[1], first, label_more[part], share_more[part])
                yield labelled

        return read


def _checked(pool: Pool, values: NDArray[Any], classes: int) -> NDArray[Any]:
    """Return labels or shares, if they lie where they must.

    Raises:
        CorruptError: they do not.
    """
    most = 1 if values.dtype.kind == "f" else classes - 1
    if not ((values >= 0) & (values <= most)).all():
        raise CorruptError(
            f"pool {pool.location!r} is damaged: labels must lie in 0 to {classes - 1} and shares in 0 to 1. Make it again."
        )
    return values


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
