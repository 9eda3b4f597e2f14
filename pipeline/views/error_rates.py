"""Error rates of training runs: the last epoch's error of every seed, and the paired difference from the baseline."""

import math
import re
import statistics
from collections.abc import Mapping

import msgspec
import numpy as np
from numpy.typing import NDArray

from lsmix.data.artifact import Artifact
from lsmix.data.errors import CorruptError
from lsmix.pipeline.config.results import Interval, Seen, read_predictions
from lsmix.pipeline.config.schema import RowText

__all__ = ["RunSummary", "paired_difference", "summarise_runs"]

_BASELINE = "baseline"  # the name of the run that all others are compared with
# 97.5% quantiles of Student's t at 1 to 10 degrees of freedom.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class RunSummary(msgspec.Struct, frozen=True, kw_only=True):
    """The error rates of one training run over its seeds."""

    name: str = ""  # in the recipe, such as "lsmix"
    label: str  # display name, such as "LS-Mix (α = 0.4)"
    errors: tuple[float, ...]  # % of test images after the last epoch, one per seed; empty if no seed has finished
    difference: Interval | None = None  # from the baseline's error in points, see ``paired_difference``; may be missing
    baseline: bool = False  # whether this is the run that all others are compared with
    images: int = 0  # per seed
    updates: int = 0  # per seed
    seen: tuple[Seen, ...] = ()  # how often the images of each source were seen
    paper: str = ""  # the error rate as printed in the paper, such as "2.45 ± 0.061"

    @property
    def mean(self) -> float:
        """The mean error rate in %; NaN without results."""
        return statistics.fmean(self.errors) if self.errors else math.nan

    @property
    def std(self) -> float | None:
        """The sample standard deviation over the seeds in %; None for fewer than two seeds."""
        return statistics.stdev(self.errors) if len(self.errors) > 1 else None

    @property
    def verdict(self) -> str:
        """The comparison with the baseline, by whether the interval of ``difference`` contains 0; "" without one."""
        if self.difference is None:
            return ""
        if self.difference.low <= 0.0 <= self.difference.high:
            return "no difference can be seen"
        return "better" if self.difference.value < 0.0 else "worse"

    @property
    def paper_mean(self) -> float | None:
        """The paper's error rate in % as a number; None if ``paper`` does not begin with a number."""
        number = re.match(r"\s*(\d+(\.\d+)?)", self.paper)
        return float(number.group(1)) if number else None

    @property
    def text(self) -> str:
        """The result in the paper's notation, such as "4.01 ± 0.12", or "–" without results."""
        if not self.errors:
            return "–"
        return f"{self.mean:.2f}" if self.std is None else f"{self.mean:.2f} ± {self.std:.2f}"


def paired_difference(wrong: NDArray[np.bool_], baseline: NDArray[np.bool_]) -> Interval | None:
    """Return the difference from the baseline's error in points, with its 95% interval; None for fewer than two seeds.

    Both arguments are bool (S, N), with the same seeds and test images: whether the classifier of a seed is wrong on an
    image. The interval accounts for variation over seeds and over test images: both variances are added, and Student's
    t uses the Welch–Satterthwaite degrees of freedom. A bootstrap interval over so few seeds would be too narrow.

    Example:
        >>> import numpy as np
        >>> paired_difference(np.eye(2, 8) > 0, np.zeros((2, 8)) > 0).value
        12.5
    """
    seeds, images = wrong.shape
    if seeds < 2 or images < 2:
        return None
    points = 100.0 * (wrong.astype(float) - baseline)
    # Of the mean, over seeds and over images.
    variances = [float(points.mean(axis=axis).var(ddof=1)) / count for axis, count in ((1, seeds), (0, images))]
    total = sum(variances)
    freedom = total**2 / (variances[0] ** 2 / (seeds - 1) + variances[1] ** 2 / (images - 1)) if total else 1.0
    half = _student(freedom) * total**0.5
    mean = float(points.mean())
    return Interval(value=mean, low=mean - half, high=mean + half)


def _student(freedom: float) -> float:
    """Return the 97.5% quantile of Student's t: from the table, or for 11 and more by the Cornish–Fisher expansion."""
    whole = int(freedom + 1e-9)
    return _STUDENT[whole - 1] if whole <= len(_STUDENT) else 1.960 + 2.372 / whole + 2.823 / whole**2


def summarise_runs(runs: Mapping[str, Mapping[int, Artifact]], texts: Mapping[str, RowText]) -> list[RunSummary]:
    """Return a summary of each run, from its trainings by seed and its texts in the recipe."""
    wrong = {name: {seed: _wrong(item) for seed, item in trainings.items()} for name, trainings in runs.items()}
    summaries = []
    for name, trainings in runs.items():
        first = next(iter(trainings.values())).manifest.counts
        summaries.append(
            RunSummary(
                name=name,
                label=texts[name].label or name,
                errors=tuple(float(item.manifest.counts["test_error"]) for item in trainings.values()),
                difference=_difference(wrong[name], wrong.get(_BASELINE, {})) if name != _BASELINE else None,
                baseline=name == _BASELINE,
                images=int(first["images"]),
                updates=int(first["updates"]),
                seen=tuple(msgspec.convert(first.get("seen", []), list[Seen])),
                paper=texts[name].paper,
            )
        )
    return summaries


def _wrong(training: Artifact) -> NDArray[np.bool_]:
    predictions = read_predictions(training)
    return np.not_equal(predictions.predicted, predictions.labels)


def _difference(wrong: Mapping[int, NDArray[np.bool_]], baseline: Mapping[int, NDArray[np.bool_]]) -> Interval | None:
    seeds = [seed for seed in wrong if seed in baseline]
    both = [[one[seed] for seed in seeds] for one in (wrong, baseline)]
    if len({len(images) for one in both for images in one}) > 1:
        raise CorruptError("The runs have predictions for different numbers of test images. Train them again.")
    return paired_difference(*map(np.stack, both)) if seeds else None
