"""What all loaders share: epochs, ranks, workers, reading ahead, and going on in the middle of an epoch.

A loader's position counts samples over all ranks, so that a state fits every rank, and another number of
ranks or another batch size goes on with exactly the samples that are left.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal, TypeVar, cast

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from lsmix.data.errors import RecipeError
from lsmix.data.loaders.batch import Batch
from lsmix.data.loaders.sampler import BatchPlan, EpochOrder

__all__ = ["BatchReader", "EpochLoader", "LoaderState", "read_ahead", "to_batch"]

BatchReader = Callable[[NDArray[np.int64]], Any]  # from the rows of a batch, (B,), to the batch
_Count = Annotated[int, msgspec.Meta(ge=0)]


class LoaderState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a loader stands; everything that decides the order is in it."""

    format_version: Literal[1] = 1
    epoch: _Count  # which pass
    position: _Count  # samples of this epoch that were handed out, over all ranks
    total: _Count  # samples in the epoch
    seed: int
    order: dict[str, Any]  # what else the order depends on


class EpochLoader(IterableDataset[Any], ABC):
    """Base of the loaders: goes over one epoch at a time, in batches.

    ``for batch in loader`` goes over epoch ``loader.epoch``, and does so again until ``set_epoch`` is called.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        rank: int,
        world_size: int,
        drop_last: bool,
        shuffle: bool,
        read_ahead_bytes: int,
        row_bytes: int,
        block_rows: int,
        window_blocks: int,
    ) -> None:
        if batch_size < 1 or epoch < 0 or read_ahead_bytes < 0 or not 0 <= rank < world_size:
            raise RecipeError(
                "a loader needs batch_size ≥ 1, epoch ≥ 0, read_ahead_bytes ≥ 0 and 0 ≤ rank < world_size; got "
                f"batch_size={batch_size}, epoch={epoch}, read_ahead_bytes={read_ahead_bytes}, rank={rank}, "
                f"world_size={world_size}."
            )
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = epoch
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.shuffle = shuffle
        self.read_ahead_bytes = read_ahead_bytes
        self._row_bytes = row_bytes
        self._block_rows = block_rows
        self._window_blocks = window_blocks
        self._start = 0  # where the next pass begins
        self._position = 0  # where the present pass stands
        if not len(self):
            raise RecipeError(
                f"no batch would ever come: {len(self._rows())} images over {world_size} ranks in batches of {batch_size} "
                f"with drop_last={drop_last}. Take smaller batches."
            )

    @abstractmethod
    def _rows(self) -> range:
        """Return the rows of the present epoch."""

    @abstractmethod
    def _order_facts(self) -> dict[str, Any]:
        """Return what the order depends on besides seed and epoch; plain numbers and strings."""

    @abstractmethod
    def _reader(self) -> BatchReader:
        """Return what reads a batch of the present epoch, in this process."""

    def __len__(self) -> int:
        """Return the number of batches that this rank gets in a whole epoch."""
        return len(self._plan(0))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass; the epoch that a loaded state is in goes on from there."""
        if epoch < 0:
            raise RecipeError(f"an epoch is 0 or more, got {epoch}.")
        if epoch != self.epoch:
            self.epoch, self._start, self._position = epoch, 0, 0

    def __iter__(self) -> Iterator[Any]:
        """Go over the present epoch, or over what a loaded state has left of it."""
        start, self._start = self._start, 0
        self._position = start
        plan = self._plan(start)
        worker = get_worker_info()
        # Worker w of n gives batches w, w + n, …: a DataLoader asks its workers in turn, so the order is kept.
        return self._run(plan, range(worker.id, len(plan), worker.num_workers) if worker else range(len(plan)))

    def pick(self, batches: Sequence[int]) -> Iterator[Any]:
        """Go over some batches of the present epoch only, by their numbers, ascending; the others are not read."""
        return self._run(self._plan(0), batches)

    def state_dict(self) -> dict[str, Any]:
        """Return where this loader stands: after the batch that it gave last.

        Inside a ``DataLoader`` with workers, the loader of the main process gives no batches itself: use
        ``state_after`` there.
        """
        return self._state(self._position)

    def state_after(self, batches: int) -> dict[str, Any]:
        """Return the state in which this rank has had so many batches of the present epoch, counted from its start."""
        return self._state(self._plan(0).position_after(batches))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state`` with the very next batch; batch size, rank and world size may have changed.

        Raises:
            RecipeError: the state belongs to another order: other data, another seed or another way to shuffle.
        """
        try:
            loaded = msgspec.convert(state, LoaderState)
        except msgspec.ValidationError as error:
            raise RecipeError(f"this is no state of a loader: {error}.") from error
        before, self.epoch = self.epoch, loaded.epoch
        own = msgspec.convert(self._state(loaded.position), LoaderState)
        if own != loaded or loaded.position > loaded.total:
            self.epoch = before
            raise RecipeError(
                f"the state of this loader belongs to another order of samples: expected {own}, got {loaded}. "
                "Make the loader with the settings that the state was taken with."
            )
        self._start = self._position = loaded.position

    def _state(self, position: int) -> dict[str, Any]:
        state = LoaderState(
            epoch=self.epoch, position=position, total=len(self._rows()), seed=self.seed, order=self._order_facts()
        )
        built: dict[str, Any] = msgspec.to_builtins(state)
        return built

    def _plan(self, position: int) -> BatchPlan:
        return BatchPlan(
            total=len(self._rows()),
            position=position,
            batch_size=self.batch_size,
            rank=self.rank,
            world_size=self.world_size,
            drop_last=self.drop_last,
        )

    def _run(self, plan: BatchPlan, mine: Sequence[int]) -> Iterator[Any]:
        order = EpochOrder(
            self._rows(),
            block_rows=self._block_rows,
            window_blocks=self._window_blocks,
            seed=self.seed,
            epoch=self.epoch,
            shuffle=self.shuffle,
        )
        read = self._reader()
        batches: Iterator[Any] = (read(order.slice(*plan.span(batch))) for batch in mine)
        if self.read_ahead_bytes:
            ahead = self.read_ahead_bytes // (self.batch_size * self._row_bytes)
            batches = read_ahead(batches, max(min(ahead, len(mine)), 1))
        return self._counted(plan, mine, batches)

    def _counted(self, plan: BatchPlan, mine: Sequence[int], batches: Iterator[Any]) -> Iterator[Any]:
        positions = (plan.position_after(batch + 1) for batch in mine)
        for position, content in zip(positions, batches, strict=True):
            self._position = position
            yield content
        self._position = plan.total


def to_batch(
    images: NDArray[np.uint8], label_a: NDArray[np.int64], label_b: NDArray[np.int64], share_b: NDArray[np.float32]
) -> Batch:
    """Wrap arrays as tensors without a copy; images (B, H, W, C) become (B, C, H, W), channels-last in memory."""
    return Batch(
        torch.from_numpy(images).permute(0, 3, 1, 2),
        torch.from_numpy(label_a),
        torch.from_numpy(label_b),
        torch.from_numpy(share_b),
    )


_Item = TypeVar("_Item")


def read_ahead(items: Iterator[_Item], count: int) -> Iterator[_Item]:
    """Yield ``items``, which a background thread takes from their iterator ahead of time.

    Args:
        items: used by the thread alone from now on.
        count: how many may be taken and not yet yielded, at least 1.

    Raises:
        BaseException: whatever ``items`` raises, after the items before it.
    """
    end = object()
    thread = ThreadPoolExecutor(1, "lsmix-read-ahead")
    try:
        waiting = deque(thread.submit(next, items, end) for _ in range(count))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, items, end))
            yield cast(_Item, item)
    finally:
        thread.shutdown(cancel_futures=True)
