"""The plan of a pool: which images are mixed in each row, and at which λ. Pure NumPy; execution only applies it.

A row's plan depends on (seed, copy, position) alone, so it is the same however the work is split.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lsmix.data.mixing import RowRng
from lsmix.data.pool_spec import CORNERS
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


@dataclass(kw_only=True)
class PairSampler:
    """The plan of ``copies`` × ``images`` rows, copy by copy.

    In every copy each training image stands once as x₁, once as x₂ and so on, in seeded permutations.

    Example:
        >>> from lsmix.pipeline.stages.pair_sampler import PairSampler
        >>> draw = PairSampler(images=4, copies=2, alpha=0.4, lambdas=(), seed=0).rows(0, 4)
        >>> sorted(draw.source_a.tolist())
        [0, 1, 2, 3]
    """

    images: int  # N, number of training images, at least 1
    copies: int  # how many times the training set is gone through, at least 1
    alpha: float  # λ ~ Beta(α, α), of more than two sources Dirichlet(α, α, …); unused where lambdas are given
    lambdas: tuple[float, ...]  # a fixed grid in [0, 1]: copy c takes lambdas[c % len(lambdas)]; empty for drawn λ
    seed: int  # of every draw
    sources: int = 2  # images in each mix, at least 2
    random_corner: bool = False  # draw the corner where x₂ begins; else it is the first
    _drawn: dict[int, PairBatch] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return self.images * self.copies

    def rows(self, start: int, stop: int) -> PairBatch:
        """Return the plan of rows ``start`` to ``stop`` (exclusive) of the pool."""
        parts = []
        for copy in range(start // self.images, (stop - 1) // self.images + 1):
            first = copy * self.images
            part = slice(max(start - first, 0), min(stop - first, self.images))
            parts.append([column[part] for column in self._copy(copy)])
        return PairBatch(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def pick(self, rows: IntArray) -> PairBatch:
        """Return the plan of any rows (n,) of the pool, at least one, in ascending order."""
        copies, places = np.divmod(rows, self.images)
        parts = [[column[places[copies == copy]] for column in self._copy(copy)] for copy in np.unique(copies).tolist()]
        return PairBatch(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def again(self, row: int, attempt: int) -> tuple[IntArray, FloatArray]:
        """Return other partners and λ, each (sources − 1,), for a row that failed to decode, on attempt 1, 2, …."""
        copy, position = divmod(row, self.images)
        draws = generator(self.seed, "mix", "again", copy, position, attempt)
        return draws.integers(self.images, size=self.sources - 1), self._lam(copy, draws, 1)[0]

    def method_draws(self, rows: IntArray, attempt: int) -> RowRng:
        """Return what a method with chance draws from: the generator of the i-th of ``rows``, on attempt 0, 1, …."""
        return lambda i: generator(self.seed, "mix", "method", *divmod(int(rows[i]), self.images), attempt)

    def _copy(self, copy: int) -> PairBatch:
        if copy not in self._drawn:
            first = generator(self.seed, "mix", "first", copy).permutation(self.images)
            # The first of the others is called "second", so that plans of two sources are what they always were.
            words = [("second",), *((("other", place)) for place in range(2, self.sources))]
            others = [generator(self.seed, "mix", *word, copy).permutation(self.images) for word in words]
            lam = self._lam(copy, generator(self.seed, "mix", "lambda", copy), self.images)
            corner = np.zeros(self.images, np.uint8)
            if self.random_corner:
                corner = (
                    generator(self.seed, "mix", "corner", copy).integers(len(CORNERS), size=self.images).astype("u1")
                )
            # Rows come in order, so only the copy at hand and its neighbour are ever wanted again.
            self._drawn = {key: draw for key, draw in self._drawn.items() if key == copy - 1}
            self._drawn[copy] = PairBatch(
                first.astype(np.int64), np.stack(others, axis=1).astype(np.int64), lam, corner
            )
        return self._drawn[copy]

    def _lam(self, copy: int, draws: np.random.Generator, count: int) -> FloatArray:
        if self.lambdas:
            return np.full((count, 1), self.lambdas[copy % len(self.lambdas)])
        if self.sources == 2:
            return draws.beta(self.alpha, self.alpha, count)[:, None]
        return draws.dirichlet([self.alpha] * self.sources, count)[:, 1:]
