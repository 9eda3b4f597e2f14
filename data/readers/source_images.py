"""What every reader of a data set returns: images, labels, class names, what was left out, and how a format is described.

Readers of arrays return ``PublishedData``; readers of image files list them in an ``ImageListing``, from which
``images.load`` decodes them. These types check themselves when they are made.
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

from lsmix.data.errors import LsmixError, SourceError

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
_MAX_SIDE = 4096  # pixels of a side that images are brought to
_Side = Annotated[int, msgspec.Meta(ge=1, le=_MAX_SIDE)]
# No tuple[_Side, _Side]: beside a constrained int, msgspec 0.22 crashes on it in garbage collection.
_Size = (
    Annotated[int, msgspec.Meta(ge=0, le=_MAX_SIDE)]
    | Annotated[tuple[_Side, ...], msgspec.Meta(min_length=2, max_length=2)]
)
SplitCheck = Callable[[Mapping[str, npt.NDArray[np.int64]], Sequence[str]], object]  # of labels by split, class names
_EXAMPLES = 3  # names given for each reason why files were left out
_MAX_FILE_BYTES = 64 << 30  # a data set is read into memory as a whole; ImageNet at 64×64 pixels has 16 GB
UNPACK_RATIO = 100  # more than this many times a file's bytes is a bomb


def has_ending(path: Path, endings: str | tuple[str, ...]) -> bool:
    """Tell whether the name of a file ends in one of these, in any case."""
    return path.name.lower().endswith(endings)


def most_unpacked(packed: int, spare: int) -> int:
    """Return to how many bytes ``packed`` bytes may unpack, more being a bomb: to 100 times as many, or to ``spare`` bytes."""
    return max(spare, UNPACK_RATIO * packed)


def check_file(path: Path) -> None:
    """Refuse what could be read without end: a device, a pipe, a socket, or a file far too big for a data set.

    Links are followed. What is not there, and a folder, pass.

    Raises:
        SourceError: it is such a thing.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        return
    except OSError as error:  # such as a link to itself
        raise SourceError(f"{str(path)!r} cannot be read: {error.strerror}. Check the path.") from error
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise SourceError(
            f"{str(path)!r} is a device, pipe or socket, which is never read; expected a file or folder. Check the path."
        )
    if stat.S_ISREG(found.st_mode) and found.st_size > _MAX_FILE_BYTES:
        raise SourceError(
            f"{str(path)!r} has {found.st_size} bytes; at most {_MAX_FILE_BYTES} are read of a data set's file. Wrong file?"
        )


def check_complete(
    path: Path, data_set: str, missing: Sequence[str], advice: str = "Fetch the data set again."
) -> None:
    """Refuse a published data set of which files are missing.

    Raises:
        SourceError: ``missing`` names some.
    """
    if missing:
        raise SourceError(f"{str(path)!r} is not a whole {data_set}: {', '.join(map(repr, missing))} missing. {advice}")


@contextmanager
def refused_if_damaged(
    where: str, kind: str, *errors: type[Exception], advice: str = "Fetch it again."
) -> Iterator[None]:
    """Raise SourceError in place of what a parser raises on damaged files; errors of lsmix pass.

    Args:
        where: what to call the file in the message.
        kind: what it should be.
        errors: what the parser raises.
        advice: ends the message.
    """
    try:
        yield
    except LsmixError:
        raise
    except errors as error:
        raise SourceError(f"{where} is damaged or no {kind} ({error}). {advice}") from error


@dataclass(frozen=True, eq=False, slots=True)
class Split:
    """Images of one published split, in their published order.

    Raises:
        SourceError: the arrays are not what is said here.
    """

    images: npt.NDArray[np.uint8]  # (N, H, W, C), N and C at least 1
    labels: npt.NDArray[np.int64]  # (N,), at least 0

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or 0 in self.images.shape:
            raise SourceError(
                "images must be uint8 of shape (images, height, width, channels) with none of them 0; "
                f"got {self.images.dtype} of shape {self.images.shape}."
            )
        if self.labels.dtype != np.int64 or self.labels.shape != self.images.shape[:1]:
            raise SourceError(
                f"labels must be int64 of shape ({len(self.images)},), one an image; "
                f"got {self.labels.dtype} of shape {self.labels.shape}."
            )

    def __len__(self) -> int:
        return len(self.labels)


def join_splits(splits: Sequence[Split]) -> Split:
    """Return the images of several splits, of one shape, behind one another."""
    return Split(np.concatenate([split.images for split in splits]), np.concatenate([split.labels for split in splits]))


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class PublishedData:
    """A published data set, as its authors split it.

    Raises:
        SourceError: "train" is not there, image shapes differ, or a label has no class.
    """

    splits: Mapping[str, Split]  # "train" always, "heldout" and "test" where they were published
    class_names: tuple[str, ...]  # by label
    licence: str = ""  # as published; "" where it is unknown
    citation: str = ""  # whom to cite; "" where it is unknown
    report: "SourceReport | None" = None  # of image files: what was found, used and left out

    def __post_init__(self) -> None:
        if "train" not in self.splits or not set(self.splits) <= set(_SPLIT_NAMES):
            raise SourceError(
                f"a data set has the split 'train' and perhaps 'heldout' and 'test'; got {sorted(self.splits)}."
            )
        for label, class_name in enumerate(self.class_names):
            try:
                class_name.encode()
            except (
                UnicodeEncodeError
            ) as error:  # a lone surrogate, of a pickle or of a folder's name in another encoding
                raise SourceError(f"the name of class {label} is no text ({class_name!r}). Rename it.") from error
        train = self.splits["train"]
        for name, split in self.splits.items():
            if split.images.shape[1:] != train.images.shape[1:]:
                raise SourceError(
                    f"images of {name!r} have shape {split.images.shape[1:]}, those of 'train' "
                    f"{train.images.shape[1:]}: all must have one (height, width, channels)."
                )
            low, high = int(split.labels.min()), int(split.labels.max())
            if low < 0 or high >= len(self.class_names):
                raise SourceError(
                    f"labels of {name!r} are in {low}..{high}, but there are {len(self.class_names)} class names, "
                    f"for 0..{len(self.class_names) - 1}."
                )


class ImageConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How image files become rows of one size, and which labels they get."""

    size: _Size = 0  # side in pixels, or [height, width]; 0 keeps the size of the images, if they all have it
    fit: Literal["crop", "pad", "stretch"] = "crop"  # crop: cut the centre; pad: add margins; stretch: distort
    background: str = "white"  # colour of transparent pixels and margins: white, black or #rrggbb
    on_error: Literal["stop", "skip"] = "stop"  # stop: name unreadable images and end; skip: count them
    labels_file: Annotated[str, msgspec.Meta(max_length=4096)] = ""  # table of labels: .csv, .tsv or .jsonl
    file_column: str = "file_name"  # its column of file names
    label_column: str = "label"  # its column of labels; classes are sorted by name

    def __post_init__(self) -> None:
        """Refuse a size out of range, and a background that is no colour."""
        sides = self.size if isinstance(self.size, tuple) else (self.size or 1,)
        if not all(1 <= side <= _MAX_SIDE for side in sides):
            raise ValueError(f"size is a number of pixels, 1 to {_MAX_SIDE}, or [height, width]; got {self.size}")
        if not re.fullmatch("white|black|#[0-9a-fA-F]{6}", self.background):
            raise ValueError(f"background is white, black or a colour such as #ff8000; got {self.background!r}")

    @property
    def target(self) -> tuple[int, int] | None:
        """(height, width) that all images are brought to; None to keep their own."""
        if isinstance(self.size, int):
            return (self.size, self.size) if self.size else None
        height, width = self.size
        return height, width


class LeftOut(msgspec.Struct, kw_only=True):
    """Files that are not used, for one reason."""

    reason: str
    files: int = 0
    examples: list[str] = []  # the first three names

    def add(self, name: str) -> None:
        """Count one more."""
        self.files += 1
        if self.files <= _EXAMPLES:
            self.examples.append(name)


class SourceReport(msgspec.Struct, kw_only=True):
    """What became of every file, row or image that was found."""

    found: int  # files, images or not, but for tables of labels
    used: dict[str, int] = {}  # images by published split
    splits: dict[str, str] = {}  # what each split of the source is used for
    left_out: list[LeftOut] = []
    notes: list[str] = []  # what was done to images, such as that only first frames are used
    unit: str = "files"  # what was counted

    def leave_out(self, reason: str, name: str) -> None:
        """Count a file that is not used."""
        for known in self.left_out:
            if known.reason == reason:
                return known.add(name)
        self.left_out.append(LeftOut(reason=reason))
        return self.left_out[-1].add(name)

    def lines(self, chosen: int | None = None) -> list[str]:
        """Return the report for people, a line each; ``chosen`` is how many images the recipe's numbers left."""
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
    """An image cannot be used; the message is ``name reason. advice``."""

    def __init__(self, reason: str, advice: str = "Repair or remove it.", name: str = "") -> None:
        super().__init__(f"{name} {reason}. {advice}".strip())
        self.reason = reason
        self.advice = advice


class LabelsTableError(SourceError):
    """The labels may be in a table; ``fields`` of a recipe's section ``[data]`` would say so."""

    def __init__(self, message: str, fields: dict[str, str]) -> None:
        super().__init__(message)
        self.fields = fields


class ImageEntry(NamedTuple):
    """One image of a listing."""

    split: str  # "train", "heldout" or "test"
    label: int  # of its class
    name: str  # by which the listing reads it


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class ImageListing:
    """The images of a data set, split by split in their published order, and how to read each."""

    entries: Sequence[ImageEntry]
    class_names: tuple[str, ...]  # by label
    read: Callable[[str], "bytes | Image"]  # the image of a name, from any thread: a file's content, or decoded, flat
    label: Callable[[str], str]  # what to call it in messages
    report: SourceReport
    licence: str = ""
    citation: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSummary:
    """What a data set holds, as far as that is known before its images are decoded."""

    format: str
    labels: Mapping[str, npt.NDArray[np.int64]]  # by split
    class_names: tuple[str, ...]
    sizes: Counter[tuple[int, int]]  # (height, width) of some images; of all where they are arrays
    channels: int  # 1 where all images are known to be grey
    licence: str = ""
    citation: str = ""
    report: SourceReport | None = None  # of image files


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFormat:
    """One format that data sets are published in: how to know it, which files count, how to read it.

    A format of arrays has ``read``, a format of image files has ``images``.
    """

    name: str  # as in a recipe: format = "..."
    recognise: Callable[[Path], bool]  # whether an existing path looks like one, at little cost
    files: Callable[[Path], Sequence[str | Path]] = lambda path: [path]  # the files whose content counts
    read: Callable[[Path], PublishedData] | None = None
    images: Callable[[Path, ImageConfig], AbstractContextManager[ImageListing]] | None = None
    general: bool = False  # whether other formats that fit a path, too, are preferred
    variants: Mapping[str, "SourceFormat"] = field(
        default_factory=dict
    )  # other readings, by what asks: "coarse", "extra"
