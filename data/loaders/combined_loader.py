"""Batches from several sources in one epoch: each batch comes whole from one of them, as drawn.

The choice is a pure function of (seed, epoch), and batch i is batch i of the chosen source's own epoch; so
all sources together give as many images in as many batches as each alone.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsmix.data.errors import RecipeError
from lsmix.data.loaders.epoch_loader import BatchReader, EpochLoader
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


class CombinedLoader(EpochLoader[Any]):
    """Goes over an epoch in batches that each come from one of several loaders.

    Args:
        loaders: at least one; all have equally many images, in batches of one size, for the same rank.
        weights: how often batches come from each, as for ``choose_parts``.
        seed: names the choice, together with the epoch.

    Raises:
        RecipeError: the loaders differ in their images, batches or ranks.
    """

    def __init__(self, loaders: Sequence[EpochLoader[Any]], weights: Sequence[float], *, seed: int = 0) -> None:
        plans = {loader.plan for loader in loaders}
        if len(plans) != 1:
            raise RecipeError(
                "sources of one epoch must have equally many images, in batches of one size for one rank; got "
                f"{', '.join(map(str, plans))}. Make the pools from all of the training images."
            )
        self._loaders = list(loaders)
        self._weights = [float(weight) for weight in weights]
        (plan,) = plans
        order = {
            "batch": plan.batch_size * plan.world_size,
            "weights": self._weights,
            "sources": [{"seed": loader.seed, **loader.order} for loader in loaders],
        }
        super().__init__(plan, order=order, seed=seed, batches_ahead=max(loader.batches_ahead for loader in loaders))

    def _open(self, epoch: int) -> BatchReader:
        chosen = choose_parts(self.seed, epoch, len(self), self._weights).tolist()
        step = self.plan.batch_size * self.plan.world_size
        readers = [loader._open(epoch) for loader in self._loaders]

        def read(start: int, stop: int) -> Any:
            return readers[chosen[start // step]](start, stop)

        return read
