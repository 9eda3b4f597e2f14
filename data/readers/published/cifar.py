"""CIFAR-10 and CIFAR-100 as published: Python or binary batches, in their folder, the folder above it, or their tar.gz.

Every batch must be whole; how many images a batch has is free, so that subsets in the same layout are
read too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lsmix.data.errors import SourceError
from lsmix.data.readers.published.unpickler import load_batch
from lsmix.data.readers.source_images import PublishedData, SourceFormat, Split, check_complete, has_ending, join_splits
from lsmix.data.readers.trees import TREE_ENDINGS, open_published, peek_names, published_base

__all__ = ["CIFAR10_BINARY", "CIFAR10_PYTHON", "CIFAR100_BINARY", "CIFAR100_PYTHON"]

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE  # bytes of an image: three planes, row by row
_MAX_FILE_BYTES = 256 << 20  # the largest published one, train of CIFAR-100, has 156 MB
_CITATION = "A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009"


@dataclass(frozen=True, slots=True)
class _Layout:
    """One published form, and where labels and class names stand in it."""

    folder: str  # what the archive unpacks to
    archive: str  # its published name without ending, so that a damaged one is still known, and said to be damaged
    files: tuple[str, ...]  # in published order: of training batches, of the test batch, and with class names
    meta: str  # the file with the class names
    classes: int
    data_set: str = "CIFAR-10"  # for messages
    telling: int = 1  # so many of the files tell that a folder is of this form: "train" and "test" alone tell little
    # Of Python batches:
    labels_key: str = ""  # of the labels in a batch
    names_key: str = ""  # of the class names in meta
    # Of binary batches:
    label_bytes: int = 0  # in front of each image's pixels; 0 for Python batches
    label_at: int = 0  # which of them counts


def _recognise(layout: _Layout, path: Path) -> bool:
    """Tell whether a path looks like this form, whole or not."""
    if path.is_dir():
        bases = (path, path / layout.folder)
        return any(sum((base / name).is_file() for name in layout.files) >= layout.telling for base in bases)
    if not has_ending(path, TREE_ENDINGS[1:]):
        return False
    names = peek_names(path)
    if names:
        return any(name.split("/")[0] == layout.folder for name in names)
    return layout.folder in path.name or path.name.startswith(layout.archive)


def _files(layout: _Layout, path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    base = published_base(path, layout.folder)
    missing = [name for name in layout.files if not (base / name).is_file()]
    check_complete(base, layout.folder, missing)
    return [base / name for name in layout.files]


def _read(layout: _Layout, path: Path) -> PublishedData:
    with open_published(path, layout.folder) as tree:
        names = set(tree.names())
        check_complete(path, layout.folder, [name for name in layout.files if name not in names])

        def parsed(name: str) -> Split:
            parse_batch = _parse_binary_batch if layout.label_bytes else _parse_python_batch
            return parse_batch(layout, tree.label(name), tree.read(name, _MAX_FILE_BYTES))

        *train, test = [name for name in layout.files if "meta" not in name and "names" not in name]
        return PublishedData(
            splits={"train": join_splits(list(map(parsed, train))), "test": parsed(test)},
            class_names=_class_names(layout, tree.label(layout.meta), tree.read(layout.meta, _MAX_FILE_BYTES)),
            citation=_CITATION,  # of a licence the authors say nothing
        )


def _to_split(layout: _Layout, label: str, planes: np.ndarray[Any, np.dtype[np.uint8]], labels: Any) -> Split:
    """Turn planes uint8 (N, 3072) into images (N, 32, 32, 3)."""
    if not len(planes):
        raise SourceError(f"{label} holds no images. Fetch it again.")
    numbers = np.asarray(labels, np.int64)
    if numbers.min() < 0 or numbers.max() >= layout.classes:
        raise SourceError(
            f"{label} has labels in {numbers.min()}..{numbers.max()}, expected 0..{layout.classes - 1}. "
            f"It is damaged or no {layout.data_set}: fetch it again."
        )
    images = planes.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
    return Split(np.ascontiguousarray(images), numbers)


def _class_names(layout: _Layout, label: str, content: bytes) -> tuple[str, ...]:
    if layout.label_bytes:
        names: Any = content.split()
    else:
        names = _entry(layout, label, load_batch(content, name=label), layout.names_key)
        if not isinstance(names, list) or not all(isinstance(name, str | bytes) for name in names):
            raise SourceError(f"{label}: {layout.names_key!r} must be a list of names. Fetch it again.")
    if len(names) != layout.classes:
        raise SourceError(f"{label} names {len(names)} classes, expected {layout.classes}. Fetch it again.")
    return tuple(name if isinstance(name, str) else name.decode("utf-8", "replace") for name in names)


def _entry(layout: _Layout, label: str, batch: Mapping[str | bytes, Any], key: str) -> Any:
    for written in (key.encode(), key):  # Python 2 wrote bytes, Python 3 writes text
        if written in batch:
            return batch[written]
    raise SourceError(
        f"{label} has no {key!r}; it has {str(sorted(map(repr, batch)))[:200]}. Is it a batch of {layout.data_set}?"
    )


def _parse_python_batch(layout: _Layout, label: str, content: bytes) -> Split:
    batch = load_batch(content, name=label)
    planes, labels = _entry(layout, label, batch, "data"), _entry(layout, label, batch, layout.labels_key)
    if not isinstance(planes, np.ndarray) or planes.shape[1:] != (_PIXELS,):
        got = f"shape {planes.shape}" if isinstance(planes, np.ndarray) else type(planes).__name__
        raise SourceError(
            f"{label}: 'data' must be an array of shape (n, {_PIXELS}); got {got}. Is it a batch of {layout.data_set}?"
        )
    if not isinstance(labels, list) or not all(type(one) is int and 0 <= one < 256 for one in labels):
        raise SourceError(
            f"{label}: {layout.labels_key!r} must be a list of small integers. Is it a batch of {layout.data_set}?"
        )
    if len(labels) != len(planes):
        raise SourceError(f"{label} is not whole: {len(planes)} images, {len(labels)} labels. Fetch it again.")
    return _to_split(layout, label, planes, labels)


def _parse_binary_batch(layout: _Layout, label: str, content: bytes) -> Split:
    record = layout.label_bytes + _PIXELS
    whole, rest = divmod(len(content), record)
    if rest:
        labels = "one label" if layout.label_bytes == 1 else f"{layout.label_bytes} labels"
        raise SourceError(
            f"{label} is cut short or no binary batch: expected a multiple of {record} bytes ({labels} and "
            f"{_PIXELS} pixels an image), found {len(content)} = {whole} × {record} + {rest}. Fetch it again."
        )
    records = np.frombuffer(content, np.uint8).reshape(whole, record)
    return _to_split(layout, label, records[:, layout.label_bytes :], records[:, layout.label_at])


def _format(name: str, layout: _Layout, coarse: _Layout | None = None) -> SourceFormat:
    return SourceFormat(
        name=name,
        recognise=lambda path: _recognise(layout, path),
        files=lambda path: _files(layout, path),
        read=lambda path: _read(layout, path),
        variants={"coarse": _format(name, coarse)} if coarse else {},
    )


_BATCHES = (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch")
CIFAR10_PYTHON = _format(
    "cifar10-python",
    _Layout(
        folder="cifar-10-batches-py",
        archive="cifar-10-python",
        files=(*_BATCHES, "batches.meta"),
        meta="batches.meta",
        classes=10,
        labels_key="labels",
        names_key="label_names",
    ),
)
CIFAR10_BINARY = _format(
    "cifar10-binary",
    _Layout(
        folder="cifar-10-batches-bin",
        archive="cifar-10-binary",
        files=(*(f"{batch}.bin" for batch in _BATCHES), "batches.meta.txt"),
        meta="batches.meta.txt",
        classes=10,
        label_bytes=1,
    ),
)
_FINE_PYTHON = _Layout(
    folder="cifar-100-python",
    archive="cifar-100-python",
    files=("train", "test", "meta"),
    meta="meta",
    classes=100,
    data_set="CIFAR-100",
    telling=2,
    labels_key="fine_labels",
    names_key="fine_label_names",
)
CIFAR100_PYTHON = _format(
    "cifar100-python",
    _FINE_PYTHON,
    replace(_FINE_PYTHON, classes=20, labels_key="coarse_labels", names_key="coarse_label_names"),
)
_FINE_BINARY = _Layout(
    folder="cifar-100-binary",
    archive="cifar-100-binary",
    files=("train.bin", "test.bin", "fine_label_names.txt", "coarse_label_names.txt"),
    meta="fine_label_names.txt",
    classes=100,
    data_set="CIFAR-100",
    telling=2,
    label_bytes=2,
    label_at=1,  # the coarse label stands first
)
CIFAR100_BINARY = _format(
    "cifar100-binary", _FINE_BINARY, replace(_FINE_BINARY, meta="coarse_label_names.txt", classes=20, label_at=0)
)
