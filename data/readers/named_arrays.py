"""Images and labels that a file holds by name: the names in use, and what such arrays must be.

A file must fit exactly one set of names; none is guessed.
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
# Names of train, of test and of validation, as they are in use.
LAYOUTS: tuple[tuple[Names, ...], ...] = (
    (("images", "labels"),),
    (("train_images", "train_labels"), ("test_images", "test_labels"), ("val_images", "val_labels")),
    (("x_train", "y_train"), ("x_test", "y_test"), ("x_val", "y_val")),
    (("train/images", "train/labels"), ("test/images", "test/labels"), ("val/images", "val/labels")),  # in HDF5
)


def choose_names(where: str, keys: Collection[str], held: Collection[str]) -> dict[str, Names]:
    """Return the names of each split's images and labels: "train", and "heldout" and "test" where they are there.

    Validation arrays are the held-out split beside test arrays, and the test split without them.

    Args:
        where: what to call the file in messages.
        keys: the names of its arrays.
        held: all that it holds, for messages.

    Raises:
        SourceError: not exactly one layout fits, or half of another split is there.
    """
    found = [layout for layout in LAYOUTS if set(layout[0]) <= set(keys)]
    if len(found) != 1:
        pairs = ", ".join(" + ".join(layout[0]) for layout in LAYOUTS)
        raise SourceError(
            f"{where} must hold exactly one of: {pairs}, and perhaps the same of test and val. It holds {sorted(held)[:20]}."
        )
    train, *others = found[0]
    there = [names for names in others if set(names) & set(keys)]
    for images, labels in there:
        if not {images, labels} <= set(keys):
            raise SourceError(f"{where} holds only one of {images!r} and {labels!r}; add the other.")
    # The last one is the test split if it is alone, since others list test before validation.
    return {"train": train, **dict(zip(("test", "heldout"), there, strict=False))}


def number_classes(where: str, splits: Mapping[str, Split]) -> tuple[str, ...]:
    """Return "0", "1", … for classes without names.

    Raises:
        SourceError: a label is so high that there cannot be as many classes.
    """
    classes = 1 + max(int(split.labels.max()) for split in splits.values())
    if classes > _MAX_CLASSES:
        raise SourceError(
            f"{where} has the label {classes - 1}; classes are counted from 0, and no data set has more than "
            f"{_MAX_CLASSES}. Renumber them, or do not use it."
        )
    return tuple(map(str, range(classes)))


def to_split(where: str, names: Names, images: npt.NDArray[Any], labels: npt.NDArray[Any]) -> Split:
    """Check arrays as they were found and return them as a split; grey images may lack the axis of their one channel.

    Raises:
        SourceError: they are no images with one label each; the message names array and file.
    """
    if images.dtype != np.uint8:
        raise SourceError(
            f"{names[0]!r} of {where} must be uint8, 0 to 255; got {images.dtype}. If its values are in [0, 1], save "
            "(255 * x).round().astype('uint8')."
        )
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        raise SourceError(
            f"{names[0]!r} of {where} must have the shape (images, height, width) or (images, height, width, "
            f"channels) with 1 or 3 channels last; got {images.shape}. Transpose it."
        )
    if labels.dtype.kind not in "iu" or labels.shape not in ((len(images),), (len(images), 1)):
        raise SourceError(
            f"{names[1]!r} of {where} must be integers of shape ({len(images)},), one an image; got "
            f"{labels.dtype} of shape {labels.shape}."
        )
    if 0 in images.shape:
        raise SourceError(
            f"{names[0]!r} of {where} has no images: its shape is {images.shape}. Leave a split without images out."
        )
    return Split(np.ascontiguousarray(images), labels.ravel().astype(np.int64))
