"""The report's section on how natural the mixes are: two tables, two plots, and the mixes themselves.

A mix with a high likelihood may still look unnatural, so the section shows images next to the numbers.
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
_ELSEWHERE = "°"  # marks seams measured along the border of LS-Mix, for methods without a border


def naturalness_section(inputs: ReportInputs) -> Iterator[Section]:
    """Yield the section on the results of the naturalness stage, if the recipe has that stage."""
    item = inputs.artifacts.get("naturalness")
    if item is not None:
        result = read_naturalness(item)
        items: list[Table | Figure] = [*_figures(result, item), _likelihood(result), _appearance(result)]
        yield Section(title="How natural is a mix?", text=_text(result), items=items, folded=True)


def _text(result: Naturalness) -> str:
    return (
        f"Every method mixes the same {result.pairs:,} pairs at λ = {result.lam:g}; the mixes are compared with as "
        "many originals. A separate evaluator flow measures likelihood. It is trained with another seed on the odd rows "
        "of the train split; the pairs are even rows. Do not judge by bits per dimension alone: grey and blurred images "
        "are more likely than photographs. The mixes of a method are natural only if their likelihoods have the same "
        "distribution as the likelihoods of originals, neither lower nor higher, and if the images look natural."
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
        "Bits per dimension: mean ± standard error. Less likely by, more likely by: how many bits per dimension the "
        "quantiles of a sample are above and below the quantiles of the held-out originals. Distance: the sum of both, "
        f"the 1-Wasserstein distance. Brackets: 95% confidence intervals from {result.bootstrap:,} resamples. The rows "
        "with other originals show which distances arise by chance. A mix of two photographs averages their detail, so "
        "every method has a narrower distribution. Therefore also compare methods with hard-cut, the control for "
        "LS-Mix, which takes the pixels of x₂ in the regions where LS-Mix takes the latents of x₂."
    ]
    parts += _paired(result)
    missing = sum(sample.not_finite for sample in result.samples)
    if missing:
        parts.append(f"{missing:,} images without a finite likelihood under the evaluator flow are left out.")
    if result.pairs < result.pairs_asked:
        parts.append(f"{result.pairs_asked:,} pairs were requested; there are too few held-out images or unseen pairs.")
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
    parts = ["Of x₂: the share of the second image in the mix, smaller for CutMix boxes clipped at the border."]
    if result.features:
        parts.append(
            f"Fréchet: the Fréchet distance between Gaussians fitted to {result.features} features of the recipe's own "
            f"classifier {result.classifier}. It is not the FID, and it is biased upwards for so few images, so compare "
            "it with the value of the other originals. The classifier was trained on the source images, not on the test "
            "images."
        )
    parts.append(
        "Seam: the mean difference between adjacent pixels across the border between the two images, divided by the "
        f"mean difference elsewhere, with its 95% confidence interval. {_ELSEWHERE}: the method has no border, so the "
        "seam is measured along the border of LS-Mix and shows the effect of the position only."
    )
    if any(sample.decode_failed for sample in result.samples):
        parts.append(
            "Failed to decode: number of mixes with pixels far outside the valid range, by the rule for pools. They "
            "are included in all other numbers."
        )
    return Table(
        title="Features and seams",
        columns=("sample", "of x₂", *(("Fréchet",) if result.features else ()), "seam", "failed to decode"),
        rows=tuple(rows),
        note=" ".join(parts),
    )


def _paired(result: Naturalness) -> list[str]:
    """Compare LS-Mix with the hard cut pair by pair, which is more precise than comparing two means."""
    found = {sample.name: np.array(sample.bits_per_dim, dtype=float) for sample in result.samples}
    if not {"ls-mix", HARD_CUT} <= found.keys():
        return []
    differences = found["ls-mix"] - found[HARD_CUT]
    differences = differences[np.isfinite(differences)]
    if len(differences) < 2:
        return []
    error = differences.std(ddof=1) / np.sqrt(len(differences))
    text = f"{differences.mean():+.3f} ± {error:.3f}".replace("-", "−")
    return [f"LS-Mix minus hard-cut on the same pairs: {text} bits per dimension, mean ± standard error."]


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
            alt="The first pairs of images, mixed by each method.",
            caption=f"The first pairs, mixed by each method at λ = {result.lam:g}. The pairs are not hand-picked.",
        ),
        Figure(
            name="naturalness-bits",
            data=spread_plot(spreads, f"bits per dimension, {result.evaluator_bits} bits"),
            alt="Distribution of bits per dimension for originals and for the mixes of each method.",
            caption="Bits per dimension under the evaluator flow. Thin lines: 5% to 95%; thick lines: the middle half; "
            "numbers: medians; shaded: the middle half of the held-out originals.",
        ),
        Figure(
            name="naturalness-distance",
            data=distance_plot(distances, "bits per dimension: too likely ← → too unlikely"),
            alt="Distance of each method from the held-out originals, in both directions.",
            caption="Distance from the held-out originals. Left: too likely (smoother or greyer than photographs). "
            "Right: too unlikely. Lines: 95% confidence intervals.",
        ),
    )


def _label(sample: SampleSummary) -> str:
    return _NAMES.get(sample.name, sample.name)


def _interval(one: Interval | None) -> str:
    return "–" if one is None else f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]"
