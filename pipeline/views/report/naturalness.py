"""The report's section on how natural mixes are: two tables, two plots, and the mixes themselves.

A likely mix need not look natural, so the text says so, and pictures are beside the numbers.
"""

from collections.abc import Iterator

import numpy as np

from lsmix.data.artifact import Artifact
from lsmix.pipeline.config.results import SHEET_FILE, Interval, Naturalness, SampleSummary, read_naturalness
from lsmix.pipeline.config.schema import HARD_CUT
from lsmix.pipeline.views.page import Figure, Section, Table
from lsmix.pipeline.views.plots import distance_plot, spread_plot
from lsmix.pipeline.views.report.inputs import ReportInputs

__all__ = ["naturalness_section"]

_NAMES = {"held-out": "originals, held out", "test": "originals, test", "sources": "originals, sources"}
_ELSEWHERE = "°"  # marks a seam that was measured along LS-Mix's border, where the method has none


def naturalness_section(inputs: ReportInputs) -> Iterator[Section]:
    """Return the section on the results of the naturalness stage; none where a recipe has no such stage."""
    item = inputs.artifacts.get("naturalness")
    if item is not None:
        result = read_naturalness(item)
        items: list[Table | Figure] = [*_figures(result, item), _likelihood(result), _appearance(result)]
        yield Section(title="How natural is a mix?", text=_text(result), items=items, folded=True)


def _text(result: Naturalness) -> str:
    return (
        f"{result.pairs:,} pairs mixed at λ = {result.lam:g} by every method, compared with as many originals. The evaluator "
        "flow is trained for this alone, with another seed, on the odd rows of the train split; the pairs are even rows. "
        "Bits per dimension alone mislead: grey and blurred images are more likely than photographs. A method makes "
        "natural mixes only if their whole distribution fits that of originals, in both directions, and if they look natural."
    )


def _likelihood(result: Naturalness) -> Table:
    rows = [
        (
            _label(sample),
            f"{sample.mean_bits:.3f} ± {sample.mean_bits_error:.3f}",
            *(_interval(one) for one in (sample.less_likely, sample.more_likely, sample.distance)),
        )
        for sample in result.samples
    ]
    parts = [
        "Mean ± standard error. Less and more likely: by how many bits per dimension the quantiles of a sample are above and "
        "below those of the held-out originals; their sum is the 1-Wasserstein distance. In brackets: 95% confidence "
        f"intervals from {result.bootstrap:,} resamples. The other originals show how large a distance is by chance. A mix "
        "of two photographs averages their detail, so every method has a narrower distribution: compare methods with the "
        "hard cut, too."
    ]
    parts += _paired(result)
    missing = sum(sample.not_finite for sample in result.samples)
    if missing:
        parts.append(f"Left out: {missing:,} images without a finite likelihood under the evaluator flow.")
    if result.pairs < result.pairs_asked:
        parts.append(f"{result.pairs_asked:,} pairs were requested; there are no more held-out images or unseen pairs.")
    return Table(
        title="Likelihood under the evaluator flow",
        columns=("sample", "bits per dimension", "less likely by", "more likely by", "distance"),
        rows=tuple(rows),
        note=" ".join(parts),
    )


def _appearance(result: Naturalness) -> Table:
    rows = []
    for sample in result.samples:
        mark = _ELSEWHERE if sample.seam and sample.seam_of == "ls-mix" else ""
        frechet = ("–" if sample.frechet is None else f"{sample.frechet:.2f}",) if result.features else ()
        rows.append(
            (
                _label(sample),
                "–" if sample.share is None else f"{100 * sample.share:.1f} %",
                *frechet,
                _interval(sample.seam) + mark,
                "–" if sample.decode_failed is None else f"{sample.decode_failed:,}",
            )
        )
    parts = ["Of x₂: share of the second image that was taken; CutMix cuts its box off at the border of the image."]
    if result.features:
        parts.append(
            f"Fréchet: between Gaussians fitted to {result.features} features of this project's own classifier "
            f"{result.classifier}. It is not the FID, and biased upwards at so few images, so compare it with that of the other "
            "originals. The classifier was trained on the sources, not on the test images."
        )
    parts.append(
        "Seam: mean step from pixel to pixel across the border between the two images, divided by that elsewhere, with its 95% "
        f"confidence interval. {_ELSEWHERE}: the method has no border, so this is measured along that of LS-Mix: it shows "
        "the effect of the position alone."
    )
    if any(sample.decode_failed for sample in result.samples):
        parts.append(
            "Failed to decode: by the rule for pools, decoded beyond the range of images; these are counted and not left out."
        )
    return Table(
        title="Features and seams",
        columns=("sample", "of x₂", *(("Fréchet",) if result.features else ()), "seam", "failed to decode"),
        rows=tuple(rows),
        note=" ".join(parts),
    )


def _paired(result: Naturalness) -> list[str]:
    """Compare LS-Mix with the hard cut pair by pair, which is more exact than a comparison of two means."""
    found = {sample.name: np.array(sample.bits_per_dim, dtype=float) for sample in result.samples}
    if not {"ls-mix", HARD_CUT} <= found.keys():
        return []
    differences = found["ls-mix"] - found[HARD_CUT]
    differences = differences[np.isfinite(differences)]
    if len(differences) < 2:
        return []
    error = differences.std(ddof=1) / np.sqrt(len(differences))
    text = f"{differences.mean():+.3f} ± {error:.3f}".replace("-", "−")
    return [f"LS-Mix compared with the hard cut of the same pairs: {text} bits per dimension, mean ± standard error."]


def _figures(result: Naturalness, item: Artifact) -> tuple[Figure, ...]:
    spreads = {_label(sample): np.array(sample.bits_per_dim, dtype=float) for sample in result.samples}
    distances = {
        _label(sample): (sample.more_likely, sample.less_likely)
        for sample in result.samples
        if sample.more_likely and sample.less_likely
    }
    return (
        Figure(
            name="naturalness-sheet",
            data=item.file(SHEET_FILE).read_bytes(),
            alt="The first pairs, mixed by each method.",
            caption=f"The first pairs, mixed by each method at λ = {result.lam:g}; they are not selected.",
        ),
        Figure(
            name="naturalness-bits",
            data=spread_plot(spreads, f"bits per dimension, {result.evaluator_bits} bits"),
            alt="Distribution of bits per dimension of originals and of the mixes of each method.",
            caption="Bits per dimension under the evaluator flow: 5% to 95% thin, the middle half thick, the median as a "
            "number. Shaded: the middle half of the held-out originals.",
        ),
        Figure(
            name="naturalness-distance",
            data=distance_plot(distances, "bits per dimension: too likely ← → too unlikely"),
            alt="Distance of each method from held-out originals, in both directions.",
            caption="Distance from the held-out originals: on the left too likely, smoother or greyer than photographs; on "
            "the right too unlikely. Lines: 95% confidence intervals.",
        ),
    )


def _label(sample: SampleSummary) -> str:
    return _NAMES.get(sample.name, sample.name)


def _interval(one: Interval | None) -> str:
    return "–" if one is None else f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]"
