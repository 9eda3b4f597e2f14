"""Batches from several sources in one epoch: each batch comes whole from one of them, as drawn.

The choice is a pure function of (seed, epoch), and batch i is batch i of the chosen source's own epoch; so
all sources together give as many images in as many batches as each alone.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsmix.data.errors import RecipeError
from lsmix.data.loaders.epoch_loader import EpochLoader
from lsmix.data.rng import generator

__all__ = ["CombinedLoader", "choose_parts"]


def choose_parts(seed: int, epoch: int, batches: int, weights: Sequence[float]) -> NDArray[np.int64]:
    """Return which part each batch of an epoch comes from, int64 (batches,) in 0 to len(weights) − 1.

    Each is drawn with the probability of its weight; the weights are positive and need not add up to 1.

    Example:
        >>> from lsmix.data.loaders.combined_loader import choose_parts
        >>> sorted(set(choose_parts(0, 0, 100, [1.0, 1.0]).tolist()))
        [0, 1]
    """
    edges = np.cumsum(weights) / np.sum(weights)
    drawn = np.searchsorted(edges, generator(seed, "combine", epoch).random(batches), side="right")
    return np.minimum(drawn, len(weights) - 1).astype(np.int64)  # the last edge may round to below 1


class CombinedLoader:
    """Goes over an epoch in batches that each come from one of several loaders.

    Args:
        loaders: at least one; all give equally many batches an epoch.
        choose: returns the loader of each batch, int (batches,), of (epoch, batches), as ``choose_parts`` does.

    Raises:
        RecipeError: the loaders differ in their number of batches.
    """

    def __init__(self, loaders: Sequence[EpochLoader], choose: Callable[[int, int], NDArray[np.int64]]) -> None:
        lengths = [len(loader) for loader in loaders]
        if len(set(lengths)) != 1:
            raise RecipeError(
                f"sources of one epoch must give equally many batches, got {lengths}. Make the pools from all of the "
                "training images, and take one batch size."
            )
        self._loaders = list(loaders)
        self._choose = choose
        self._epoch = 0
        self._start = 0
        self._position = 0

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return len(self._loaders[0])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass; the epoch that a loaded state is in goes on from there."""
        for loader in self._loaders:
            loader.set_epoch(epoch)
        if epoch != self._epoch:
            self._epoch, self._start, self._position = epoch, 0, 0

    def __iter__(self) -> Iterator[Any]:
        """Go over the present epoch, or over what a loaded state has left of it."""
        start, self._start = self._start, 0
        chosen = self._choose(self._epoch, len(self)).tolist()
        # Read only what is taken: each loader is asked for its own batches alone.
        passes = [
            loader.pick([batch for batch in range(start, len(self)) if chosen[batch] == part])
            for part, loader in enumerate(self._loaders)
        ]
        self._position = start
        return self._run(start, chosen, passes)

    def _run(self, start: int, chosen: Sequence[int], passes: Sequence[Iterator[Any]]) -> Iterator[Any]:
        for batch in range(start, len(self)):
            content = next(passes[chosen[batch]])
            self._position = batch + 1
            yield content

    def state_dict(self) -> dict[str, Any]:
        """Return where the loader stands: after the batch that it gave last."""
        return {
            "format_version": 1,
            "epoch": self._epoch,
            "batch": self._position,
            "sources": [loader.state_after(0) for loader in self._loaders],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state`` with the very next batch.

        Raises:
            RecipeError: it is no state of a loader of the same sources.
        """
        epoch, batch = state.get("epoch"), state.get("batch")
        if not isinstance(epoch, int) or not isinstance(batch, int) or not 0 <= batch <= len(self) or epoch < 0:
            raise RecipeError(f"this is no state of {len(self._loaders)} combined loaders: {state}.")
        before = self._epoch
        self.set_epoch(epoch)
        if self.state_dict()["sources"] != state.get("sources"):
            self.set_epoch(before)
            raise RecipeError(
                f"the state of these {len(self._loaders)} combined loaders belongs to other sources or another order. "
                "Make them with the settings that the state was taken with."
            )
        self._start = self._position = batch
