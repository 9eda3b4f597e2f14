"""Files with named arrays of images and labels: the supported names, and checks of the arrays.

A file must match exactly one layout of names; lsmix does not guess.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lsmix.data.errors import SourceError
from lsmix.data.readers.source_images import Split

__all__ = ["LAYOUTS", "Names", "choose_names", "number_classes", "to_split"]

_MAX_CLASSES = 1 << 16  # ImageNet-21k has 21,841
Names = tuple[str, str]  # of the images and of their labels
# The names for training, test and validation images, in this order.
LAYOUTS: tuple[tuple[Names, ...], ...] = (
    (("images", "labels"),),
    (("train_images", "train_labels"), ("test_images", "test_labels"), ("val_images", "val_labels")),
    (("x_train", "y_train"), ("x_test", "y_test"), ("x_val", "y_val")),
    (("train/images", "train/labels"), ("test/images", "test/labels"), ("val/images", "val/labels")),  # in HDF5
)


def choose_names(where: str, keys: Collection[str], held: Collection[str]) -> dict[str, Names]:
    """Return the names of the images and labels of each split: "train", and "heldout" and "test" if the file has them.

    Validation arrays become the held-out split, or the test split if there are no test arrays.

    Args:
        where: The file's name in messages.
        keys: The names of the arrays in the file.
        held: All names in the file, for messages.

    Raises:
        SourceError: Not exactly one layout matches, or a split has only images or only labels.
    """
    found = [layout for layout in LAYOUTS if set(layout[0]) <= set(keys)]
    if len(found) != 1:
        pairs = ", ".join(" + ".join(layout[0]) for layout in LAYOUTS)
        raise SourceError(
            f"{where} must contain exactly one of: {pairs}, optionally with the same for test and val. It contains "
            f"{sorted(held)[:20]}."
        )
    train, *others = found[0]
    present = [names for names in others if set(names) & set(keys)]
    for images, labels in present:
        if not {images, labels} <= set(keys):
            raise SourceError(f"{where} contains only one of {images!r} and {labels!r}. Add the other.")
    # ``others`` lists test before validation, so validation becomes "test" if there is no test.
    return {"train": train, **dict(zip(("test", "heldout"), present, strict=False))}


def number_classes(where: str, splits: Mapping[str, Split]) -> tuple[str, ...]:
    """Return the names "0", "1", … for classes without names.

    Raises:
        SourceError: The highest label implies an implausible number of classes.
    """
    classes = 1 + max(int(split.labels.max()) for split in splits.values())
    if classes > _MAX_CLASSES:
        raise SourceError(
            f"{where} has the label {classes - 1}, but labels count classes from 0, and lsmix supports at most "
            f"{_MAX_CLASSES:,} classes. Renumber the labels."
        )
    return tuple(map(str, range(classes)))


def to_split(where: str, names: Names, images: npt.NDArray[Any], labels: npt.NDArray[Any]) -> Split:
    """Check arrays read from a file and return them as a split; greyscale images may have no channel axis.

    Raises:
        SourceError: The arrays are not images with one label each.
    """
    if images.dtype != np.uint8:
        raise SourceError(
            f"{names[0]!r} in {where} must be uint8, 0 to 255; got {images.dtype}. If its values are in [0, 1], save "
            "(255 * x).round().astype('uint8')."
        )
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        raise SourceError(
            f"{names[0]!r} in {where} must have the shape (images, height, width) or (images, height, width, "
            f"channels) with 1 or 3 channels last; got {images.shape}. Transpose it."
        )
    if labels.dtype.kind not in "iu" or labels.shape not in ((len(images),), (len(images), 1)):
        raise SourceError(
            f"{names[1]!r} in {where} must be integers of shape ({len(images)},), one per image; got "
            f"{labels.dtype} of shape {labels.shape}."
        )
    if 0 in images.shape:
        raise SourceError(
            f"{names[0]!r} in {where} contains no images: its shape is {images.shape}. Omit splits without images."
        )
    return Split(np.ascontiguousarray(images), labels.ravel().astype(np.int64))
