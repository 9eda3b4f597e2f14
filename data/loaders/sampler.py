"""The order in which an epoch goes through rows, and how batches and ranks cut it.

Both are pure functions of (seed, epoch) and sizes; nothing depends on workers or timing, so any pass can be repeated, resumed in its middle, or split among another number of ranks.
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
    """A shuffled order of the rows of a range, in which neighbours come from few blocks of rows.

    Blocks are shuffled and taken in windows of ``window_blocks``; the rows of a window are shuffled among each other.
    A window is the only thing kept in memory, and any part of the order is found without going through the rest.

    Args:
        rows: the rows to order; the first and the last block are cut to it.
        block_rows: rows in a block, counted from row 0. As long as the range or longer: a full permutation.
        window_blocks: blocks in a window, at least 1.
        seed: names the order, together with ``epoch``.
        epoch: which pass.
        shuffle: False keeps the rows in their order.

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
    """How the rest of an epoch is cut into batches for one of several ranks.

    Every step takes ``batch_size`` positions for each rank, rank 0 first. All ranks get equally many, equally large
    batches: with more than one rank, the up to ``world_size`` − 1 positions that would be left over are dropped.

    Example:
        >>> from lsmix.data.loaders.sampler import BatchPlan
        >>> plan = BatchPlan(total=11, position=0, batch_size=2, rank=1, world_size=2)
        >>> [plan.span(batch) for batch in range(len(plan))]
        [(2, 4), (6, 8), (9, 10)]
    """

    total: int  # positions in the whole epoch
    position: int = 0  # first position that is still to come, the same for all ranks
    batch_size: int  # of one rank, at least 1
    rank: int = 0  # 0 to world_size − 1
    world_size: int = 1  # at least 1
    drop_last: bool = False  # whether a last batch that is not full is left out

    @property
    def _whole(self) -> int:
        return (self.total - self.position) // (self.batch_size * self.world_size)

    @property
    def _tail(self) -> int:
        rest = self.total - self.position - self._whole * self.batch_size * self.world_size
        return 0 if self.drop_last else rest // self.world_size

    def __len__(self) -> int:
        return self._whole + (self._tail > 0)

    def span(self, batch: int) -> tuple[int, int]:
        """Return the first position of a batch and the one behind its last."""
        size = self.batch_size if batch < self._whole else self._tail
        start = self.position + batch * self.batch_size * self.world_size + self.rank * size
        return start, start + size

    def position_after(self, batches: int) -> int:
        """Return the first position that is still to come when each rank has had this many batches."""
        if batches >= len(self):
            return self.total
        return self.position + batches * self.batch_size * self.world_size


def plan_batches(
    total: int, batch_size: int, *, rank: int | None = None, world_size: int | None = None, drop_last: bool = False
) -> BatchPlan:
    """Return how an epoch is cut for one rank; by default for that of torch.distributed, or of torchrun.

    Raises:
        RecipeError: a number is out of its range, or no batch would come.
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
            f"no batch would ever come: {total} images over {world_size} ranks in batches of {batch_size} "
            f"with drop_last={drop_last}. Take smaller batches."
        )
    return plan


def _this_rank() -> tuple[int, int]:
    """Return rank and world size of this process."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:  # set by torchrun
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1
