"""Sweeps for the eye: pairs mixed at growing λ [P Fig. 4], latents of which ever more is zero [P Fig. 3].

A sweep's draws are named by its pair's row alone, so that the masks of a method with chance grow with λ.

Axes: R pairs or images, K columns of the sweep, D components, H, W, C of an image.
"""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from lsmix.data.pool_spec import PoolConfig

if TYPE_CHECKING:
    from lsmix.data.latents import Latents
    from lsmix.data.pool import Pool
    from lsmix.glow.flow import Flow

__all__ = [
    "FIG3_RATES",
    "FIG4_RATES",
    "Sweep",
    "choose_pairs",
    "decode_sweep",
    "mix_sweep",
    "mixed_latents",
    "zeroed_latents",
]

Image = npt.NDArray[np.uint8]

# By their titles, unreduced as in the paper: λ of the columns of [P Fig. 4], share of zeros in those of [P Fig. 3].
FIG4_RATES = {f"{n}/16": Fraction(n, 16) for n in (2, 5, 7, 9, 11, 14)}
FIG3_RATES = {f"{n}/12": Fraction(n, 12) for n in range(1, 12)}


class Sweep(NamedTuple):
    """A decoded sweep."""

    images: npt.NDArray[np.uint8]  # (R, K, H, W, C)
    decode_failed: npt.NDArray[np.bool_]  # (R, K), failed decodes by the default rule of pools


def choose_pairs(pool: "Pool", count: int) -> list[tuple[int, int]]:
    """Return the sources of the first rows of a pool whose two classes differ, or of the first rows where none do."""
    rows = np.arange(min(len(pool), 64 * count))
    differ = pool.label_a[: len(rows)] != pool.label_b[: len(rows)]
    chosen = [*rows[differ], *rows[~differ]][:count]
    return [(int(pool.source_a[row]), int(pool.source_b[row])) for row in chosen]


def mixed_latents(
    latents: "Latents",
    pairs: Sequence[tuple[int, int]],
    *,
    method: str = "ls-mix",
    rates: Iterable[Fraction] = FIG4_RATES.values(),
    seed: int = 0,
) -> npt.NDArray[np.float32]:
    """Return each pair of source rows mixed at each rate: latents, float32 (R, K, D).

    Raises:
        RecipeError: the method is unknown.
    """
    from lsmix.glow.latent_mixing import mix_latents

    first = latents.z.gather([pair[0] for pair in pairs])
    second = latents.z.gather([pair[1] for pair in pairs])
    return np.stack([mix_latents(method, first, second, float(rate), seed=seed)[0] for rate in rates], axis=1)


def zeroed_latents(
    latents: "Latents", rows: Sequence[int], *, rates: Iterable[Fraction] = FIG3_RATES.values()
) -> npt.NDArray[np.float32]:
    """Return each source row with each share of its last components at zero: latents, float32 (R, K, D)."""
    from lsmix.glow.latent_mixing import zero_fill

    z = latents.z.gather(list(rows))
    return np.stack([zero_fill(z, int(rate * latents.dim)) for rate in rates], axis=1)


def decode_sweep(flow: "Flow", latents: "Latents", z: npt.NDArray[np.float32]) -> Sweep:
    """Decode latents, float32 (R, K, D), in the order of the store that they come from, and judge them."""
    from lsmix.glow.latent_mixing import is_failed_decode

    rule = PoolConfig()
    validate = partial(is_failed_decode, tolerance=rule.tolerance, bad_pixel_fraction=rule.bad_pixel_fraction)
    rows, columns, dim = z.shape
    images, decode_failed = flow.decode(z.reshape(-1, dim), validate=validate)
    return Sweep(images.reshape(rows, columns, *images.shape[1:]), decode_failed.reshape(rows, columns))


def mix_sweep(
    flow: "Flow", latents: "Latents", pairs: Sequence[tuple[int, int]], *, method: str = "ls-mix"
) -> list[list[Image]]:
    """Return a row for each pair of source rows: x₁, the mixes at the rates of Fig. 4, x₂; all decoded from latents."""
    first, second = (latents.z.gather([pair[place] for pair in pairs])[:, None] for place in (0, 1))
    z = np.concatenate([first, mixed_latents(latents, pairs, method=method), second], axis=1)
    return [list(row) for row in decode_sweep(flow, latents, z).images]
