"""The plan of a pool: which two images are mixed in each row, and at which λ. Pure NumPy; execution only applies it.

The one rule: a row's plan depends on (seed, copy, position) alone, so it is the same however the work is split.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lsmix.data.seeds import generator

__all__ = ["Draw", "MixPlan"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


class Draw(NamedTuple):
    """What some rows are made of: two source rows of the training split, int64 (n,), and λ, float64 (n,)."""

    source_a: IntArray
    source_b: IntArray
    lam: FloatArray


class MixPlan:
    """The plan of ``copies`` × ``images`` rows, copy by copy.

    In every copy each training image stands once as x₁ and once as x₂, in two seeded permutations.

    Args:
        images: N, number of training images, at least 1.
        copies: how many times the training set is gone through, at least 1.
        alpha: parameter of λ ~ Beta(α, α), above 0; unused where ``lambdas`` are given.
        lambdas: a fixed grid in [0, 1]: copy c takes ``lambdas[c % len(lambdas)]``; empty for drawn λ.
        seed: of every draw.

    Example:
        >>> from lsmix.pipeline.plan import MixPlan
        >>> draw = MixPlan(images=4, copies=2, alpha=0.4, lambdas=(), seed=0).rows(0, 4)
        >>> sorted(draw.source_a.tolist())
        [0, 1, 2, 3]
    """

    def __init__(self, *, images: int, copies: int, alpha: float, lambdas: tuple[float, ...], seed: int) -> None:
        self.images = images
        self.copies = copies
        self._alpha = alpha
        self._lambdas = lambdas
        self._seed = seed
        self._drawn: dict[int, Draw] = {}

    def __len__(self) -> int:
        return self.images * self.copies

    def rows(self, start: int, stop: int) -> Draw:
        """Return the plan of rows ``start`` to ``stop`` (exclusive) of the pool."""
        parts = []
        for copy in range(start // self.images, (stop - 1) // self.images + 1):
            first = copy * self.images
            part = slice(max(start - first, 0), min(stop - first, self.images))
            whole = self._copy(copy)
            parts.append(Draw(whole.source_a[part], whole.source_b[part], whole.lam[part]))
        return Draw(
            np.concatenate([draw.source_a for draw in parts]),
            np.concatenate([draw.source_b for draw in parts]),
            np.concatenate([draw.lam for draw in parts]),
        )

    def again(self, row: int, attempt: int) -> tuple[int, float]:
        """Return another partner and λ for a row whose image came out corrupted, on attempt 1, 2, …."""
        copy, position = divmod(row, self.images)
        draws = generator(self._seed, "mix", "again", copy, position, attempt)
        source_b = int(draws.integers(self.images))
        return source_b, self._lam(copy, draws, 1)[0]

    def _copy(self, copy: int) -> Draw:
        if copy not in self._drawn:
            first = generator(self._seed, "mix", "first", copy).permutation(self.images)
            second = generator(self._seed, "mix", "second", copy).permutation(self.images)
            lam = self._lam(copy, generator(self._seed, "mix", "lambda", copy), self.images)
            # Rows come in order, so only the copy at hand and its neighbour are ever wanted again.
            self._drawn = {key: draw for key, draw in self._drawn.items() if key == copy - 1}
            self._drawn[copy] = Draw(first.astype(np.int64), second.astype(np.int64), lam)
        return self._drawn[copy]

    def _lam(self, copy: int, draws: np.random.Generator, count: int) -> FloatArray:
        if self._lambdas:
            return np.full(count, self._lambdas[copy % len(self._lambdas)])
        return draws.beta(self._alpha, self._alpha, count)
