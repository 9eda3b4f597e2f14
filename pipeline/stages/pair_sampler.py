"""Which images are mixed in each row of a pool, and at which λ. Pure NumPy.

A row depends on (seed, copy, position) alone, so it is the same however the work is divided.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lsmix.data.mixing import RowRng
from lsmix.data.pool_spec import CORNERS, PoolConfig
from lsmix.data.rng import generator

__all__ = ["PairBatch", "PairSampler"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


class PairBatch(NamedTuple):
    """What n rows are made of; all sources are rows of the training split."""

    source_a: IntArray  # (n,) x₁
    others: IntArray  # (n, sources − 1) x₂ and, where more are mixed, those behind it
    lam: FloatArray  # (n, sources − 1) λ, the share of each of the others
    corner: npt.NDArray[np.uint8]  # (n,) where x₂ begins, an index of CORNERS


class PairSampler:
    """Draws the rows of a pool, copy by copy.

    In every copy each training image stands once as x₁, once as x₂ and so on, in seeded permutations.

    Args:
        config: of the pool.
        images: N, number of training images, at least 1.

    Example:
        >>> import numpy as np
        >>> from lsmix.data.pool_spec import PoolConfig
        >>> from lsmix.pipeline.stages.pair_sampler import PairSampler
        >>> pairs = PairSampler(PoolConfig(copies=2), 4).pairs(np.arange(4))
        >>> sorted(pairs.source_a.tolist())
        [0, 1, 2, 3]
    """

    def __init__(self, config: PoolConfig, images: int) -> None:
        self._config = config
        self.images = images
        self._copies: dict[int, PairBatch] = {}

    def __len__(self) -> int:
        return self.images * self._config.copies_made

    def pairs(self, rows: IntArray) -> PairBatch:
        """Return what rows (n,) of the pool are made of, at least one, in ascending order."""
        copies, places = np.divmod(rows, self.images)
        parts = [[column[places[copies == copy]] for column in self._copy(copy)] for copy in np.unique(copies).tolist()]
        return PairBatch(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def resample(self, row: int, attempt: int) -> tuple[IntArray, FloatArray]:
        """Return other partners and λ, each (sources − 1,), for a row that failed to decode, on attempt 1, 2, …."""
        copy, position = divmod(row, self.images)
        rng = generator(self._config.seed, "mix", "again", copy, position, attempt)
        return rng.integers(self.images, size=self._config.sources - 1), self._lam(copy, rng, 1)[0]

    def row_rng(self, rows: IntArray, attempt: int) -> RowRng:
        """Return what a method with chance draws from: the generator of the i-th of ``rows``, on attempt 0, 1, …."""
        seed = self._config.seed
        return lambda i: generator(seed, "mix", "method", *divmod(int(rows[i]), self.images), attempt)

    def _copy(self, copy: int) -> PairBatch:
        if copy not in self._copies:
            config, images = self._config, self.images
            # The first of the others is called "second", so that pools of two sources keep their streams.
            words = [("first",), ("second",), *(("other", place) for place in range(2, config.sources))]
            first, *others = (generator(config.seed, "mix", *word, copy).permutation(images) for word in words)
            lam = self._lam(copy, generator(config.seed, "mix", "lambda", copy), images)
            if config.corner == "random":
                corner = generator(config.seed, "mix", "corner", copy).integers(len(CORNERS), size=images)
            else:
                corner = np.full(images, CORNERS.index(config.corner))
            # Rows come in order, so only this copy and its neighbour are wanted again.
            self._copies = {key: pairs for key, pairs in self._copies.items() if key == copy - 1}
            self._copies[copy] = PairBatch(
                first.astype(np.int64), np.stack(others, axis=1).astype(np.int64), lam, corner.astype(np.uint8)
            )
        return self._copies[copy]

    def _lam(self, copy: int, rng: np.random.Generator, count: int) -> FloatArray:
        config = self._config
        if config.lambdas:
            return np.full((count, 1), config.lambdas[copy % len(config.lambdas)])
        if config.sources == 2:
            return rng.beta(config.alpha, config.alpha, count)[:, None]
        return rng.dirichlet([config.alpha] * config.sources, count)[:, 1:]
