"""Reader for CIFAR-10 and CIFAR-100 as published: Python or binary batches, in a folder, its parent folder, or a tar.

Every batch must be complete, but may have any number of images, so subsets in the same layout can be read too.
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
_PIXELS = 3 * _SIDE * _SIDE  # bytes per image: three planes, row by row
_MAX_FILE_BYTES = 256 << 20  # the largest published file, train of CIFAR-100, has 156 MB
_CITATION = "A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009"


@dataclass(frozen=True, slots=True)
class _Layout:
    """A published layout: its files, and the location of labels and class names in them."""

    folder: str  # the folder in the archive
    archive: str  # published name without extension; identifies a damaged archive, so that it is reported as damaged
    files: tuple[str, ...]  # in published order: training batches, test batch, and files with class names
    meta: str  # the file with the class names
    classes: int
    data_set: str = "CIFAR-10"  # for messages
    min_files: int = 1  # number of these files by which a folder is recognised: a "test" alone could be anything
    # For Python batches:
    labels_key: str = ""  # key of the labels in a batch
    names_key: str = ""  # key of the class names in meta
    # For binary batches:
    label_bytes: int = 0  # bytes before the pixels of each image; 0 for Python batches
    label_at: int = 0  # index of the label in these bytes


def _recognise(layout: _Layout, path: Path) -> bool:
    """Return whether a path looks like this layout, complete or not."""
    if path.is_dir():
        bases = (path, path / layout.folder)
        return any(sum((base / name).is_file() for name in layout.files) >= layout.min_files for base in bases)
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
            citation=_CITATION,  # the authors state no licence
        )


def _to_split(layout: _Layout, label: str, planes: np.ndarray[Any, np.dtype[np.uint8]], labels: Any) -> Split:
    """Turn planes uint8 (N, 3072) into images (N, 32, 32, 3)."""
    if not len(planes):
        raise SourceError(f"{label} contains no images. Download it again.")
    numbers = np.asarray(labels, np.int64)
    if numbers.min() < 0 or numbers.max() >= layout.classes:
        raise SourceError(
            f"{label} has labels from {numbers.min()} to {numbers.max()}, expected 0 to {layout.classes - 1}. "
            f"It is damaged or not {layout.data_set}. Download it again."
        )
    images = planes.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
    return Split(np.ascontiguousarray(images), numbers)


def _class_names(layout: _Layout, label: str, content: bytes) -> tuple[str, ...]:
    if layout.label_bytes:
        names: Any = content.split()
    else:
        names = _entry(layout, label, load_batch(content, name=label), layout.names_key)
        if not isinstance(names, list) or not all(isinstance(name, str | bytes) for name in names):
            raise SourceError(f"{label}: {layout.names_key!r} must be a list of names. Download it again.")
    if len(names) != layout.classes:
        raise SourceError(f"{label} has {len(names)} class names, expected {layout.classes}. Download it again.")
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
        raise SourceError(f"{label} is damaged: {len(planes):,} images but {len(labels):,} labels. Download it again.")
    return _to_split(layout, label, planes, labels)


def _parse_binary_batch(layout: _Layout, label: str, content: bytes) -> Split:
    record = layout.label_bytes + _PIXELS
    count, rest = divmod(len(content), record)
    if rest:
        labels = "one label" if layout.label_bytes == 1 else f"{layout.label_bytes} labels"
        raise SourceError(
            f"{label} is truncated or not a binary batch: expected a multiple of {record} bytes ({labels} and "
            f"{_PIXELS} pixels per image), got {len(content)} = {count} × {record} + {rest}. Download it again."
        )
    records = np.frombuffer(content, np.uint8).reshape(count, record)
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
    min_files=2,
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
    min_files=2,
    label_bytes=2,
    label_at=1,  # after the coarse label
)
CIFAR100_BINARY = _format(
    "cifar100-binary", _FINE_BINARY, replace(_FINE_BINARY, meta="coarse_label_names.txt", classes=20, label_at=0)
)
