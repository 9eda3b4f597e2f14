"""The result files that stages write: training logs, error rates, naturalness. Readers check sizes and types."""

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
    """The naturalness measures of one sample: the mixes of a method, or original images."""

    name: str  # the method; or "held-out", "test" or "sources" for originals
    kind: Literal["original", "latent", "pixel"]  # the space that the images were mixed in, or "original"
    images: int
    share: float | None  # mean actual share of the second image; None for originals
    decode_failed: int | None  # images that failed to decode, by the rule for pools; None if nothing was decoded
    not_finite: int  # images without finite bits per dimension; excluded from the next five fields
    mean_bits: float  # mean bits per dimension under the evaluator
    mean_bits_error: float  # standard error of the mean
    # Bits per dimension by which the quantiles exceed those of the held-out originals; None for these originals.
    less_likely: Interval | None
    more_likely: Interval | None  # bits per dimension by which the quantiles fall below them
    distance: Interval | None  # 1-Wasserstein distance, the sum of less_likely and more_likely
    frechet: float | None  # Fréchet distance of features to the held-out originals; None without a classifier
    seam: Interval | None  # gradient across the borders of regions / gradient inside; None without borders
    seam_of: Literal["own", "ls-mix"]  # whose regions; LS-Mix's are a control, with no border expected
    bits_per_dim: tuple[float | None, ...]  # one per image


class Naturalness(msgspec.Struct, frozen=True, kw_only=True):
    """The content of ``naturalness.json``."""

    format_version: int = _FORMAT
    lam: float  # requested share of the second image
    pairs: int  # number of images in each sample, n
    pairs_asked: int  # number of pairs that the recipe requested
    bootstrap: int  # resamples per confidence interval
    evaluator_bits: int  # bits per pixel value that the evaluator models
    classifier: str  # training whose features were compared; "" for none
    features: int  # number of features, F; 0 for none
    samples: tuple[SampleSummary, ...]  # held-out originals first

    def __getitem__(self, name: str) -> SampleSummary:
        """Return the sample with this name."""
        for sample in self.samples:
            if sample.name == name:
                return sample
        raise KeyError(f"no sample {name!r}; there are {', '.join(sample.name for sample in self.samples)}")


def write_naturalness(folder: Path, result: Naturalness) -> None:
    """Write ``naturalness.json`` to an artifact's folder."""
    write_atomic(folder / NATURALNESS_FILE, msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")


def _read(place: Path | Artifact, name: str, command: str, decode: Callable[[bytes], _Result]) -> _Result:
    """Return the decoded content of an artifact's file; ``command`` is the lsmix command that writes the file."""
    path = place / name if isinstance(place, Path) else place.file(name)
    try:
        return decode(read_small(path))
    except FileNotFoundError as error:
        raise MissingError(f"{name} does not exist in {str(place)!r}. Create it with 'lsmix {command}'.") from error
    except DECODE_ERRORS as error:
        raise CorruptError(f"{str(path)!r} is damaged: {error}. Recreate it with 'lsmix {command} --force'.") from error


def read_naturalness(folder: Path | Artifact) -> Naturalness:
    """Read ``naturalness.json`` of an artifact or a folder.

    Raises:
        MissingError: The file does not exist.
        FormatError: This version of lsmix cannot read the file's format version.
        CorruptError: The file is damaged.
    """
    location = folder if isinstance(folder, Path) else folder.location
    words = {
        "what": f"{NATURALNESS_FILE} of {str(location)!r} has",
        "remedy": "Use a newer lsmix, or recreate the file.",
    }
    return _read(
        folder,
        NATURALNESS_FILE,
        "naturalness",
        lambda content: decode_versioned(content, Naturalness, _FORMAT, **words),
    )


class LogLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of the training log."""

    iteration: int  # completed iterations
    loss_bits_per_dim: float | None = None  # of the batch
    grad_norm: float | None = None  # before clipping
    train_bits_per_dim: float | None = None  # measured without augmentation; None if not measured
    heldout_bits_per_dim: float | None = None
    seconds: float | None = None  # since the start of this session


def read_log(folder: Path | Artifact) -> list[LogLine]:
    """Return the training log of a flow, given as an artifact or a folder.

    Raises:
        CorruptError: The log is damaged.
    """
    return _read(folder, LOG_FILE, "train-glow", msgspec.json.Decoder(LogLine).decode_lines)


class EpochMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """Metrics after one epoch."""

    epoch: int  # completed epochs
    loss: float  # mean over the epoch's batches, nats
    test_error: float | None  # error rate on the test split, in %; None if not measured
    images: int  # images seen so far
    updates: int  # optimizer updates so far


_Metrics = Annotated[list[EpochMetrics], Meta(min_length=1)]


def read_metrics(folder: Path | Artifact) -> list[EpochMetrics]:
    """Return the metrics of a training, given as an artifact or a folder: at least one epoch, in order.

    Raises:
        CorruptError: The metrics are damaged.
    """
    return _read(folder, METRICS_FILE, "train", msgspec.json.Decoder(_Metrics).decode)


_Class = Annotated[int, Meta(ge=0, le=1_000_000)]


class Predictions(msgspec.Struct, frozen=True, kw_only=True):
    """A classifier's predictions on the test images after the last epoch."""

    predicted: tuple[_Class, ...]  # predicted class of each image
    labels: tuple[_Class, ...]  # true class of each image

    def __post_init__(self) -> None:
        if not len(self.predicted) == len(self.labels) > 0:
            raise ValueError(f"it has {len(self.predicted)} predictions for {len(self.labels)} labels")


def read_predictions(folder: Path | Artifact) -> Predictions:
    """Return the predictions of a training, given as an artifact or a folder.

    Raises:
        CorruptError: The predictions are damaged.
    """
    return _read(folder, PREDICTIONS_FILE, "train", msgspec.json.Decoder(Predictions).decode)


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """How often a training used the images of one source."""

    source: str  # "training images", or "pool NAME"
    images: int  # number of distinct images
    times: float  # average number of uses per image
