"""Build a listing from labelled images: assign the splits of the source and number the classes."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from lsmix.data.errors import SourceError
from lsmix.data.readers.images.pixels import is_image_name
from lsmix.data.readers.source_images import ImageEntry, ImageListing, SourceReport
from lsmix.data.readers.trees import is_hidden, walk

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["SPLIT_ROLES", "Labelled", "leave_out_beside", "make_listing", "role_in"]

# The role of the usual split names, in lower case.
SPLIT_ROLES: Final = (
    dict.fromkeys(("train", "training"), "train")
    | dict.fromkeys(("val", "valid", "validation"), "val")
    | dict.fromkeys(("test", "testing"), "test")
)
_SPLIT_ORDER = ("train", "heldout", "test")
_MAX_CLASSES = 1 << 16


class Labelled(NamedTuple):
    """An image with its label."""

    name: str  # the name by which the image is read
    label: str | int  # name or number of the class
    split: str  # "train", "val" or "test"; "" if unknown, which counts as "train"


def role_in(name: str) -> str:
    """Return the split that is indicated by a word in a file name; "" if there is none."""
    return next((SPLIT_ROLES[word] for word in re.split("[^a-z]+", name.lower()) if word in SPLIT_ROLES), "")


def leave_out_beside(path: Path, report: SourceReport) -> None:
    """Report loose image files in the folder of a data set whose images are in archives or tables."""
    for name in walk(path) if path.is_dir() else ():
        if is_image_name(name) and not is_hidden(name):
            report.found += 1
            report.leave_out("an image file in a data set of archives or tables", name)


def make_listing(
    labelled: Sequence[Labelled],
    where: str,
    report: SourceReport,
    read: "Callable[[str], bytes | Image]",
    label: Callable[[str], str],
    class_names: tuple[str, ...] | None = None,
) -> ImageListing:
    """Return the listing of labelled images, split by split in the given order.

    ``class_names`` defines the classes, and integer labels are indices into it. Without ``class_names``, the classes
    are the labels that occur, sorted by name, or by number if all labels are integers.

    Raises:
        SourceError: A label has no class, there are too many classes, there is no training split, or a split has an
            unknown name.
    """
    found = {item.split or "train" for item in labelled}
    if found - {"train", "val", "test"} or "train" not in found:
        raise SourceError(f"{where}: the splits are {sorted(found)}; expected 'train', optionally 'val' and 'test'.")
    used_as = {"train": "train", "test": "test", "val": "heldout" if "test" in found else "test"}
    report.splits = {name: used_as[name] for name in used_as if name in found}
    numbered = all(isinstance(item.label, int) for item in labelled)
    labels: set[Any] = {item.label if numbered else str(item.label) for item in labelled}
    classes = sorted(labels) if class_names is None else range(len(class_names)) if numbered else class_names
    names = class_names or tuple(map(str, classes))
    numbers = {one: number for number, one in enumerate(classes)}
    unknown = sorted(map(str, labels - numbers.keys()))
    if len(names) > _MAX_CLASSES:
        raise SourceError(f"{where} has {len(names):,} classes; lsmix supports at most {_MAX_CLASSES:,}.")
    if unknown:
        raise SourceError(
            f"{where} has labels that are not among its {len(names):,} classes: {unknown[:10]}. Correct the labels or "
            "the class names."
        )
    entries = [
        ImageEntry(split, numbers[item.label if numbered else str(item.label)], item.name)
        for split in _SPLIT_ORDER
        for item in labelled
        if used_as[item.split or "train"] == split
    ]
    return ImageListing(entries=entries, class_names=names, read=read, label=label, report=report)
