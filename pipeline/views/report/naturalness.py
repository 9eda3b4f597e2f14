"""The chapter of the report on how natural mixes are: two tables, two plots, and the mixes themselves.

No column stands alone. What counts as likely need not look natural, so the words say so and the sheet is
beside the numbers.
"""

import numpy as np

from lsmix.data.artifact import Artifact
from lsmix.pipeline.config.results import (
    SHEET_DENSITY,
    SHEET_FILE,
    Interval,
    Naturalness,
    SampleFacts,
    read_naturalness,
)
from lsmix.pipeline.config.schema import HARD_CUT
from lsmix.pipeline.views.plots import distance_plot, spread_plot
from lsmix.pipeline.views.report.inputs import ReportInputs
from lsmix.pipeline.views.report.page import ReportFigure, Section, Table

__all__ = ["naturalness_section"]

_TITLE = "How natural is a mix?"
_NAMES = {"held-out": "originals, held out", "test": "originals, test", "sources": "originals, sources"}
_ELSEWHERE = "°"  # marks a seam that was measured along LS-Mix's border, where the method has none


def naturalness_section(material: ReportInputs) -> Section:
    """Return the chapter on what the naturalness stage found; an empty one where a recipe has no such stage."""
    item = material.inputs.get("naturalness")
    if item is None:
        return Section(title=_TITLE)
    result = read_naturalness(item)
    return Section(
        title=_TITLE,
        text=_text(result),
        tables=(_likelihood(result), _appearance(result)),
        figures=_figures(result, item),
    )


def _text(result: Naturalness) -> str:
    return (
        f"{result.pairs:,} pairs mixed at λ = {result.lam:g} by every method, against as many originals. The judge is a flow "
        "of its own, with another seed, that learned from the odd rows of the train split; the pairs are even rows. "
        "Bits per dimension alone mislead: grey and blurred images are more likely than photographs. So a mix passes for an "
        "original only where its whole distribution does, in both directions, and where it also looks like one."
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
        "Mean ± standard error. Less and more likely: by how many bits per dimension the quantiles of a sample lie above and "
        "below those of the held-out originals; their sum is the 1-Wasserstein distance. In brackets 95% confidence "
        f"intervals from {result.bootstrap:,} resamples. The other originals show how large a distance is by chance. A mix "
        "of two photographs averages their detail, so its distribution is narrower whatever the method: compare methods "
        "with the hard cut, too."
    ]
    parts += _paired(result)
    missing = sum(sample.not_finite for sample in result.samples)
    if missing:
        parts.append(f"Left out: {missing:,} images to which the judge gives no finite likelihood.")
    if result.pairs < result.pairs_asked:
        parts.append(f"{result.pairs_asked:,} pairs were asked for; there are no more held-out images or unseen pairs.")
    return Table(
        title="Likelihood under the judge",
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
    parts = ["Of x₂: share of the second image, as it really is; CutMix cuts off what sticks out of the image."]
    if result.features:
        parts.append(
            f"Fréchet: between Gaussians fitted to {result.features} features of this project's own classifier "
            f"{result.classifier}; not the FID, and biased upwards at so few images, so read it against that of the other "
            "originals. The classifier has seen the sources, not the test images."
        )
    parts.append(
        "Seam: mean step from pixel to pixel across the border between the two images, over that elsewhere, with its 95% "
        f"confidence interval. {_ELSEWHERE}: along the border of LS-Mix, where these have none: what a border costs by its "
        "place alone."
    )
    if any(sample.decode_failed for sample in result.samples):
        parts.append("Corrupted: decoded beyond the range of images, by the rule for pools; counted, and not left out.")
    return Table(
        title="Features and seams",
        columns=("sample", "of x₂", *(("Fréchet",) if result.features else ()), "seam", "decode_failed"),
        rows=tuple(rows),
        note=" ".join(parts),
    )


def _paired(result: Naturalness) -> list[str]:
    """Say what LS-Mix gains over the hard cut on the very same pairs, which tells more than two means."""
    found = {sample.name: np.array(sample.bits_per_dim, dtype=float) for sample in result.samples}
    if not {"ls-mix", HARD_CUT} <= found.keys():
        return []
    differences = found["ls-mix"] - found[HARD_CUT]
    differences = differences[np.isfinite(differences)]
    if len(differences) < 2:
        return []
    error = differences.std(ddof=1) / np.sqrt(len(differences))
    text = f"{differences.mean():+.3f} ± {error:.3f}".replace("-", "−")
    return [f"LS-Mix against the hard cut of the same pairs: {text} bits per dimension, mean ± standard error."]


def _figures(result: Naturalness, item: Artifact) -> tuple[ReportFigure, ...]:
    spreads = {_label(sample): np.array(sample.bits_per_dim, dtype=float) for sample in result.samples}
    distances = {
        _label(sample): (sample.more_likely, sample.less_likely)
        for sample in result.samples
        if sample.more_likely and sample.less_likely
    }
    return (
        ReportFigure(
            name="naturalness-bits",
            data=spread_plot(spreads, f"bits per dimension under the judge, {result.judge_bits} bits"),
            media="image/svg+xml",
            alt="How bits per dimension spread over originals and over the mixes of each method.",
            caption="Bits per dimension under the judge: 5% to 95% thin, the middle half thick, the median in figures. Shaded: "
            "the middle half of the held-out originals.",
        ),
        ReportFigure(
            name="naturalness-distance",
            data=distance_plot(distances, "bits per dimension: more likely than originals ← → less likely"),
            media="image/svg+xml",
            alt="Distance of each method from held-out originals, in both directions.",
            caption="Distance from the held-out originals: to the left what is too likely, smoother or greyer than photographs; "
            "to the right what is too unlikely. Lines: 95% confidence intervals.",
        ),
        ReportFigure(
            name="naturalness-sheet",
            data=item.file(SHEET_FILE).read_bytes(),
            media="image/png",
            alt="The first pairs, mixed by each method.",
            caption=f"The first pairs, mixed by each method at λ = {result.lam:g}; they are not chosen.",
            pixelated=True,
            density=SHEET_DENSITY,
        ),
    )


def _label(sample: SampleFacts) -> str:
    return _NAMES.get(sample.name, sample.name)


def _interval(one: Interval | None) -> str:
    return "–" if one is None else f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]"
