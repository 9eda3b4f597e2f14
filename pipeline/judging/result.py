"""What the naturalness stage found, as it stands in ``naturalness.json``.

The one rule: a number that is not finite is null, and is counted; nothing is left out without being told.
"""

from pathlib import Path
from typing import Literal

import msgspec

from lsmix.data.durable import write_durably
from lsmix.data.errors import CorruptError, MissingError
from lsmix.data.versioned import UNDECODABLE, decode_versioned, read_small

__all__ = ["NATURALNESS_FILE", "Interval", "Naturalness", "SampleFacts", "read_naturalness", "write_naturalness"]

NATURALNESS_FILE = "naturalness.json"
_FORMAT = 1


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """A value with its 95% confidence interval."""

    value: float
    low: float
    high: float


class SampleFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What was found of one sample of images: those of a method, or originals."""

    name: str  # of the method; "held-out", "test" or "sources" for originals
    kind: Literal["original", "latent", "pixel"]  # where its images were mixed, if they were
    images: int
    share: float | None  # of the second image, as it really is, mean; None for originals
    corrupted: int | None  # of them, by the rule for pools; None where nothing was decoded
    not_finite: int  # of their bits per dimension; these images are left out of the next five
    mean_bits: float  # bits per dimension under the judge
    mean_bits_error: float  # standard error of it
    less_likely: (
        Interval | None
    )  # bits per dimension by which its quantiles exceed the held-out originals'; None: itself
    more_likely: Interval | None  # the same by which they fall short
    distance: Interval | None  # 1-Wasserstein distance, the sum of both
    frechet: float | None  # of the classifier's features to the held-out originals'; None without a classifier
    seam: Interval | None  # gradient across the border of regions over that inside; None where there is no border
    seam_of: Literal["own", "ls-mix"]  # whose regions these are; those of LS-Mix are a control: no border is expected
    bits_per_dim: tuple[float | None, ...]  # of every image


class Naturalness(msgspec.Struct, frozen=True, kw_only=True):
    """All of ``naturalness.json``."""

    format_version: int = _FORMAT
    lam: float  # share asked of the second image
    pairs: int  # n, images in every sample
    pairs_asked: int
    bootstrap: int  # resamples behind the intervals
    judge_bits: int  # bits per value of the images that the judge models
    classifier: str  # the training whose features were compared; "" for none
    features: int  # F, their number; 0 for none
    samples: tuple[SampleFacts, ...]  # held-out originals first

    def __getitem__(self, name: str) -> SampleFacts:
        """Return the sample of a name."""
        for sample in self.samples:
            if sample.name == name:
                return sample
        raise KeyError(f"{name!r} is none of the samples {', '.join(sample.name for sample in self.samples)}")


def write_naturalness(folder: Path, result: Naturalness) -> None:
    """Write the result into an artifact's folder."""
    write_durably(folder / NATURALNESS_FILE, msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")


def read_naturalness(folder: Path) -> Naturalness:
    """Read the result in an artifact's folder.

    Raises:
        MissingError: there is none.
        FormatError: it is of a format that this version does not read.
        CorruptError: it is damaged.
    """
    path = folder / NATURALNESS_FILE
    if not path.is_file():
        raise MissingError(f"no {NATURALNESS_FILE} in {str(folder)!r}. Make it with 'lsmix naturalness'.")
    try:
        remedy = "Use a newer lsmix, or make it again with 'lsmix naturalness'."
        return decode_versioned(read_small(path), Naturalness, _FORMAT, what=f"{str(path)!r} has", remedy=remedy)
    except UNDECODABLE as error:
        raise CorruptError(f"{str(path)!r} is damaged: {error}. Make it again with 'lsmix naturalness'.") from error
