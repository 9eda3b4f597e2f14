"""The results that stages write: training logs, error rates, naturalness. Reading checks sizes and types."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from lsmix.data.artifact import Artifact
from lsmix.data.atomic import DECODE_ERRORS, decode_versioned, read_small, write_atomic
from lsmix.data.errors import CorruptError, MissingError

__all__ = [
    "DATASET_FILE",
    "LOG_FILE",
    "METRICS_FILE",
    "NATURALNESS_FILE",
    "PREDICTIONS_FILE",
    "SHEET_FILE",
    "WEIGHTS_FILE",
    "EpochMetrics",
    "Interval",
    "LogLine",
    "Naturalness",
    "Predictions",
    "SampleSummary",
    "Seen",
    "read_log",
    "read_metrics",
    "read_naturalness",
    "read_predictions",
    "write_naturalness",
]

DATASET_FILE = "dataset.h5"
LOG_FILE = "log.jsonl"
METRICS_FILE = "metrics.json"
NATURALNESS_FILE = "naturalness.json"
PREDICTIONS_FILE = "predictions.json"
SHEET_FILE = "sheet.png"
WEIGHTS_FILE = "classifier.safetensors"
_FORMAT = 2
_Result = TypeVar("_Result")


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """A value with its 95% confidence interval."""

    value: float
    low: float
    high: float


class SampleSummary(msgspec.Struct, frozen=True, kw_only=True):
    """The measures of one sample of images: those of a method, or originals."""

    name: str  # of the method; "held-out", "test" or "sources" for originals
    kind: Literal["original", "latent", "pixel"]  # where its images were mixed, if they were
    images: int
    share: float | None  # of the second image, as it really is, mean; None for originals
    decode_failed: int | None  # of them, by the rule for pools; None where nothing was decoded
    not_finite: int  # of their bits per dimension; these images are left out of the next five
    mean_bits: float  # bits per dimension under the evaluator
    mean_bits_error: float  # standard error of it
    # Bits per dimension by which its quantiles exceed the held-out originals'; None for these themselves.
    less_likely: Interval | None
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
    evaluator_bits: int  # bits per value of the images that the evaluator models
    classifier: str  # the training whose features were compared; "" for none
    features: int  # F, their number; 0 for none
    samples: tuple[SampleSummary, ...]  # held-out originals first

    def __getitem__(self, name: str) -> SampleSummary:
        """Return the sample of a name."""
        for sample in self.samples:
            if sample.name == name:
                return sample
        raise KeyError(f"{name!r} is none of the samples {', '.join(sample.name for sample in self.samples)}")


def write_naturalness(folder: Path, result: Naturalness) -> None:
    """Write the result into an artifact's folder."""
    write_atomic(folder / NATURALNESS_FILE, msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")


def _read(place: Path | Artifact, name: str, command: str, decode: Callable[[bytes], _Result]) -> _Result:
    """Return what a file of an artifact, or in its folder, holds; ``command`` makes it."""
    path = place / name if isinstance(place, Path) else place.file(name)
    try:
        return decode(read_small(path))
    except FileNotFoundError as error:
        raise MissingError(f"no {name} in {str(place)!r}. Make it with 'lsmix {command}'.") from error
    except DECODE_ERRORS as error:
        raise CorruptError(f"{str(path)!r} is damaged: {error}. Make it again with 'lsmix {command}'.") from error


def read_naturalness(folder: Path | Artifact) -> Naturalness:
    """Read the result of an artifact, or in its folder.

    Raises:
        MissingError: there is none.
        FormatError: it is of a format that this version does not read.
        CorruptError: it is damaged.
    """
    location = folder if isinstance(folder, Path) else folder.location
    words = {"what": f"{NATURALNESS_FILE} of {str(location)!r} has", "remedy": "Use a newer lsmix, or make it again."}
    return _read(
        folder,
        NATURALNESS_FILE,
        "naturalness",
        lambda content: decode_versioned(content, Naturalness, _FORMAT, **words),
    )


class LogLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of the training log."""

    iteration: int  # iterations done
    loss_bits_per_dim: float | None = None  # of the batch
    grad_norm: float | None = None  # before clipping
    train_bits_per_dim: float | None = None  # measured without augmentation
    heldout_bits_per_dim: float | None = None
    seconds: float | None = None  # since this session began


def read_log(folder: Path | Artifact) -> list[LogLine]:
    """Return the training log of a flow's artifact, or in its folder.

    Raises:
        CorruptError: it is damaged.
    """
    return _read(folder, LOG_FILE, "train-glow", msgspec.json.Decoder(LogLine).decode_lines)


class EpochMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """What is known after an epoch."""

    epoch: int  # epochs done
    loss: float  # mean over the epoch's batches, nats
    test_error: float | None  # error rate on the test split, %; None after epochs without such a measure
    images: int  # seen so far
    updates: int  # done so far


_Metrics = Annotated[list[EpochMetrics], Meta(min_length=1)]


def read_metrics(folder: Path | Artifact) -> list[EpochMetrics]:
    """Return the metrics of a training's artifact, or in its folder, epoch by epoch; at least one.

    Raises:
        CorruptError: they are damaged.
    """
    return _read(folder, METRICS_FILE, "train", msgspec.json.Decoder(_Metrics).decode)


_Class = Annotated[int, Meta(ge=0, le=1_000_000)]


class Predictions(msgspec.Struct, frozen=True, kw_only=True):
    """What a classifier says of the test images after its last epoch."""

    predicted: tuple[_Class, ...]  # class of each image
    labels: tuple[_Class, ...]  # its true class

    def __post_init__(self) -> None:
        if not len(self.predicted) == len(self.labels) > 0:
            raise ValueError(f"it has {len(self.predicted)} predictions for {len(self.labels)} labels")


def read_predictions(folder: Path | Artifact) -> Predictions:
    """Return the predictions of a training's artifact, or in its folder.

    Raises:
        CorruptError: they are damaged.
    """
    return _read(folder, PREDICTIONS_FILE, "train", msgspec.json.Decoder(Predictions).decode)


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """How often the images of one source were seen in a training."""

    source: str  # "training images", or "pool NAME"
    images: int  # distinct ones
    times: float  # each of them, on average
