"""The share that each method takes of every source, from λ and the rows' own draws alone, without any image.

The one rule: nothing is claimed of a method of another package that looks at the images it mixes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from lsmix.data.mixing import LATENT_METHODS, PIXEL_METHODS, RowRng
from lsmix.data.pool_spec import PoolSpec

__all__ = ["Shares"]

_Floats = npt.NDArray[np.float64]
_DUMMY_BYTES = 1 << 20  # of dummy images or latents that are mixed at a time


def _itself(lam: _Floats, _sizes: tuple[int, ...]) -> _Floats:
    return lam


def _whole(lam: _Floats, sizes: tuple[int, ...]) -> _Floats:
    total = int(np.prod(sizes))
    share: _Floats = np.floor(lam * total) / total
    return share


def _patch(lam: _Floats, sizes: tuple[int, ...]) -> _Floats:
    height, width = sizes
    share: _Floats = np.floor(height * np.sqrt(lam)) * np.floor(width * np.sqrt(lam)) / (height * width)
    return share


# Of lsmix's own methods those whose share follows from λ: thousands of times faster than mixing dummies, and a test
# compares. Sizes are (D,) or (H, W).
_FROM_LAMBDA: dict[str, Callable[[_Floats, tuple[int, ...]], _Floats]] = {
    "ls-mix": _whole,
    "swap-mix": _whole,
    "reverse-mix": _whole,
    "linear": _itself,
    "mixup": _itself,
    "fmix": _whole,
    "resizemix": _patch,
}


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
        self.builtin = self._method in registry.builtin()
        self.installed = self._method in registry

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
        if self.builtin and self._method in _FROM_LAMBDA:
            sizes = (self._dim,) if self._dim is not None else self._image_shape[:2]
            return _FROM_LAMBDA[self._method](rates, sizes).astype(np.float32)
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
