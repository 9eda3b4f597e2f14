"""Error rates of a comparison: the last epoch's error of every seed, their mean and sample standard deviation."""

import math
import statistics
from collections.abc import Mapping, Sequence

import msgspec

from lsmix.data.manifest import Manifest

__all__ = ["RunSummary", "summarise_runs"]

_BASELINE = "baseline"  # the run of this name is what the others are compared with


class RunSummary(msgspec.Struct, frozen=True, kw_only=True):
    """The error rates of one way of training, over its seeds."""

    label: str  # as shown, such as "lsmix"
    errors: tuple[float, ...]  # % of test images, last epoch, one for each seed; empty where none is done
    baseline: bool = False  # whether the others are compared with it
    images: int = 0  # seen by each seed
    updates: int = 0  # done by each seed

    @property
    def mean(self) -> float:
        """Mean error rate in %; NaN without any."""
        return statistics.fmean(self.errors) if self.errors else math.nan

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the seeds in %; None below two seeds."""
        return statistics.stdev(self.errors) if len(self.errors) > 1 else None

    @property
    def text(self) -> str:
        """The result as the paper prints it, such as "4.01 ± 0.12", or "–" where there is none."""
        if not self.errors:
            return "–"
        return f"{self.mean:.2f}" if self.std is None else f"{self.mean:.2f} ± {self.std:.2f}"


def summarise_runs(runs: Mapping[str, Sequence[Manifest]]) -> list[RunSummary]:
    """Return a summary for each run from the manifests of its seeds, by name."""
    return [
        RunSummary(
            label=name,
            errors=tuple(float(manifest.counts["test_error"]) for manifest in manifests),
            baseline=name == _BASELINE,
            images=int(manifests[0].counts["images"]),
            updates=int(manifests[0].counts["updates"]),
        )
        for name, manifests in runs.items()
    ]
