"""The share that each method takes of every source, from λ and the random draws of the rows, without any image."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from lsmix.data.mixing import LATENT_METHODS, PIXEL_METHODS, RowRng
from lsmix.data.pool_spec import PoolSpec
from lsmix.data.rng import generator

__all__ = ["planned_shares"]

_Floats = npt.NDArray[np.float64]
_Shares = npt.NDArray[np.float32]
_BYTES = 1 << 20  # of stand-ins for images or latents that are mixed at a time


def planned_shares(plan: PoolSpec, image_shape: tuple[int, int, int], lam: _Floats, row_rng: RowRng) -> _Shares | str:
    """Return the share of each source but the first, (n, sources − 1), or why it cannot be known without the images.

    Args:
        plan: of the pool.
        image_shape: height, width and channels.
        lam: as planned, (n, sources − 1).
        row_rng: the generator of each row.
    """
    method, registry = plan.pool.method, LATENT_METHODS if plan.latent else PIXEL_METHODS
    if method not in registry:
        return f"the method {method!r} is not installed; install its package"
    formula = registry.entry(method).share
    if formula:  # thousands of times faster than running the method
        sizes = image_shape[:2] if plan.dim is None else (plan.dim,)
        return _of_all_sources(lam, lambda rates: formula(rates, sizes).astype(np.float32))
    shape = image_shape if plan.dim is None else (plan.dim,)

    def of_zeros(rates: _Floats) -> _Shares:
        return _run(method, rates, row_rng, lambda size: np.zeros((size, *shape)))

    def of_noise(rates: _Floats) -> _Shares:
        noise = generator(1, "verify", "dummies")
        return _run(method, rates, row_rng, lambda size: noise.integers(0, 256, (size, *shape)))

    if method in registry.builtin():
        return _of_all_sources(lam, of_zeros)
    try:
        shares, others = _of_all_sources(lam, of_zeros), _of_all_sources(lam, of_noise)
    except Exception as error:  # noqa: BLE001 - another package's code may raise anything at stand-ins for images
        return f"the method {method!r} fails at stand-ins for images ({error})"
    if (shares == others).all():
        return shares
    return f"the method {method!r} of another package looks at the images; --deep mixes some"


def _of_all_sources(lam: _Floats, of_rates: Callable[[_Floats], _Shares]) -> _Shares:
    taken = np.zeros((len(lam), lam.shape[1] + 1), np.float32)  # of the first sources together, as methods count
    for place in range(lam.shape[1]):
        taken[:, place + 1] = of_rates(np.minimum(lam[:, : place + 1].sum(axis=1), 1.0))
    return np.diff(taken, axis=1)


def _run(method: str, rates: _Floats, row_rng: RowRng, make: Callable[[int], npt.NDArray[Any]]) -> _Shares:
    """Return the shares that a method gives when it mixes stand-ins, float (n, D) or (n, H, W, C), made by ``make``."""
    from lsmix.classifiers.pixel_mixing import mix_images
    from lsmix.glow.latent_mixing import mix_latents

    step = max(1, _BYTES // (4 * make(1).size))
    shares = [np.empty(0, np.float32)]
    for start in range(0, len(rates), step):
        part = rates[start : start + step]
        first, second = make(len(part)), make(len(part))

        def part_rng(row: int, start: int = start) -> np.random.Generator:
            return row_rng(start + row)

        if first.ndim == 2:
            z1, z2 = first.astype(np.float32), second.astype(np.float32)
            shares.append(mix_latents(method, z1, z2, part, draws=part_rng)[1])
        else:
            x1, x2 = first.astype(np.uint8), second.astype(np.uint8)
            shares.append(mix_images(method, x1, x2, part, draws=part_rng)[1])
    return np.concatenate(shares)
