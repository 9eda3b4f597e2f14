"""A loader that draws each batch of an epoch from one of several loaders.

The choice is a pure function of (seed, epoch). Batch i is batch i of the chosen loader's own epoch, so an epoch has as
many batches and images as an epoch of each single loader.
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
    """Draw the source of each batch of an epoch, int64 (batches,) from 0 to len(weights) − 1.

    The probability of a source is proportional to its weight. Weights are positive and need not sum to 1.

    Example:
        >>> from lsmix.data.loaders.combined_loader import choose_parts
        >>> sorted(set(choose_parts(0, 0, 100, [1.0, 1.0]).tolist()))
        [0, 1]
    """
    edges = np.cumsum(weights) / np.sum(weights)
    drawn = np.searchsorted(edges, generator(seed, "combine", epoch).random(batches), side="right")
    return np.minimum(drawn, len(weights) - 1).astype(np.int64)  # rounding may leave the last edge below 1


class CombinedLoader(EpochLoader[Any]):
    """Iterates over an epoch of batches, each of which comes from one of several loaders.

    Args:
        loaders: At least one; all with the same number of images, batch size and rank.
        weights: Relative frequency of each loader, as for ``choose_parts``.
        seed: Determines the choice, together with the epoch.

    Raises:
        RecipeError: The loaders differ in their number of images, batch size or rank.
    """

    def __init__(self, loaders: Sequence[EpochLoader[Any]], weights: Sequence[float], *, seed: int = 0) -> None:
        plans = {loader.plan for loader in loaders}
        if len(plans) != 1:
            raise RecipeError(
                "loaders can be combined only if they have the same number of images, batch size and rank; got "
                f"{', '.join(map(str, plans))}. Build the pools from all training images."
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
