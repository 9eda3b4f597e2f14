"""Measure samples of images and summarise the results.

All samples are measured as 8-bit images with the same noise below the evaluator's bits and the same bootstrap
resamples, so differences between methods come from the images alone.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import nn

from lsmix.classifiers.evaluation import features
from lsmix.data.errors import DivergedError
from lsmix.data.progress import stop_point
from lsmix.glow.flow import Flow
from lsmix.pipeline.config.results import Interval, SampleSummary
from lsmix.pipeline.config.schema import NaturalnessConfig
from lsmix.pipeline.naturalness.metrics import (
    Resamples,
    border_gradients,
    frechet_distance,
    interval,
    transport,
)
from lsmix.pipeline.naturalness.samples import Sample

__all__ = ["Scores", "measure", "summarise"]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """Measurements of the n images of a sample."""

    sample: Sample
    bits: FloatArray  # (n,) bits per dimension under the evaluator; may be infinite or NaN
    across: FloatArray  # (n,) gradient across the border of the regions; NaN if an image has none
    inside: FloatArray  # (n,) gradient inside the regions
    decode_failed: int | None
    share: float | None  # mean share of the second image
    features: FloatArray | None  # (n, F)
    shown: npt.NDArray[np.uint8]  # the first images, for the image sheet


def measure(
    sample: Sample, evaluator: Flow, classifier: nn.Module | None, config: NaturalnessConfig, *, count: int, shown: int
) -> Scores:
    """Create and measure the ``count`` images of a sample block by block; keep the first ``shown`` of them.

    Raises:
        DivergedError: Fewer than two images have a finite likelihood under the evaluator.
    """
    parts: list[tuple[FloatArray, ...]] = []
    clouds, shares, heads = [], [], []
    decode_failed = None
    for start in range(0, count, config.batch_size):
        stop_point()
        block = sample.block(slice(start, min(start + config.batch_size, count)))
        _, log_prob = evaluator.encode(
            block.images,
            dequantise=config.dequantise,
            batch_size=config.batch_size,
            seed=config.seed,
            first_index=start,
            return_log_prob=True,
        )
        parts.append((evaluator.bits_per_dim(log_prob), *border_gradients(block.images, block.regions)))
        if classifier is not None:
            clouds.append(features(classifier, block.images).astype(np.float64))
        if block.share is not None:
            shares.append(block.share)
        if block.decode_failed is not None:
            decode_failed = (decode_failed or 0) + int(block.decode_failed.sum())
        heads.append(block.images[: max(shown - start, 0)])
    bits, across, inside = (np.concatenate(column) for column in zip(*parts, strict=True))
    if np.isfinite(bits).sum() < 2:
        raise DivergedError(
            f"only {np.isfinite(bits).sum()} of {len(bits)} images of sample {sample.name!r} have a finite likelihood "
            "under the evaluator; expected at least 2. Train it longer or at a lower rate: 'naturalness.evaluator.training'."
        )
    return Scores(
        sample=sample,
        bits=bits,
        across=across,
        inside=inside,
        decode_failed=decode_failed,
        share=float(np.concatenate(shares).mean()) if shares else None,
        features=np.concatenate(clouds) if clouds else None,
        shown=np.concatenate(heads),
    )


def summarise(measured: Scores, reference: Scores, resamples: Resamples) -> SampleSummary:
    """Summarise the measurements of a sample relative to the held-out originals, using these resamples."""
    finite = np.isfinite(measured.bits)
    bits = measured.bits[finite]
    less, more = (None, None) if measured is reference else _distances(measured, reference, resamples)
    return SampleSummary(
        name=measured.sample.name,
        kind=measured.sample.kind,
        images=len(measured.bits),
        share=measured.share,
        decode_failed=measured.decode_failed,
        not_finite=int((~finite).sum()),
        mean_bits=float(bits.mean()),
        mean_bits_error=float(bits.std(ddof=1) / np.sqrt(len(bits))),
        less_likely=less,
        more_likely=more,
        distance=_sum(less, more),
        frechet=(
            frechet_distance(measured.features, reference.features)
            if measured is not reference and measured.features is not None and reference.features is not None
            else None
        ),
        seam=_seam(measured, resamples),
        seam_of=measured.sample.seam_of,
        bits_per_dim=tuple(float(value) if np.isfinite(value) else None for value in measured.bits),
    )


def _distances(measured: Scores, reference: Scores, resamples: Resamples) -> tuple[Interval, Interval]:
    own, other = measured.bits, reference.bits
    value = transport(own[np.isfinite(own)], other[np.isfinite(other)])
    values = []
    for resample in resamples:
        mixes, originals = own[resample.pairs], other[resample.originals]
        mixes, originals = mixes[np.isfinite(mixes)], originals[np.isfinite(originals)]
        if len(mixes) and len(originals):
            values.append(transport(mixes, originals))
    resampled = np.array(values)
    return interval(value.above, resampled[:, 1]), interval(value.below, resampled[:, 0])


def _sum(less: Interval | None, more: Interval | None) -> Interval | None:
    """Add both intervals; a bootstrap interval of the sum would too rarely contain zero for equal distributions."""
    if less is None or more is None:
        return None
    return Interval(value=less.value + more.value, low=less.low + more.low, high=less.high + more.high)


def _seam(measured: Scores, resamples: Resamples) -> Interval | None:
    has_border = np.isfinite(measured.across)
    inside = measured.inside.mean()
    if not has_border.any() or not inside > 0:
        return None
    sums = np.where(has_border, measured.across, 0.0)
    ratio = sums.sum() / has_border.sum() / inside
    resampled = [
        sums[rows].sum() / max(has_border[rows].sum(), 1) / max(measured.inside[rows].mean(), np.finfo(float).tiny)
        for rows in (resample.pairs for resample in resamples)
    ]
    return interval(float(ratio), np.array(resampled))
