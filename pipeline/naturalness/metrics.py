"""Measures of naturalness in pure NumPy: distances of samples of numbers and of features, and seams."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lsmix.data.rng import generator
from lsmix.pipeline.config.results import Interval

__all__ = ["Resample", "Resamples", "Transport", "border_gradients", "frechet_distance", "interval", "transport"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
_CONFIDENCE = 0.95


class Transport(NamedTuple):
    """How far the numbers of one sample would have to be moved to be those of a reference; their unit is the samples'."""

    below: float  # mean over quantiles of how far the sample's are below the reference's
    above: float  # mean over quantiles of how far they are above


class Resample(NamedTuple):
    """One bootstrap resample: rows drawn with replacement."""

    pairs: IntArray  # (n,) of everything that was made from the pairs, so that pairs stay together
    originals: IntArray  # (m,) of the reference


@dataclass(frozen=True, kw_only=True)
class Resamples:
    """Bootstrap resamples, drawn again in each iteration over them; each depends on (seed, its number) alone."""

    count: int
    pairs: int  # n
    originals: int  # m
    seed: int

    def __iter__(self) -> Iterator[Resample]:
        for number in range(self.count):
            draws = generator(self.seed, "naturalness", "bootstrap", number)
            pairs = draws.integers(0, self.pairs, self.pairs)
            yield Resample(pairs, draws.integers(0, self.originals, self.originals))


def transport(sample: FloatArray, reference: FloatArray) -> Transport:
    """Return the distance of a sample, float (n,), from a reference, float (m,), in each direction.

    Both parts are means over all quantiles q in (0, 1) of max(0, ±(Q_sample(q) − Q_reference(q))), exact for any n and m:
    quantile functions are steps, and between two steps of either nothing changes.

    Raises:
        ValueError: one has no numbers, or one that is not finite.

    Example:
        >>> import numpy as np
        >>> transport(np.array([1.0, 2.0]), np.array([1.5, 1.5]))
        Transport(below=0.25, above=0.25)
    """
    n, m = len(sample), len(reference)
    if not n or not m or not np.isfinite(sample).all() or not np.isfinite(reference).all():
        raise ValueError(f"a distance needs finite numbers on both sides; got samples of {n} and {m}.")
    # Steps of both, in units of 1/(n·m), so that integers show where they coincide.
    ends = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)
    difference = np.sort(sample)[(ends - 1) // m] - np.sort(reference)[(ends - 1) // n]
    weights = np.diff(ends, prepend=0) / (n * m)
    return Transport(float(weights @ np.maximum(-difference, 0.0)), float(weights @ np.maximum(difference, 0.0)))


def interval(value: float, resampled: npt.NDArray[np.float64]) -> Interval:
    """Return a 95% confidence interval around a value that cannot be negative, from its values on resamples, float (B,).

    A distance grows under resampling, since the resamples' noise comes to the samples' own; their lower 2.5% then say
    nothing of how small the true one may be. So the interval reaches as far down as it reaches up, to the upper 2.5%, and
    not below zero: it errs on the wide side, and holds zero where two samples of one distribution are compared.
    """
    high = max(float(np.quantile(resampled, (1.0 + _CONFIDENCE) / 2.0)), value)
    return Interval(value=value, low=max(2.0 * value - high, 0.0), high=high)


def frechet_distance(first: FloatArray, second: FloatArray) -> float:
    """Return the Fréchet distance of the Gaussians fitted to two clouds of features, float (n, F) and (m, F).

    d = |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2·(Σ₁^½ Σ₂ Σ₁^½)^½), with sample covariances. It is biased upwards, by more the fewer
    rows and the more features there are; compare only distances of equally many rows.

    Raises:
        ValueError: a cloud has fewer than two rows, the widths differ, or a number is not finite.
    """
    if min(len(first), len(second)) < 2 or first.shape[1:] != second.shape[1:]:
        raise ValueError(f"expected two clouds of at least 2 rows and one width; got {first.shape} and {second.shape}.")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("features must be finite.")
    difference = first.mean(axis=0) - second.mean(axis=0)
    covariances = [np.atleast_2d(np.cov(cloud, rowvar=False)) for cloud in (first, second)]
    root = _square_root(covariances[0])
    # Symmetric eigenvalues throughout: a general matrix root turns complex when few rows leave a covariance singular.
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ covariances[1] @ root), 0.0)).sum()
    spread = np.trace(covariances[0]) + np.trace(covariances[1]) - 2.0 * shared
    return float(max(difference @ difference + spread, 0.0))  # rounding may leave −1e-15 of equal clouds


def _square_root(covariance: FloatArray) -> FloatArray:
    values, vectors = np.linalg.eigh(covariance)
    root: FloatArray = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    return root


def border_gradients(images: npt.NDArray[np.uint8], regions: npt.NDArray[np.bool_]) -> tuple[FloatArray, FloatArray]:
    """Return the mean absolute step from pixel to pixel across the borders of regions, and off them.

    Args:
        images: uint8 (N, H, W, C).
        regions: bool (N, H, W), which of two regions a pixel belongs to.

    Returns:
        Two float64 (N,), in grey levels, over all neighbours in rows and columns and all channels: of neighbours in
        different regions (NaN where an image has none), and of neighbours in one region.
    """
    values = images.astype(np.int16)
    sums = np.zeros((2, len(images)))
    counts = np.zeros((2, len(images)))
    for axis in (1, 2):
        steps = np.abs(np.diff(values, axis=axis)).mean(axis=3)
        crossing = np.diff(regions, axis=axis)
        for place, chosen in enumerate((crossing, ~crossing)):
            sums[place] += np.where(chosen, steps, 0.0).sum(axis=(1, 2))
            counts[place] += chosen.sum(axis=(1, 2))
    across, inside = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    return across, inside
