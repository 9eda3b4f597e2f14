"""Data sets passed as Python objects: arrays, or data sets of (image, label) pairs such as those of torchvision.

A first pass computes the checksum of the data, which becomes part of the cache key. A second pass reads the images, if
the data set is not cached.
"""

import hashlib
import operator
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from PIL import Image

from lsmix.data.errors import RecipeError, SourceError
from lsmix.data.progress import Progress
from lsmix.data.readers.images.load import load_images
from lsmix.data.readers.images.pixels import flatten_image
from lsmix.data.readers.images.splits import SPLIT_ROLES, Labelled, make_listing
from lsmix.data.readers.registry import SourceConfig
from lsmix.data.readers.source_images import PublishedData, SourceReport, SplitCheck

__all__ = ["MemorySource"]

_NAMES = "class_names"
_FOR_FILES = ("path", "format", "download", "labels", "extra", "labels_file", "file_column")
_EXPECTED = "expected (images, labels), a data set of (image, label) pairs, or a dictionary of these by split"


class MemorySource:
    """Images and labels in memory, identified by their SHA-256.

    Args:
        data: ``(images, labels)``; or a sized data set whose items are ``(image, label)`` pairs, or dictionaries with
            "image" and ``config.label_column``; or a dictionary of these by split, "train" with "val" or "test",
            optionally with "class_names". Images are Pillow images, or arrays of shape (H, W), (H, W, C) or (C, H, W),
            uint8 or float in [0, 1].
        config: The image settings of the recipe.

    Raises:
        RecipeError: ``config`` also has settings for files.
        SourceError: The data contain invalid images or labels.
    """

    def __init__(self, data: Any, config: SourceConfig) -> None:
        for name in _FOR_FILES:
            if getattr(config, name) != getattr(SourceConfig(), name):
                raise RecipeError(f"data.{name} is for files, but data=... was passed in Python. Remove one of them.")
        splits = dict(data) if isinstance(data, Mapping) else {"train": data}
        names = splits.pop(_NAMES, None)
        self._splits = {name: _Pairs(*part) if isinstance(part, tuple) else part for name, part in splits.items()}
        self._config = config
        self._lock = threading.Lock()  # most data sets are not thread-safe
        self._labelled: list[Labelled] = []
        self._checksums: dict[str, bytes] = {}
        names = _known_names(self._splits.get("train"), config) if names is None else names
        self._class_names = tuple(map(str, names)) if names is not None else None
        self.digest = self._read_all()

    def read(self, progress: Progress, *, label: str, folder: Path, check: SplitCheck) -> PublishedData:
        """Read all images, like ``registry.read_source`` does for files.

        Raises:
            SourceError: The images have different sizes, or an image has changed since the first pass.
        """
        report = SourceReport(found=len(self._labelled), unit="images")
        listing = make_listing(self._labelled, "data", report, self._image, _label, self._class_names)
        return load_images(listing, self._config, progress, label=label, folder=folder, check=check)

    def _read_all(self) -> str:
        """List all images; return the SHA-256 of images, labels and class names."""
        for split, part in self._splits.items():
            if isinstance(part, str | bytes) or not hasattr(part, "__len__") or not hasattr(part, "__getitem__"):
                raise SourceError(f"data {split!r}: {_EXPECTED}; got {type(part).__name__}.")
            for row in range(len(part)):
                name = f"{split}#{row}"
                picture, label = self._item(name)
                self._labelled.append(Labelled(name, label, SPLIT_ROLES.get(split.lower(), split)))
                self._checksums[name] = _checksum(picture)
        metadata = msgspec.json.encode([[item.label, item.split] for item in self._labelled] + [self._class_names])
        return hashlib.sha256(b"".join(self._checksums.values()) + metadata).hexdigest()

    def _item(self, name: str) -> tuple[Image.Image, int | str]:
        split, _, row = name.rpartition("#")
        item = self._splits[split][int(row)]
        if isinstance(item, Mapping):  # a row of a Hugging Face data set
            item = [item[key] for key in ("image", "img", self._config.label_column) if key in item]
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise SourceError(f"{_label(name)}: expected an image and a label, got {type(item).__name__}.")
        return _picture(item[0], name, self._config.background), _class(item[1], name)

    def _image(self, name: str) -> Image.Image:
        with self._lock:
            picture, _ = self._item(name)
        if _checksum(picture) != self._checksums[name]:
            raise SourceError(
                f"{_label(name)} has changed since it was first read. Use a data set without random transforms."
            )
        return picture


@dataclass(frozen=True, eq=False)
class _Pairs:
    """A data set made from arrays of images and labels."""

    images: Any
    labels: Any

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise SourceError(
                f"data has {len(self.images):,} images but {len(self.labels):,} labels. Pass one label per image."
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Any, Any]:
        return self.images[row], self.labels[row]


def _label(name: str) -> str:
    split, _, row = name.rpartition("#")
    return f"image {row} of data {split!r}"


def _known_names(dataset: Any, config: SourceConfig) -> Any:
    """Return the class names of a torchvision or Hugging Face data set, or of a subset of one; None for others."""
    while not hasattr(dataset, "classes") and not hasattr(dataset, "features") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    if hasattr(dataset, "features"):
        return getattr(dataset.features.get(config.label_column), "names", None)
    names = getattr(dataset, "classes", None)
    return names and [name if isinstance(name, str) else ", ".join(name) for name in names]  # ImageNet has synonyms


def _class(label: Any, name: str) -> int | str:
    if isinstance(label, str):
        return label
    try:
        number = operator.index(label.item() if hasattr(label, "item") else label)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SourceError(f"{_label(name)}: expected an integer or a class name as label, got {label!r}.") from error
    if number < 0:
        raise SourceError(f"{_label(name)} has the negative label {number}. Leave out images without labels.")
    return number


def _picture(image: Any, name: str, background: str) -> Image.Image:
    """Return an image as an upright Pillow image, grey or RGB."""
    if isinstance(image, Image.Image):
        image.load()
        return flatten_image(image, background)
    array = np.asarray(image)
    if array.dtype.kind == "f" and array.size and array.min() >= 0 and array.max() <= 1:
        array = np.rint(255 * array).astype(np.uint8)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or 0 in array.shape or array.shape[2:] not in ((), (3,)):
        raise SourceError(
            f"{_label(name)}: expected uint8, or float in [0, 1], of shape (H, W), (H, W, C) or (C, H, W) with C = 1 "
            f"or 3; got {array.dtype} of shape {array.shape}."
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _checksum(picture: Image.Image) -> bytes:
    return hashlib.sha256(f"{picture.mode} {picture.size} ".encode() + picture.tobytes()).digest()
