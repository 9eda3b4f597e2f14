"""The share that each method takes of every source, from λ and the random draws of the rows, without any image."""

from typing import Any

import numpy as np
import numpy.typing as npt

from lsmix.data.mixing import LATENT_METHODS, PIXEL_METHODS, RowRng
from lsmix.data.pool_spec import PoolSpec

__all__ = ["Shares"]

_Floats = npt.NDArray[np.float64]
_DUMMY_BYTES = 1 << 20  # of dummy images or latents that are mixed at a time


class Shares:
    """Tells the shares of a pool's rows.

    Args:
        plan: of the pool.
        image_shape: height, width and channels.
    """

    def __init__(self, plan: PoolSpec, image_shape: tuple[int, int, int]) -> None:
        self._method = plan.pool.method
        self._dim = plan.dim
        self._image_shape = image_shape
        registry = LATENT_METHODS if plan.latent else PIXEL_METHODS
        self.installed = self._method in registry
        self._formula = registry.entry(self._method).share if self.installed else None
        # Whether the shares cannot depend on the images. A method of another package without a formula may look at them.
        self.known = self._formula is not None or self._method in registry.builtin()

    def of(self, lam: _Floats, draws: RowRng, *, dummies: int = 0) -> npt.NDArray[np.float32]:
        """Return the share of each source but the first, (n, sources − 1).

        Args:
            lam: as planned, (n, sources − 1).
            draws: the generator of each row.
            dummies: what stands for images where a method must be run: 0 for nothing but zeros, else the seed of noise.

        Raises:
            RecipeError: the method is not installed, or breaks its contract.
        """
        taken = np.zeros((len(lam), lam.shape[1] + 1), np.float32)  # of the first sources together, as mixers count
        for place in range(lam.shape[1]):
            rates = np.minimum(lam[:, : place + 1].sum(axis=1), 1.0)
            taken[:, place + 1] = self._one(rates, draws, dummies)
        return np.diff(taken, axis=1)

    def _one(self, rates: _Floats, draws: RowRng, dummies: int) -> npt.NDArray[np.float32]:
        if self._formula:  # thousands of times faster than running the method
            sizes = (self._dim,) if self._dim is not None else self._image_shape[:2]
            return self._formula(rates, sizes).astype(np.float32)
        size = 4 * self._dim if self._dim is not None else int(np.prod(self._image_shape))
        step = max(1, _DUMMY_BYTES // size)
        parts = [self._run(rates[at : at + step], _later(draws, at), dummies) for at in range(0, len(rates), step)]
        return np.concatenate(parts) if parts else np.empty(0, np.float32)

    def _run(self, rates: _Floats, draws: RowRng, dummies: int) -> npt.NDArray[np.float32]:
        if self._dim is not None:
            from lsmix.glow.latent_mixing import mix_latents

            first, second = self._stand_ins((len(rates), self._dim), dummies, np.float32)
            return np.asarray(mix_latents(self._method, first, second, rates, draws=draws)[1])
        from lsmix.classifiers.pixel_mixing import mix_images

        first, second = self._stand_ins((len(rates), *self._image_shape), dummies, np.uint8)
        return mix_images(self._method, first, second, rates, draws=draws)[1]

    @staticmethod
    def _stand_ins(shape: tuple[int, ...], dummies: int, dtype: type) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        from lsmix.data.rng import generator

        if not dummies:
            return np.zeros(shape, dtype), np.zeros(shape, dtype)
        noise = generator(dummies, "verify", "dummies")
        return noise.integers(0, 256, shape).astype(dtype), noise.integers(0, 256, shape).astype(dtype)


def _later(draws: RowRng, at: int) -> RowRng:
    return lambda row: draws(at + row)
