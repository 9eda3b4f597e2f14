"""What every reader of a published data set hands over: images, labels, class names, and how a format is described.

These types check themselves when they are made, so nothing after a reader asks again whether an image is
uint8 or a label has a class.
"""

import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lsmix.data.errors import SourceError

__all__ = ["PublishedData", "SourceFormat", "Split", "check_file"]

_SPLIT_NAMES = ("train", "test")
_MAX_FILE_BYTES = 64 << 30  # a data set is read into memory as a whole; ImageNet at 64×64 pixels has 16 GB
_HOLES_RATIO = 100  # a file of more than this many times its bytes on the disk …
_HOLES_BYTES = 1 << 30  # … and of more than this is all holes: file systems that compress shrink no images so far


def check_file(path: Path) -> None:
    """Refuse what could be read without end: a device, a pipe, a socket, or a file far too big for a data set, perhaps by holes.

    Links are followed. What is not there, and a folder, pass.

    Raises:
        SourceError: it is such a thing.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        return
    except OSError as error:  # such as a link to itself
        raise SourceError(f"{str(path)!r} cannot be looked at ({error.strerror}). Check the path.") from error
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise SourceError(
            f"{str(path)!r} is a device, pipe or socket, which is never read; expected a file or folder. Check the path."
        )
    if not stat.S_ISREG(found.st_mode):
        return
    if found.st_size > _MAX_FILE_BYTES:
        raise SourceError(
            f"{str(path)!r} has {found.st_size} bytes; at most {_MAX_FILE_BYTES} are read of a data set's file. Wrong file?"
        )
    on_disk = 512 * found.st_blocks  # 0 where the file system does not count them
    if found.st_size > _HOLES_BYTES and 0 < _HOLES_RATIO * on_disk < found.st_size:
        raise SourceError(
            f"{str(path)!r} has {found.st_size} bytes, of which {on_disk} are on the disk: the others are holes. Fetch it again."
        )


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


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class PublishedData:
    """A published data set, as its authors split it.

    Raises:
        SourceError: "train" is not there, image shapes differ, or a label has no class.
    """

    splits: Mapping[str, Split]  # "train" always, "test" where one was published
    class_names: tuple[str, ...]  # by label
    licence: str = ""  # as published; "" where it is unknown
    citation: str = ""  # whom to cite; "" where it is unknown

    def __post_init__(self) -> None:
        if "train" not in self.splits or not set(self.splits) <= set(_SPLIT_NAMES):
            raise SourceError(f"a data set has the split 'train' and perhaps 'test'; got {sorted(self.splits)}.")
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
                    f"labels of {name!r} lie in {low}..{high}, but there are {len(self.class_names)} class names, "
                    f"for 0..{len(self.class_names) - 1}."
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFormat:
    """One format that data sets are published in: how to know it, which files count, how to read it."""

    name: str  # as in a recipe: format = "..."
    looks_for: str  # what makes a path one of these, for messages
    recognise: Callable[[Path], bool]  # whether an existing path looks like one, at little cost
    files: Callable[[Path], list[Path]]  # the files whose content counts
    read: Callable[[Path], PublishedData]
    variants: Mapping[str, "SourceFormat"] = field(
        default_factory=dict
    )  # other readings, by what asks: "coarse", "extra"
