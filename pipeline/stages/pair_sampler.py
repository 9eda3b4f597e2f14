"""Sampling of the images and the λ of each row of a pool, in pure NumPy.

A row depends only on (seed, copy, position), never on how the work is divided.
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
    """The sources and λ of n rows; sources are rows of the training split."""

    source_a: IntArray  # (n,) x₁
    others: IntArray  # (n, sources − 1) x₂ and any further sources
    lam: FloatArray  # (n, sources − 1) λ, the requested share of each source in ``others``
    corner: npt.NDArray[np.uint8]  # (n,) index into CORNERS, the corner where x₂ starts


class PairSampler:
    """Sample the rows of a pool, copy by copy.

    Every copy uses each training image once as x₁, once as x₂ and so on, in seeded permutations.

    Args:
        config: Configuration of the pool.
        images: N, the number of training images, at least 1.

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
        """Return the sources and λ of rows (n,) of the pool; n is at least 1, and rows are in ascending order."""
        copies, index = np.divmod(rows, self.images)
        parts = [[column[index[copies == copy]] for column in self._copy(copy)] for copy in np.unique(copies).tolist()]
        return PairBatch(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def resample(self, row: int, attempt: int) -> tuple[IntArray, FloatArray]:
        """Redraw a row that failed to decode: return partners and λ, each (sources − 1,), for attempt 1, 2, and so on."""
        copy, position = divmod(row, self.images)
        rng = generator(self._config.seed, "mix", "again", copy, position, attempt)
        return rng.integers(self.images, size=self._config.sources - 1), self._lam(copy, rng, 1)[0]

    def row_rng(self, rows: IntArray, attempt: int) -> RowRng:
        """Return a function that maps i to the generator of row ``rows[i]`` for attempt 0, 1, … of a random method."""
        seed = self._config.seed
        return lambda i: generator(seed, "mix", "method", *divmod(int(rows[i]), self.images), attempt)

    def _copy(self, copy: int) -> PairBatch:
        if copy not in self._copies:
            config, images = self._config, self.images
            # The first of the others is named "second", so that pools of two sources keep their random streams.
            words = [("first",), ("second",), *(("other", index) for index in range(2, config.sources))]
            first, *others = (generator(config.seed, "mix", *word, copy).permutation(images) for word in words)
            lam = self._lam(copy, generator(config.seed, "mix", "lambda", copy), images)
            if config.corner == "random":
                corner = generator(config.seed, "mix", "corner", copy).integers(len(CORNERS), size=images)
            else:
                corner = np.full(images, CORNERS.index(config.corner))
            # Rows are requested in order, so only this copy and the previous one are needed again.
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
