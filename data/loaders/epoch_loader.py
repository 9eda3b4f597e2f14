"""The base class of all loaders: epochs, ranks, workers, read-ahead, and resuming in the middle of an epoch.

A loader's position counts samples over all ranks. One state therefore fits every rank, and training can resume with
another number of ranks or another batch size on exactly the remaining samples.

Workers of a ``DataLoader`` have copies of the loader. They get the epoch and the start position of a pass from shared
memory, which also reaches persistent workers.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar, cast

import msgspec
import torch
from torch.utils.data import IterableDataset, get_worker_info

from lsmix.data.errors import RecipeError
from lsmix.data.loaders.sampler import BatchPlan

__all__ = ["BatchReader", "EpochLoader", "LoaderState", "read_ahead"]

BatchReader = Callable[[int, int], Any]  # (start, stop), positions in the epoch, to the batch
_Item = TypeVar("_Item")
_Batch = TypeVar("_Batch", covariant=True)
_Count = Annotated[int, msgspec.Meta(ge=0)]

# Indices into a loader's shared memory. "The pass" is the one that began last, or before any began, the next one.
_EPOCH = 0  # epoch of the next pass
_START = 1  # position at which the pass begins
_PASS = 2  # who iterates over the pass: 0 if it has not begun, _MAIN, or a number that its workers have in common
_STARTED = 3  # first of the flags that the main process, worker 0, worker 1, … set when they begin their part
_MAIN = 1
_MAX_WORKERS = 1024


class LoaderState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The position of a loader, with everything that determines its order."""

    format_version: Literal[1] = 1
    epoch: _Count
    position: _Count  # samples of this epoch that were yielded, over all ranks
    skip: _Count = 0  # in a worker: number of following batches that belong to other workers
    total: _Count  # samples in the epoch
    seed: int
    order: dict[str, Any]  # everything else that the order depends on


class EpochLoader(IterableDataset[_Batch], ABC):
    """Base class of the loaders: iterates over one epoch at a time, in batches.

    ``for batch in loader`` iterates over epoch ``loader.epoch``; it repeats this epoch until ``set_epoch`` is called.

    Args:
        plan: How an epoch is split into batches, see ``plan_batches``.
        order: Everything else that the order depends on, as numbers and strings.
        seed: Determines the order, together with the epoch.
        epoch: The first epoch.
        batches_ahead: Number of batches that a background thread prepares; 0 for no thread.
    """

    def __init__(
        self, plan: BatchPlan, *, order: dict[str, Any], seed: int = 0, epoch: int = 0, batches_ahead: int = 0
    ) -> None:
        self.plan = plan
        self.order = order
        self.seed = seed
        self.batches_ahead = batches_ahead
        self._shared = torch.zeros(_STARTED + 1 + _MAX_WORKERS, dtype=torch.int64)
        with suppress(RuntimeError):  # on a system without shared memory, which cannot run workers either
            self._shared.share_memory_()  # type: ignore[no-untyped-call]  # torch does not type it
        self._current = (epoch, 0, 0)  # epoch, position and skip of the pass in this process
        self._resumed: tuple[int, int, int] | None = None  # in a worker: the same numbers of a loaded state
        self._next_epoch = 0  # the epoch to continue with after loading the state of a finished, earlier epoch
        self.set_epoch(epoch)

    @abstractmethod
    def _open(self, epoch: int) -> BatchReader:
        """Return a function that reads the batches of an epoch in this process."""

    def __len__(self) -> int:
        """Return the number of batches per epoch on this rank."""
        return len(self.plan)

    @property
    def epoch(self) -> int:
        """The epoch of the next pass."""
        return int(self._shared[_EPOCH])

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass; setting the epoch of a loaded state keeps the position of that state."""
        if epoch < 0:
            raise RecipeError(f"epoch must be 0 or greater, got {epoch}.")
        self._next_epoch = 0
        if epoch != self.epoch:
            self._set_position(epoch, 0)

    def __iter__(self) -> Iterator[_Batch]:
        """Iterate over the current epoch, or over the rest of it after a state was loaded."""
        self._current = epoch, start, skip = self._begin_pass()
        plan, worker = replace(self.plan, position=start), get_worker_info()
        # Worker w of n yields batches w, w + n, …: a DataLoader asks its workers in turn, which keeps the order.
        step = worker.num_workers if worker else 1
        own_batches = range(skip, len(plan), step)
        read = self._open(epoch)
        batches: Iterator[_Batch] = (read(*plan.span(batch)) for batch in own_batches)
        if self.batches_ahead:
            batches = read_ahead(batches, max(min(self.batches_ahead, len(own_batches)), 1))
        return self._track_position(epoch, plan, own_batches, batches)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this loader after the batch that it yielded last.

        Raises:
            RecipeError: The workers of a ``DataLoader`` have begun a pass, whose position this process does not know.
        """
        owner = int(self._shared[_PASS])
        if get_worker_info() or owner == _MAIN:
            return self._state(*self._current)
        if owner:
            raise RecipeError(
                "the workers of a DataLoader read ahead, so the loader does not know how many batches you have "
                "received. Count them and save state_after(batches), or use state_dict() of torchdata's "
                "StatefulDataLoader."
            )
        return self._state(self.epoch, int(self._shared[_START]), 0)

    def state_after(self, batches: int) -> dict[str, Any]:
        """Return the state after ``batches`` batches on this rank, in the pass that began last or else in the next."""
        plan = replace(self.plan, position=int(self._shared[_START]))
        return self._state(self.epoch, plan.position_after(batches), 0)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the batch after ``state``; batch size, rank and world size may differ.

        Raises:
            RecipeError: The state belongs to another order, e.g. to other data, another seed or other shuffle settings.
        """
        try:
            loaded = msgspec.convert(state, LoaderState)
        except msgspec.ValidationError as error:
            raise RecipeError(f"this is not the state of a loader: {error}.") from error
        in_worker = get_worker_info() is not None
        own = msgspec.convert(self._state(loaded.epoch, loaded.position, loaded.skip if in_worker else 0), LoaderState)
        if own != loaded or loaded.position > loaded.total:
            raise RecipeError(
                f"the state belongs to another order of samples: expected {own}, got {loaded}. "
                "Create the loader with the settings that it had when the state was saved."
            )
        if in_worker:  # called by a StatefulDataLoader, which has a state for each worker
            self._resumed = loaded.epoch, loaded.position, loaded.skip
            return
        # A StatefulDataLoader without workers loads the state of a finished epoch only after set_epoch(next epoch).
        self._next_epoch = self.epoch if loaded.position == self.plan.total else 0
        self._set_position(loaded.epoch, loaded.position)

    def _set_position(self, epoch: int, start: int) -> None:
        self._shared.zero_()
        self._shared[_EPOCH], self._shared[_START] = epoch, start

    def _begin_pass(self) -> tuple[int, int, int]:
        """Begin a pass in this process; return its epoch, its start and the number of batches to skip."""
        worker = get_worker_info()
        # Workers of one pass share a base seed; persistent workers keep it in all passes.
        this_pass = (worker.seed - worker.id) | 2 if worker else _MAIN
        flag = _STARTED + (worker.id + 1 if worker else 0)
        if flag >= len(self._shared):
            raise RecipeError(f"a loader supports at most {_MAX_WORKERS:,} workers. Use fewer.")
        if int(self._shared[_PASS]) not in (0, this_pass) or self._shared[flag]:
            self._shared[_START] = 0  # only the first pass starts at a loaded position; this one covers the full epoch
            if self._next_epoch > self.epoch and not worker:
                self._set_position(self._next_epoch, 0)
        self._shared[_PASS], self._shared[flag] = this_pass, 1
        resumed, self._resumed = self._resumed, None
        return resumed or (self.epoch, int(self._shared[_START]), worker.id if worker else 0)

    def _track_position(
        self, epoch: int, plan: BatchPlan, own_batches: Sequence[int], batches: Iterator[Any]
    ) -> Iterator[_Batch]:
        worker = get_worker_info()
        others = worker.num_workers - 1 if worker else 0
        for batch, content in zip(own_batches, batches, strict=True):
            self._current = epoch, plan.position_after(batch + 1), others
            yield content
        self._current = epoch, plan.total, 0

    def _state(self, epoch: int, position: int, skip: int) -> dict[str, Any]:
        order, worker = self.order, get_worker_info()
        if worker:  # the state of a worker fits only the same split into batches
            cut = {
                "workers": worker.num_workers,
                "batch_size": self.plan.batch_size,
                "world_size": self.plan.world_size,
            }
            order = {**order, **cut}
        state = LoaderState(
            epoch=epoch, position=position, skip=skip, total=self.plan.total, seed=self.seed, order=order
        )
        builtins: dict[str, Any] = msgspec.to_builtins(state)
        return builtins

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if not self._shared.is_shared():  # type: ignore[no-untyped-call]  # torch does not type it
            raise RecipeError(
                "a loader cannot be copied, because the copy would not follow set_epoch. Create a second loader."
            )


def read_ahead(items: Iterator[_Item], count: int) -> Iterator[_Item]:
    """Yield ``items``, which a background thread reads ahead of time.

    Args:
        items: An iterator that only the thread may use from now on.
        count: Maximum number of items read but not yet yielded, at least 1.

    Raises:
        BaseException: An exception of ``items``, raised after all earlier items were yielded.
    """
    end = object()
    thread = ThreadPoolExecutor(1, "lsmix-read-ahead")
    waiting = deque(thread.submit(next, items, end) for _ in range(count))
    try:
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, items, end))
            yield cast(_Item, item)
    finally:
        for future in waiting:  # shutdown(cancel_futures=True) would fail at interpreter exit
            future.cancel()
        thread.shutdown()
