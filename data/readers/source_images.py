"""The types that readers of data sets return, and the interface that a data set format implements.

Readers of arrays return ``PublishedData``. Readers of image files return an ``ImageListing``, and ``images.load``
decodes the images. These types validate their content when they are created.
"""

import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from lsmix.data.errors import LsmixError, SourceError, format_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "UNPACK_RATIO",
    "ImageConfig",
    "ImageEntry",
    "ImageError",
    "ImageListing",
    "LabelsTableError",
    "LeftOut",
    "PublishedData",
    "SourceFormat",
    "SourceReport",
    "SourceSummary",
    "Split",
    "SplitCheck",
    "check_complete",
    "check_file",
    "has_ending",
    "join_splits",
    "most_unpacked",
    "refused_if_damaged",
]

_SPLIT_NAMES = ("train", "heldout", "test")
_MAX_SIDE = 4096  # largest side that images can be resized to, in pixels
_Side = Annotated[int, msgspec.Meta(ge=1, le=_MAX_SIDE)]
# Not tuple[_Side, _Side]: in a union with a constrained int, it crashes msgspec 0.22 during garbage collection.
_Size = (
    Annotated[int, msgspec.Meta(ge=0, le=_MAX_SIDE)]
    | Annotated[tuple[_Side, ...], msgspec.Meta(min_length=2, max_length=2)]
)
SplitCheck = Callable[[Mapping[str, npt.NDArray[np.int64]], Sequence[str]], object]  # gets labels by split, class names
_EXAMPLES = 3  # file names recorded for each reason why files were left out
_MAX_FILE_BYTES = 64 << 30  # data sets are read into memory; ImageNet at 64×64 pixels has 16 GB
UNPACK_RATIO = 100  # a file that unpacks to more than this many times its size is considered a decompression bomb


def has_ending(path: Path, endings: str | tuple[str, ...]) -> bool:
    """Return whether a file name has one of these lower-case endings, ignoring case."""
    return path.name.lower().endswith(endings)


def most_unpacked(packed: int, spare: int) -> int:
    """Return the size in bytes to which ``packed`` bytes may unpack: 100 times as much, but at least ``spare``."""
    return max(spare, UNPACK_RATIO * packed)


def check_file(path: Path) -> None:
    """Reject devices, pipes, sockets and oversized files. Links are followed; folders and missing files are accepted.

    Raises:
        SourceError: The path is a device, pipe or socket, has more than 64 GiB, or cannot be accessed.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        return
    except OSError as error:  # such as a link to itself
        raise SourceError(f"{str(path)!r} cannot be read: {error.strerror}. Check the path.") from error
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise SourceError(f"{str(path)!r} is a device, pipe or socket; expected a file or folder. Check the path.")
    if stat.S_ISREG(found.st_mode) and found.st_size > _MAX_FILE_BYTES:
        raise SourceError(
            f"{str(path)!r} is too large: {format_bytes(found.st_size)}, but lsmix reads files of at most "
            f"{format_bytes(_MAX_FILE_BYTES)}. Is it the wrong file?"
        )


def check_complete(
    path: Path, data_set: str, missing: Sequence[str], advice: str = "Download the data set again."
) -> None:
    """Check that no files of a published data set are missing.

    Raises:
        SourceError: ``missing`` is not empty.
    """
    if missing:
        names = ", ".join(map(repr, missing))
        raise SourceError(f"{str(path)!r} is an incomplete copy of {data_set}: {names} missing. {advice}")


@contextmanager
def refused_if_damaged(
    where: str, kind: str, *errors: type[Exception], advice: str = "Download it again."
) -> Iterator[None]:
    """Convert the exceptions that a parser raises for damaged files to SourceError; lsmix's own errors pass through.

    Args:
        where: The file's name in the message.
        kind: The expected type of file, with its article.
        errors: The exceptions that the parser raises.
        advice: The last sentence of the message.
    """
    try:
        yield
    except LsmixError:
        raise
    except errors as error:
        raise SourceError(f"{where} is damaged or not {kind} ({error}). {advice}") from error


@dataclass(frozen=True, eq=False, slots=True)
class Split:
    """The images and labels of one published split, in their published order.

    Raises:
        SourceError: An array has another dtype, shape or range.
    """

    images: npt.NDArray[np.uint8]  # (N, H, W, C), N and C at least 1
    labels: npt.NDArray[np.int64]  # (N,), at least 0

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or 0 in self.images.shape:
            raise SourceError(
                "images must be uint8 of shape (images, height, width, channels) without empty axes; "
                f"got {self.images.dtype} of shape {self.images.shape}."
            )
        if self.labels.dtype != np.int64 or self.labels.shape != self.images.shape[:1]:
            raise SourceError(
                f"labels must be int64 of shape ({len(self.images)},), one per image; "
                f"got {self.labels.dtype} of shape {self.labels.shape}."
            )

    def __len__(self) -> int:
        return len(self.labels)


def join_splits(splits: Sequence[Split]) -> Split:
    """Concatenate splits whose images have the same shape."""
    return Split(np.concatenate([split.images for split in splits]), np.concatenate([split.labels for split in splits]))


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class PublishedData:
    """A published data set with its authors' splits.

    Raises:
        SourceError: "train" is missing, image shapes differ, or a label has no class.
    """

    splits: Mapping[str, Split]  # always "train"; "heldout" and "test" if published
    class_names: tuple[str, ...]  # by label
    licence: str = ""  # as published; "" if unknown
    citation: str = ""  # "" if unknown
    report: "SourceReport | None" = None  # for image files: the files found, used and left out

    def __post_init__(self) -> None:
        if "train" not in self.splits or not set(self.splits) <= set(_SPLIT_NAMES):
            raise SourceError(
                f"a data set must have the split 'train', optionally 'heldout' and 'test'; got {sorted(self.splits)}."
            )
        for label, class_name in enumerate(self.class_names):
            try:
                class_name.encode()
            except UnicodeEncodeError as error:  # a lone surrogate, from a pickle or an undecodable folder name
                raise SourceError(f"the name of class {label} is not valid text: {class_name!r}. Rename it.") from error
        train = self.splits["train"]
        for name, split in self.splits.items():
            if split.images.shape[1:] != train.images.shape[1:]:
                raise SourceError(
                    f"images of {name!r} have shape {split.images.shape[1:]}, but images of 'train' have shape "
                    f"{train.images.shape[1:]}. All must have the same (height, width, channels)."
                )
            low, high = int(split.labels.min()), int(split.labels.max())
            if low < 0 or high >= len(self.class_names):
                raise SourceError(
                    f"labels of {name!r} range from {low} to {high}, but there are {len(self.class_names)} class "
                    f"names, for labels 0 to {len(self.class_names) - 1}."
                )


class ImageConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How image files are resized, and where their labels are."""

    size: _Size = 0  # side in pixels, or [height, width]; 0 keeps the size of the images, if all have the same
    fit: Literal["crop", "pad", "stretch"] = "crop"  # crop: crop the centre; pad: add margins; stretch: distort
    background: str = "white"  # colour of transparent pixels and margins: white, black or #rrggbb
    on_error: Literal["stop", "skip"] = "stop"  # stop: report unreadable images and end; skip: count them
    labels_file: Annotated[str, msgspec.Meta(max_length=4096)] = ""  # table of labels: .csv, .tsv or .jsonl
    file_column: str = "file_name"  # its column of file names
    label_column: str = "label"  # its column of labels; classes are sorted by name

    def __post_init__(self) -> None:
        """Reject sizes out of range and invalid background colours."""
        sides = self.size if isinstance(self.size, tuple) else (self.size or 1,)
        if not all(1 <= side <= _MAX_SIDE for side in sides):
            raise ValueError(f"size must be a number of pixels, 1 to {_MAX_SIDE}, or [height, width]; got {self.size}")
        if not re.fullmatch("white|black|#[0-9a-fA-F]{6}", self.background):
            raise ValueError(f"background must be white, black or a colour such as #ff8000; got {self.background!r}")

    @property
    def target(self) -> tuple[int, int] | None:
        """(height, width) to which all images are resized; None keeps their own size."""
        if isinstance(self.size, int):
            return (self.size, self.size) if self.size else None
        height, width = self.size
        return height, width


class LeftOut(msgspec.Struct, kw_only=True):
    """Files that are not used for the same reason."""

    reason: str
    files: int = 0
    examples: list[str] = []  # the first three names

    def add(self, name: str) -> None:
        """Count one more file."""
        self.files += 1
        if self.files <= _EXAMPLES:
            self.examples.append(name)


class SourceReport(msgspec.Struct, kw_only=True):
    """An account of every file, row or image that was found in a data set."""

    found: int  # all files, images or not, except tables of labels
    used: dict[str, int] = {}  # number of images by published split
    splits: dict[str, str] = {}  # split of the source to split of the data set
    left_out: list[LeftOut] = []
    notes: list[str] = []  # how images were changed, for example that only first frames are used
    unit: str = "files"  # unit of ``found``

    def leave_out(self, reason: str, name: str) -> None:
        """Count a file that is not used."""
        for known in self.left_out:
            if known.reason == reason:
                return known.add(name)
        self.left_out.append(LeftOut(reason=reason))
        return self.left_out[-1].add(name)

    def lines(self, chosen: int | None = None) -> list[str]:
        """Return the report as lines of text; ``chosen`` is the number of images after data.limit, heldout and test."""
        used = sum(self.used.values())
        lines = [f"{self.found:,} {self.unit} found, {used:,} images read"]
        lines += [f"{name!r} is used as {split!r}" for name, split in self.splits.items() if name != split]
        if chosen is not None and chosen < used:
            lines.append(f"not chosen (data.limit, data.heldout, data.test): {used - chosen:,} images")
        for group in self.left_out:
            more = ", …" if group.files > len(group.examples) else ""
            lines.append(f"left out: {group.files:,}, {group.reason} ({', '.join(group.examples)}{more})")
        return lines

    @property
    def skipped(self) -> int:
        """Number of files that are not used."""
        return sum(group.files for group in self.left_out)


class ImageError(SourceError):
    """An image cannot be used. The message is ``name reason. advice``."""

    def __init__(self, reason: str, advice: str = "Repair or remove it.", name: str = "") -> None:
        super().__init__(f"{name} {reason}. {advice}".strip())
        self.reason = reason
        self.advice = advice


class LabelsTableError(SourceError):
    """The labels may be in a table, which the recipe settings ``fields`` (in the section ``[data]``) would use."""

    def __init__(self, message: str, fields: dict[str, str]) -> None:
        super().__init__(message)
        self.fields = fields


class ImageEntry(NamedTuple):
    """One image of a listing."""

    split: str  # "train", "heldout" or "test"
    label: int
    name: str  # the argument of the listing's ``read`` and ``label``


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class ImageListing:
    """The images of a data set, split by split in their published order, with functions that read them."""

    entries: Sequence[ImageEntry]
    class_names: tuple[str, ...]  # by label
    # Returns the content of an image file, or an image as from ``flatten_image``, by name; called from several threads.
    read: Callable[[str], "bytes | Image"]
    label: Callable[[str], str]  # returns how messages refer to an image, by name
    report: SourceReport
    licence: str = ""
    citation: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSummary:
    """A summary of a data set, available before its images are decoded."""

    format: str
    labels: Mapping[str, npt.NDArray[np.int64]]  # by split
    class_names: tuple[str, ...]
    sizes: Counter[tuple[int, int]]  # (height, width) of all images in arrays, or of a sample of image files
    channels: int  # 1 if all images are known to be grey
    licence: str = ""
    citation: str = ""
    report: SourceReport | None = None  # for image files


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFormat:
    """A data set format. Formats with arrays define ``read``, formats with image files define ``images``."""

    name: str  # as in a recipe: format = "..."
    recognise: Callable[[Path], bool]  # quick check whether an existing path looks like this format
    files: Callable[[Path], Sequence[str | Path]] = lambda path: [path]  # the files that determine the content
    read: Callable[[Path], PublishedData] | None = None
    images: Callable[[Path, ImageConfig], AbstractContextManager[ImageListing]] | None = None
    general: bool = False  # whether other formats that match a path take precedence
    variants: Mapping[str, "SourceFormat"] = field(default_factory=dict)  # by recipe option: "coarse", "extra"
