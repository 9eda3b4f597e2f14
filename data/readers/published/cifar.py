"""CIFAR-10 and CIFAR-100 as published: Python or binary batches.

Every batch must be whole; how many images a batch has is free, so that subsets in the same layout are
read too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lsmix.data.errors import SourceError
from lsmix.data.readers.published.cifar_files import CifarFiles
from lsmix.data.readers.published.unpickler import load_batch
from lsmix.data.readers.source_images import PublishedData, SourceFormat, Split

__all__ = ["CIFAR10_BINARY", "CIFAR10_PYTHON", "CIFAR100_BINARY", "CIFAR100_PYTHON"]

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE  # bytes of an image: three planes, row by row
_CITATION = "A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009"


@dataclass(frozen=True, slots=True)
class _Layout:
    """One published form, and where labels and class names stand in it."""

    files: CifarFiles
    data_set: str  # for messages
    train: tuple[str, ...]  # in published order
    test: str
    meta: str  # the file with the class names
    classes: int
    # Of Python batches:
    labels_key: str = ""  # of the labels in a batch
    names_key: str = ""  # of the class names in meta
    # Of binary batches:
    label_bytes: int = 0  # in front of each image's pixels; 0 for Python batches
    label_at: int = 0  # which of them counts


def _read(layout: _Layout, path: Path) -> PublishedData:
    binary = layout.label_bytes > 0
    parse_batch = _parse_binary_batch if binary else _parse_python_batch
    batches: dict[str, Split] = {}
    class_names: tuple[str, ...] = ()
    for name, label, content in layout.files.contents(path):
        if name == layout.meta:
            texts = content.decode("utf-8", "replace").split() if binary else _python_names(layout, label, content)
            class_names = _check_names(layout, label, texts)
        elif name in (*layout.train, layout.test):
            batches[name] = parse_batch(layout, label, content)
    train = [batches[name] for name in layout.train]
    return PublishedData(
        splits={
            "train": Split(
                np.concatenate([batch.images for batch in train]), np.concatenate([batch.labels for batch in train])
            ),
            "test": batches[layout.test],
        },
        class_names=class_names,
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


def _check_names(layout: _Layout, label: str, names: list[str]) -> tuple[str, ...]:
    if len(names) != layout.classes:
        raise SourceError(f"{label} names {len(names)} classes, expected {layout.classes}. Fetch it again.")
    return tuple(names)


# Python batches.


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
    if not isinstance(planes, np.ndarray) or planes.dtype != np.uint8 or planes.shape[1:] != (_PIXELS,):
        got = f"{planes.dtype} of shape {planes.shape}" if isinstance(planes, np.ndarray) else type(planes).__name__
        raise SourceError(
            f"{label}: 'data' must be uint8 of shape (n, {_PIXELS}); got {got}. Is it a batch of {layout.data_set}?"
        )
    if not isinstance(labels, list) or not all(type(one) is int and 0 <= one < 256 for one in labels):
        raise SourceError(
            f"{label}: {layout.labels_key!r} must be a list of small integers. Is it a batch of {layout.data_set}?"
        )
    if len(labels) != len(planes):
        raise SourceError(f"{label} is not whole: {len(planes)} images, {len(labels)} labels. Fetch it again.")
    return _to_split(layout, label, planes, labels)


def _python_names(layout: _Layout, label: str, content: bytes) -> list[str]:
    names = _entry(layout, label, load_batch(content, name=label), layout.names_key)
    if not isinstance(names, list) or not all(isinstance(name, str | bytes) for name in names):
        raise SourceError(f"{label}: {layout.names_key!r} must be a list of names. Fetch it again.")
    return [name if isinstance(name, str) else name.decode("utf-8", "replace") for name in names]


# Binary batches.


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


# The published forms.


def _format(name: str, layout: _Layout, variants: Mapping[str, _Layout] | None = None) -> SourceFormat:
    folder = layout.files.folder

    return SourceFormat(
        name=name,
        looks_for=f"{layout.train[0]!r} … {layout.meta!r} in the folder or in its {folder!r}, or their tar.gz",
        recognise=layout.files.recognise,
        files=layout.files.files,
        read=lambda path: _read(layout, path),
        variants={word: _format(name, other) for word, other in (variants or {}).items()},
    )


_BATCHES = tuple(f"data_batch_{k}" for k in range(1, 6))
_BINARY_BATCHES = tuple(f"{batch}.bin" for batch in _BATCHES)
CIFAR10_PYTHON = _format(
    "cifar10-python",
    _Layout(
        files=CifarFiles("cifar-10-batches-py", "cifar-10-python", (*_BATCHES, "test_batch", "batches.meta")),
        data_set="CIFAR-10",
        train=_BATCHES,
        test="test_batch",
        meta="batches.meta",
        classes=10,
        labels_key="labels",
        names_key="label_names",
    ),
)
CIFAR10_BINARY = _format(
    "cifar10-binary",
    _Layout(
        files=CifarFiles(
            "cifar-10-batches-bin", "cifar-10-binary", (*_BINARY_BATCHES, "test_batch.bin", "batches.meta.txt")
        ),
        data_set="CIFAR-10",
        train=_BINARY_BATCHES,
        test="test_batch.bin",
        meta="batches.meta.txt",
        classes=10,
        label_bytes=1,
    ),
)
_FINE_PYTHON = _Layout(
    files=CifarFiles("cifar-100-python", "cifar-100-python", ("train", "test", "meta"), telling=2),
    data_set="CIFAR-100",
    train=("train",),
    test="test",
    meta="meta",
    classes=100,
    labels_key="fine_labels",
    names_key="fine_label_names",
)
_COARSE_PYTHON = replace(_FINE_PYTHON, classes=20, labels_key="coarse_labels", names_key="coarse_label_names")
CIFAR100_PYTHON = _format("cifar100-python", _FINE_PYTHON, {"coarse": _COARSE_PYTHON})
_FINE_BINARY = _Layout(
    files=CifarFiles(
        "cifar-100-binary",
        "cifar-100-binary",
        ("train.bin", "test.bin", "fine_label_names.txt", "coarse_label_names.txt"),
        telling=2,
    ),
    data_set="CIFAR-100",
    train=("train.bin",),
    test="test.bin",
    meta="fine_label_names.txt",
    classes=100,
    label_bytes=2,
    label_at=1,  # the coarse label stands first
)
_COARSE_BINARY = replace(_FINE_BINARY, meta="coarse_label_names.txt", classes=20, label_at=0)
CIFAR100_BINARY = _format("cifar100-binary", _FINE_BINARY, {"coarse": _COARSE_BINARY})
