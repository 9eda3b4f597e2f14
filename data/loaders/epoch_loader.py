"""What all loaders share: epochs, ranks, workers, reading ahead, and going on in the middle of an epoch.

A loader's position counts samples over all ranks, so that a state fits every rank, and another number of
ranks or another batch size goes on with exactly the samples that are left.

Workers of a ``DataLoader`` have copies of the loader. Epoch and start of a pass reach them through shared memory, even if
they stay from one epoch to the next.
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

BatchReader = Callable[[int, int], Any]  # from a batch's first position in the epoch and the one behind its last
_Item = TypeVar("_Item")
_Batch = TypeVar("_Batch", covariant=True)
_Count = Annotated[int, msgspec.Meta(ge=0)]

# Numbers in a loader's shared memory.
_EPOCH = 0  # of the next pass
_START = 1  # position at which the next pass begins, or the one that began last
_PASS = 2  # which processes take that pass: 0 before it begins, _MAIN, or a number that its workers have in common
_TAKERS = 3  # whether the main process, worker 0, worker 1, … took its part of that pass
_MAIN = 1
_MAX_WORKERS = 1024


class LoaderState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a loader stands; everything that decides the order is in it."""

    format_version: Literal[1] = 1
    epoch: _Count  # which pass
    position: _Count  # samples of this epoch that were handed out, over all ranks
    skip: _Count = 0  # in a worker: batches from there on that belong to the other workers
    total: _Count  # samples in the epoch
    seed: int
    order: dict[str, Any]  # what else the order depends on


class EpochLoader(IterableDataset[_Batch], ABC):
    """Base of the loaders: goes over one epoch at a time, in batches.

    ``for batch in loader`` goes over epoch ``loader.epoch``, and does so again until ``set_epoch`` is called.

    Args:
        plan: how an epoch is cut into batches, as ``plan_batches`` gives it.
        order: what the order depends on besides seed and epoch; plain numbers and strings.
        seed: names the order, together with the epoch.
        epoch: which pass comes first.
        batches_ahead: how many a background thread may have ready; 0 for no thread.
    """

    def __init__(
        self, plan: BatchPlan, *, order: dict[str, Any], seed: int = 0, epoch: int = 0, batches_ahead: int = 0
    ) -> None:
        self.plan = plan
        self.order = order
        self.seed = seed
        self.batches_ahead = batches_ahead
        self._shared = torch.zeros(_TAKERS + 1 + _MAX_WORKERS, dtype=torch.int64)
        with suppress(RuntimeError):  # there is no shared memory, so there can be no workers either
            self._shared.share_memory_()  # type: ignore[no-untyped-call]  # torch does not type it
        self._here = (epoch, 0, 0)  # epoch, position and skip of the pass in this process
        self._resumed: tuple[int, int, int] | None = None  # in a worker: the same, of a loaded state
        self._later_epoch = 0  # that a state at the end of an earlier epoch was loaded in
        self.set_epoch(epoch)

    @abstractmethod
    def _open(self, epoch: int) -> BatchReader:
        """Return what reads the batches of an epoch, in this process."""

    def __len__(self) -> int:
        """Return the number of batches that this rank gets in a whole epoch."""
        return len(self.plan)

    @property
    def epoch(self) -> int:
        """The epoch of the next pass."""
        return int(self._shared[_EPOCH])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass; the epoch that a loaded state is in goes on from there."""
        if epoch < 0:
            raise RecipeError(f"an epoch is 0 or more, got {epoch}.")
        self._later_epoch = 0
        if epoch != self.epoch:
            self._move(epoch, 0)

    def __iter__(self) -> Iterator[_Batch]:
        """Go over the present epoch, or over what a loaded state has left of it."""
        self._here = epoch, start, skip = self._begin()
        plan, worker = replace(self.plan, position=start), get_worker_info()
        # Worker w of n gives batches w, w + n, …: a DataLoader asks its workers in turn, so the order is kept.
        step = worker.num_workers if worker else 1
        mine = range(skip, len(plan), step)
        read = self._open(epoch)
        batches: Iterator[_Batch] = (read(*plan.span(batch)) for batch in mine)
        if self.batches_ahead:
            batches = read_ahead(batches, max(min(self.batches_ahead, len(mine)), 1))
        return self._counted(epoch, plan, mine, batches)

    def state_dict(self) -> dict[str, Any]:
        """Return where this loader stands: after the batch that it gave last.

        Raises:
            RecipeError: the workers of a ``DataLoader`` have begun a pass, and what was taken of it is not known here.
        """
        taken = int(self._shared[_PASS])
        if get_worker_info() or taken == _MAIN:
            return self._state(*self._here)
        if taken:
            raise RecipeError(
                "the workers of a DataLoader read ahead, so their loader does not know which batches you have had. Count "
                "them and keep state_after(batches), or use torchdata's StatefulDataLoader and its own state_dict()."
            )
        return self._state(self.epoch, int(self._shared[_START]), 0)

    def state_after(self, batches: int) -> dict[str, Any]:
        """Return the state in which this rank has had so many batches of the pass that began last, or comes next."""
        plan = replace(self.plan, position=int(self._shared[_START]))
        return self._state(self.epoch, plan.position_after(batches), 0)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state`` with the very next batch; batch size, rank and world size may have changed.

        Raises:
            RecipeError: the state belongs to another order: other data, another seed or another way to shuffle.
        """
        try:
            loaded = msgspec.convert(state, LoaderState)
        except msgspec.ValidationError as error:
            raise RecipeError(f"this is no state of a loader: {error}.") from error
        in_worker = get_worker_info() is not None
        own = msgspec.convert(self._state(loaded.epoch, loaded.position, loaded.skip if in_worker else 0), LoaderState)
        if own != loaded or loaded.position > loaded.total:
            raise RecipeError(
                f"the state of this loader belongs to another order of samples: expected {own}, got {loaded}. "
                "Make the loader with the settings that the state was taken with."
            )
        if in_worker:  # by a StatefulDataLoader, which has a state for each worker
            self._resumed = loaded.epoch, loaded.position, loaded.skip
            return
        # A StatefulDataLoader without workers loads a finished epoch when the next one begins, after set_epoch.
        self._later_epoch = self.epoch if loaded.position == self.plan.total else 0
        self._move(loaded.epoch, loaded.position)

    def _move(self, epoch: int, start: int) -> None:
        self._shared.zero_()
        self._shared[_EPOCH], self._shared[_START] = epoch, start

    def _begin(self) -> tuple[int, int, int]:
        """Return epoch and start of the pass that begins in this process, and how many batches others take first."""
        worker = get_worker_info()
        # Workers of one pass have one seed in common; those that stay for more passes have it in all of them.
        this_pass = (worker.seed - worker.id) | 2 if worker else _MAIN
        taker = _TAKERS + (worker.id + 1 if worker else 0)
        if taker >= len(self._shared):
            raise RecipeError(f"a loader serves at most {_MAX_WORKERS} workers. Use fewer.")
        if int(self._shared[_PASS]) not in (0, this_pass) or self._shared[taker]:
            self._shared[_START] = 0  # an earlier pass went on from a loaded state: this one is whole
            if self._later_epoch > self.epoch and not worker:
                self._move(self._later_epoch, 0)
        self._shared[_PASS], self._shared[taker] = this_pass, 1
        resumed, self._resumed = self._resumed, None
        return resumed or (self.epoch, int(self._shared[_START]), worker.id if worker else 0)

    def _counted(self, epoch: int, plan: BatchPlan, mine: Sequence[int], batches: Iterator[Any]) -> Iterator[_Batch]:
        worker = get_worker_info()
        others = worker.num_workers - 1 if worker else 0
        for batch, content in zip(mine, batches, strict=True):
            self._here = epoch, plan.position_after(batch + 1), others
            yield content
        self._here = epoch, plan.total, 0

    def _state(self, epoch: int, position: int, skip: int) -> dict[str, Any]:
        order, worker = self.order, get_worker_info()
        if worker:  # whose batches are cut in one way only
            cut = {
                "workers": worker.num_workers,
                "batch_size": self.plan.batch_size,
                "world_size": self.plan.world_size,
            }
            order = {**order, **cut}
        state = LoaderState(
            epoch=epoch, position=position, skip=skip, total=self.plan.total, seed=self.seed, order=order
        )
        built: dict[str, Any] = msgspec.to_builtins(state)
        return built

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if not self._shared.is_shared():  # type: ignore[no-untyped-call]  # torch does not type it
            raise RecipeError(
                "a copy of a loader would not follow the epochs of the original. Make another loader of the same pool."
            )


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
    waiting = deque(thread.submit(next, items, end) for _ in range(count))
    try:
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, items, end))
            yield cast(_Item, item)
    finally:
        for future in waiting:  # not by shutdown(cancel_futures=True), which fails where the interpreter ends
            future.cancel()
        thread.shutdown()
