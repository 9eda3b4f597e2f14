"""Error rates of a comparison: the last epoch's error of every seed, their mean and sample standard deviation."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence

import msgspec

from lsmix.data.artifact import Manifest
from lsmix.pipeline.config.results import Seen
from lsmix.pipeline.config.schema import RowText

__all__ = ["RunSummary", "summarise_runs"]

_BASELINE = "baseline"  # the run of this name is what the others are compared with


class RunSummary(msgspec.Struct, frozen=True, kw_only=True):
    """The error rates of one way of training, over its seeds."""

    name: str = ""  # in the recipe, such as "lsmix"
    label: str  # as shown, such as "LS-Mix (α = 0.4)"
    errors: tuple[float, ...]  # % of test images, last epoch, one for each seed; empty where none is done
    baseline: bool = False  # whether the others are compared with it
    images: int = 0  # seen by each seed
    updates: int = 0  # done by each seed
    seen: tuple[Seen, ...] = ()  # how often each source's images were seen
    paper: str = ""  # the paper's figure, as printed, such as "2.45 ± 0.061"

    @property
    def mean(self) -> float:
        """Mean error rate in %; NaN without any."""
        return statistics.fmean(self.errors) if self.errors else math.nan

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the seeds in %; None below two seeds."""
        return statistics.stdev(self.errors) if len(self.errors) > 1 else None

    @property
    def paper_mean(self) -> float | None:
        """The paper's figure as a number, in %; None where there is none, or it does not begin with one."""
        number = re.match(r"\s*(\d+(\.\d+)?)", self.paper)
        return float(number.group(1)) if number else None

    @property
    def text(self) -> str:
        """The result as the paper prints it, such as "4.01 ± 0.12", or "–" where there is none."""
        if not self.errors:
            return "–"
        return f"{self.mean:.2f}" if self.std is None else f"{self.mean:.2f} ± {self.std:.2f}"


def summarise_runs(
    runs: Mapping[str, Sequence[Manifest]], texts: Mapping[str, RowText] | None = None
) -> list[RunSummary]:
    """Return a summary for each run from the manifests of its seeds, by name, with what the recipe says of it."""
    return [_summary(name, manifests, (texts or {}).get(name, RowText())) for name, manifests in runs.items()]


def _summary(name: str, manifests: Sequence[Manifest], text: RowText) -> RunSummary:
    first = manifests[0].counts
    return RunSummary(
        name=name,
        label=text.label or name,
        errors=tuple(float(manifest.counts["test_error"]) for manifest in manifests),
        baseline=name == _BASELINE,
        images=int(first["images"]),
        updates=int(first["updates"]),
        seen=tuple(msgspec.convert(first.get("seen", []), list[Seen])),
        paper=text.paper,
    )
