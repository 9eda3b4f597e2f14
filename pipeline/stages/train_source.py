"""The batches of a training run: from pools, the training images, or both, optionally mixed on the fly.

For every combination of sources, an epoch has the same number of images and batches as the training split.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from lsmix.classifiers.config import PixelMix
from lsmix.data.artifact import Artifact
from lsmix.data.dataset import SplitArrays
from lsmix.data.pool import open_pool
from lsmix.pipeline.config.results import Seen
from lsmix.pipeline.config.schema import MixMode, MixSource

if TYPE_CHECKING:
    from lsmix.data.loaders.batch import Batch, SoftBatch
    from lsmix.data.loaders.epoch_loader import EpochLoader

__all__ = ["TrainSource"]


@dataclass(frozen=True, kw_only=True)
class TrainSource:
    """The sources of the batches of a training run."""

    parts: tuple[MixSource, ...]  # at least one
    mode: MixMode  # how several parts are combined
    train: SplitArrays  # the training images
    pools: Mapping[str, Artifact]  # pools by the ``pool`` field of parts
    batch_size: int
    seed: int

    @property
    def _drawn(self) -> tuple[MixSource, ...]:
        """The parts that provide batches; in a chain, only the first."""
        return self.parts[:1] if self.mode == "chain" else self.parts

    def open(self) -> "EpochLoader[Batch | SoftBatch]":
        """Return the loader of the batches."""
        from lsmix.data.loaders.combined_loader import CombinedLoader

        loaders = [self._open_loader(part) for part in self._drawn]
        return loaders[0] if len(loaders) == 1 else CombinedLoader(loaders, self._weights, seed=self.seed)

    def mixes(self, epoch: int, batch: int) -> Sequence[PixelMix]:
        """Return the mixing steps, in order, that are applied on the fly to a batch of an epoch."""
        parts = self.parts
        if len(self._drawn) > 1:
            batches = -(-len(self.train) // self.batch_size)
            parts = (self.parts[int(self._choose(epoch, batches)[batch])],)
        methods = [part for part in parts if part.method not in ("", "none")]
        return [PixelMix(method=part.method, alpha=part.alpha, rate=part.rate) for part in methods]

    def seen(self, epochs: int) -> list[Seen]:
        """Return how often the images of each source are used in ``epochs`` epochs."""
        images = len(self.train)
        sizes = np.diff(np.append(np.arange(0, images, self.batch_size), images))
        taken = np.zeros(len(self._drawn))
        for epoch in range(epochs):
            taken += np.bincount(self._choose(epoch, len(sizes)), weights=sizes, minlength=len(taken))
        by_source: dict[str, tuple[int, float]] = {}  # distinct images, total number of images used
        for part, count in zip(self._drawn, taken.tolist(), strict=True):
            name, distinct = "training images", images
            if part.pool:
                pool = open_pool(self.pools[part.pool])
                name, distinct = f"pool {pool.manifest.name}", images * min(pool.copies, epochs)
            by_source[name] = distinct, by_source.get(name, (0, 0.0))[1] + count
        return [Seen(source=name, images=n, times=round(count / n, 3)) for name, (n, count) in by_source.items()]

    def _choose(self, epoch: int, batches: int) -> npt.NDArray[np.int64]:
        """Return the index of the part that provides each batch of an epoch."""
        return _chosen(self.seed, epoch, batches, self._weights)

    @property
    def _weights(self) -> tuple[float, ...]:
        return tuple(part.weight for part in self._drawn)

    def _open_loader(self, part: MixSource) -> "EpochLoader[Batch | SoftBatch]":
        from lsmix.data.loaders.array_loader import ArrayLoader
        from lsmix.data.loaders.pool_loader import PoolLoader

        options: dict[str, Any] = {"seed": self.seed, "rank": 0, "world_size": 1}
        if not part.pool:
            return ArrayLoader(self.train.images, self.train.labels, self.batch_size, **options)
        pool = open_pool(self.pools[part.pool])
        labels: Literal["pair", "soft"] = "pair" if pool.sources == 2 else "soft"
        return PoolLoader(pool, self.batch_size, copies="cycle", labels=labels, **options)


@lru_cache(maxsize=4)  # called for every batch of an epoch
def _chosen(seed: int, epoch: int, batches: int, weights: tuple[float, ...]) -> npt.NDArray[np.int64]:
    from lsmix.data.loaders.combined_loader import choose_parts

    return choose_parts(seed, epoch, batches, weights)
