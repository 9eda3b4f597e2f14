"""Sweeps for the eye: one pair mixed at growing λ [P Fig. 4], one image whose latent is filled with zeros [P Fig. 3]."""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lsmix.glow.config import LatentOrder

if TYPE_CHECKING:
    from lsmix.data.latents import Latents
    from lsmix.data.pool import Pool
    from lsmix.glow.flow import Flow

__all__ = ["FIG3_RATES", "FIG4_RATES", "choose_pairs", "mix_sweep", "zero_sweep"]

Image = npt.NDArray[np.uint8]

# By their titles, unreduced as in the paper: λ of the columns of [P Fig. 4], share of zeros in those of [P Fig. 3].
FIG4_RATES = {f"{n}/16": Fraction(n, 16) for n in (2, 5, 7, 9, 11, 14)}
FIG3_RATES = {f"{n}/12": Fraction(n, 12) for n in range(1, 12)}


def choose_pairs(pool: "Pool", count: int) -> list[tuple[int, int]]:
    """Return the sources of the first rows of a pool whose two classes differ, or of the first rows where none do."""
    rows = np.arange(min(len(pool), 64 * count))
    differ = pool.label_a[: len(rows)] != pool.label_b[: len(rows)]
    chosen = [*rows[differ], *rows[~differ]][:count]
    return [(int(pool.source_a[row]), int(pool.source_b[row])) for row in chosen]


def mix_sweep(
    flow: "Flow",
    latents: "Latents",
    pairs: Sequence[tuple[int, int]],
    *,
    method: str = "ls-mix",
    rates: Iterable[Fraction] = FIG4_RATES.values(),
) -> list[list[Image]]:
    """Return a row for each pair of source rows: x₁, the mixes at growing λ, x₂; all decoded from latents."""
    from lsmix.glow.mixing import mix_latents

    first = latents.z.gather([pair[0] for pair in pairs])
    second = latents.z.gather([pair[1] for pair in pairs])
    order = latents.attributes["order"]
    columns = [flow.decode(first, order=order)]
    for rate in rates:
        z, _ = mix_latents(method, first, second, float(rate), seed=0)
        columns.append(flow.decode(z, order=order))
    columns.append(flow.decode(second, order=order))
    return [list(row) for row in zip(*columns, strict=True)]


def zero_sweep(
    flow: "Flow", latents: "Latents", rows: Sequence[int], *, rates: Iterable[Fraction] = FIG3_RATES.values()
) -> list[list[Image]]:
    """Return a row for each source row: x, then with a growing share of its last latent components set to zero."""
    from lsmix.glow.mixing import zero_fill

    z = latents.z.gather(list(rows))
    order: LatentOrder = latents.attributes["order"]
    columns = [flow.decode(z, order=order)]
    columns += [flow.decode(zero_fill(z, int(rate * flow.dim)), order=order) for rate in rates]
    return [list(row) for row in zip(*columns, strict=True)]
