"""The order of rows in an epoch, and its split into batches and ranks.

Both are pure functions of (seed, epoch) and sizes, independent of workers and timing. Any epoch can therefore be
repeated, resumed in the middle, or split among another number of ranks.
"""

import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import distributed

from lsmix.data.errors import RecipeError
from lsmix.data.rng import generator

__all__ = ["BatchPlan", "EpochOrder", "plan_batches"]


class EpochOrder:
    """A shuffled order of a range of rows, in which consecutive rows come from few blocks.

    Blocks are shuffled and grouped into windows of ``window_blocks``; the rows of each window are shuffled together.
    Only one window is kept in memory, and any part of the order can be computed without the rest.

    Args:
        rows: The rows to order; the first and the last block are clipped to this range.
        block_rows: Rows per block, counted from row 0. A block as long as the range gives a full permutation.
        window_blocks: Blocks per window, at least 1.
        seed: Determines the order, together with ``epoch``.
        epoch: The epoch.
        shuffle: False keeps the rows in ascending order.

    Example:
        >>> from lsmix.data.loaders.sampler import EpochOrder
        >>> order = EpochOrder(range(100), block_rows=10, window_blocks=3, seed=0, epoch=0)
        >>> sorted(order.slice(0, 100).tolist()) == list(range(100))
        True
    """

    def __init__(
        self, rows: range, *, block_rows: int, window_blocks: int, seed: int, epoch: int, shuffle: bool = True
    ) -> None:
        self._rows = rows
        self._window_blocks = window_blocks
        self._key = (seed, epoch)
        self._shuffle = shuffle
        blocks = np.arange(rows.start // block_rows, -(-rows.stop // block_rows))
        if shuffle:
            generator(seed, "order", epoch).shuffle(blocks)
        self._first = np.maximum(blocks * block_rows, rows.start)
        self._last = np.minimum((blocks + 1) * block_rows, rows.stop)
        ends = np.cumsum(self._last - self._first)
        self._edges = np.concatenate([[0], ends[window_blocks - 1 : -1 : window_blocks], ends[-1:]])
        self._window: tuple[int, NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def slice(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the rows at positions ``start`` to ``stop`` − 1 of the order, int64 (stop − start,)."""
        if not self._shuffle:
            return np.arange(self._rows.start + start, self._rows.start + stop)
        pieces = []
        window = int(np.searchsorted(self._edges, start, side="right")) - 1
        while start < stop:
            edge = int(self._edges[window])
            end = min(stop, int(self._edges[window + 1]))
            pieces.append(self._window_rows(window)[start - edge : end - edge])
            start, window = end, window + 1
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def _window_rows(self, window: int) -> NDArray[np.int64]:
        if self._window is None or self._window[0] != window:
            blocks = range(window * self._window_blocks, min((window + 1) * self._window_blocks, len(self._first)))
            rows = np.concatenate([np.arange(self._first[block], self._last[block]) for block in blocks])
            seed, epoch = self._key
            generator(seed, "order", epoch, "window", window).shuffle(rows)
            self._window = (window, rows)
        return self._window[1]


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The split of an epoch, or of the rest of one, into the batches of one rank.

    Every step consumes ``batch_size`` positions for each rank, rank 0 first. All ranks get the same number of batches,
    of the same sizes: with more than one rank, up to ``world_size`` − 1 remaining positions are dropped.

    Example:
        >>> from lsmix.data.loaders.sampler import BatchPlan
        >>> plan = BatchPlan(total=11, position=0, batch_size=2, rank=1, world_size=2)
        >>> [plan.span(batch) for batch in range(len(plan))]
        [(2, 4), (6, 8), (9, 10)]
    """

    total: int  # positions in the entire epoch
    position: int = 0  # first position of the rest, the same for all ranks
    batch_size: int  # per rank, at least 1
    rank: int = 0  # 0 to world_size − 1
    world_size: int = 1  # at least 1
    drop_last: bool = False  # omit the last batch if it is not full

    @property
    def _full_batches(self) -> int:
        return (self.total - self.position) // (self.batch_size * self.world_size)

    @property
    def _last_size(self) -> int:
        rest = self.total - self.position - self._full_batches * self.batch_size * self.world_size
        return 0 if self.drop_last else rest // self.world_size

    def __len__(self) -> int:
        return self._full_batches + (self._last_size > 0)

    def span(self, batch: int) -> tuple[int, int]:
        """Return the positions of a batch as (start, stop)."""
        size = self.batch_size if batch < self._full_batches else self._last_size
        start = self.position + batch * self.batch_size * self.world_size + self.rank * size
        return start, start + size

    def position_after(self, batches: int) -> int:
        """Return the next position after this many batches on each rank."""
        if batches >= len(self):
            return self.total
        return self.position + batches * self.batch_size * self.world_size


def plan_batches(
    total: int, batch_size: int, *, rank: int | None = None, world_size: int | None = None, drop_last: bool = False
) -> BatchPlan:
    """Split an epoch into batches for one rank, by default this process's rank in torch.distributed or torchrun.

    Raises:
        RecipeError: An argument is out of range, or there would be no batches.
    """
    own_rank, ranks = _this_rank()
    rank = own_rank if rank is None else rank
    world_size = ranks if world_size is None else world_size
    if batch_size < 1 or not 0 <= rank < world_size:
        raise RecipeError(
            "a loader needs batch_size ≥ 1 and 0 ≤ rank < world_size; got "
            f"batch_size={batch_size}, rank={rank}, world_size={world_size}."
        )
    plan = BatchPlan(total=total, batch_size=batch_size, rank=rank, world_size=world_size, drop_last=drop_last)
    if not len(plan):
        raise RecipeError(
            f"an epoch would have no batches: {total:,} images on {world_size} ranks in batches of {batch_size} "
            f"with drop_last={drop_last}. Use smaller batches."
        )
    return plan


def _this_rank() -> tuple[int, int]:
    """Return the rank and world size of this process."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:  # set by torchrun
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1
