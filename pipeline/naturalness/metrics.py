"""Measures of naturalness in pure NumPy: distances between samples of numbers or features, and seams."""

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
    """How far the numbers of a sample must move to match a reference, in the unit of the samples."""

    below: float  # mean over quantiles of the distance by which the sample lies below the reference
    above: float  # mean over quantiles of the distance by which the sample lies above


class Resample(NamedTuple):
    """One bootstrap resample: rows drawn with replacement."""

    pairs: IntArray  # (n,) for all samples made from the pairs, so that pairs stay together
    originals: IntArray  # (m,) for the reference


@dataclass(frozen=True, kw_only=True)
class Resamples:
    """Bootstrap resamples, drawn on iteration; each depends only on (seed, its index)."""

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

    Both parts are means over all quantiles q in (0, 1) of max(0, ±(Q_sample(q) − Q_reference(q))). They are exact for
    any n and m, since quantile functions are step functions.

    Raises:
        ValueError: An array is empty or contains values that are not finite.

    Example:
        >>> import numpy as np
        >>> transport(np.array([1.0, 2.0]), np.array([1.5, 1.5]))
        Transport(below=0.25, above=0.25)
    """
    n, m = len(sample), len(reference)
    if not n or not m or not np.isfinite(sample).all() or not np.isfinite(reference).all():
        raise ValueError(f"a distance needs finite numbers in both samples; got samples of size {n} and {m}.")
    # Steps of both functions in units of 1/(n·m): integers, so that coinciding steps compare equal.
    ends = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)
    difference = np.sort(sample)[(ends - 1) // m] - np.sort(reference)[(ends - 1) // n]
    weights = np.diff(ends, prepend=0) / (n * m)
    return Transport(float(weights @ np.maximum(-difference, 0.0)), float(weights @ np.maximum(difference, 0.0)))


def interval(value: float, resampled: npt.NDArray[np.float64]) -> Interval:
    """Return a 95% confidence interval of a non-negative value, given its values on resamples, float (B,).

    Resampling increases distances, since the resamples add their own noise, so the lower 2.5% quantile of the resamples
    is not a lower bound. The interval therefore extends down by the same amount as up to the upper 2.5% quantile, but
    not below zero. It tends to be too wide, and contains zero if both samples have the same distribution.
    """
    high = max(float(np.quantile(resampled, (1.0 + _CONFIDENCE) / 2.0)), value)
    return Interval(value=value, low=max(2.0 * value - high, 0.0), high=high)


def frechet_distance(first: FloatArray, second: FloatArray) -> float:
    """Return the Fréchet distance of Gaussians fitted to two sets of features, float (n, F) and (m, F).

    d = |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2·(Σ₁^½ Σ₂ Σ₁^½)^½), with sample covariances. It is biased upwards, more
    so for fewer rows and more features, so compare only distances for equal numbers of rows.

    Raises:
        ValueError: An array has fewer than two rows, the widths differ, or a value is not finite.
    """
    if min(len(first), len(second)) < 2 or first.shape[1:] != second.shape[1:]:
        raise ValueError(f"expected at least 2 rows and equal widths, got shapes {first.shape} and {second.shape}.")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("features must be finite.")
    difference = first.mean(axis=0) - second.mean(axis=0)
    covariances = [np.atleast_2d(np.cov(cloud, rowvar=False)) for cloud in (first, second)]
    root = _square_root(covariances[0])
    # Use symmetric eigenvalues only: a general matrix root becomes complex if few rows make a covariance singular.
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ covariances[1] @ root), 0.0)).sum()
    spread = np.trace(covariances[0]) + np.trace(covariances[1]) - 2.0 * shared
    return float(max(difference @ difference + spread, 0.0))  # rounding may yield −1e-15 for equal inputs


def _square_root(covariance: FloatArray) -> FloatArray:
    values, vectors = np.linalg.eigh(covariance)
    root: FloatArray = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    return root


def border_gradients(images: npt.NDArray[np.uint8], regions: npt.NDArray[np.bool_]) -> tuple[FloatArray, FloatArray]:
    """Return the mean absolute difference of neighbouring pixels across region borders and within regions.

    Args:
        images: uint8 (N, H, W, C).
        regions: bool (N, H, W), the region of each pixel.

    Returns:
        Two float64 arrays (N,), in grey levels, averaged over horizontal and vertical neighbours and all channels: for
        neighbours in different regions (NaN if an image has none), and for neighbours in the same region.
    """
    values = images.astype(np.int16)
    sums = np.zeros((2, len(images)))
    counts = np.zeros((2, len(images)))
    for axis in (1, 2):
        steps = np.abs(np.diff(values, axis=axis)).mean(axis=3)
        crossing = np.diff(regions, axis=axis)
        for row, selected in enumerate((crossing, ~crossing)):
            sums[row] += np.where(selected, steps, 0.0).sum(axis=(1, 2))
            counts[row] += selected.sum(axis=(1, 2))
    across, inside = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    return across, inside
