"""CIFAR-10 as published: Python or binary batches, in a folder or in the tar.gz they come in.

The one rule: nothing is extracted. The few members that count are read by exact name, into memory, and every batch must
be whole; how many images a batch has is free, so that subsets in the same layout are read too.
"""

import gzip
import io
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lsmix.data.errors import LsmixError, SourceError
from lsmix.data.source_images import PublishedData, SourceFormat, Split
from lsmix.data.unpickler import load_batch

__all__ = ["CIFAR10_BINARY", "CIFAR10_PYTHON"]

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE  # bytes of an image: three planes, row by row
_RECORD = 1 + _PIXELS  # bytes of an image in a binary batch: the label first
_CLASSES = 10
_MAX_FILE_BYTES = 256 << 20  # a published batch has 31 MB
_MAX_ARCHIVE_BYTES = 1 << 30  # unpacked; the published one has 186 MB
_CITATION = "A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009"


@dataclass(frozen=True, slots=True)
class _Layout:
    """Names of the files of one published form, and how to read their bytes."""

    folder: str  # what the archive unpacks to
    train: tuple[str, ...]  # in published order
    test: str
    meta: str  # holds the class names
    parse_batch: Callable[[str, bytes], Split]
    parse_meta: Callable[[str, bytes], tuple[str, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.train, self.test, self.meta)


# The published archives' names, so that a damaged one is still known, and said to be damaged.
_ARCHIVE_STEMS = {"cifar-10-batches-py": "cifar-10-python", "cifar-10-batches-bin": "cifar-10-binary"}


# Where the files lie.


def _recognise(layout: _Layout, path: Path) -> bool:
    if path.is_dir():
        return any((base / name).is_file() for base in (path, path / layout.folder) for name in layout.names)
    if not path.name.endswith((".tar.gz", ".tgz", ".tar")):
        return False
    try:
        with _open_archive(path) as archive:
            return any(_plain(member.name).split("/")[0] == layout.folder for member in archive)
    except SourceError:
        return layout.folder in path.name or path.name.startswith(_ARCHIVE_STEMS[layout.folder])


def _files(layout: _Layout, path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    base = path / layout.folder if (path / layout.folder).is_dir() else path
    missing = [name for name in layout.names if not (base / name).is_file()]
    if missing:
        raise SourceError(
            f"{str(base)!r} is not a whole {layout.folder}: {', '.join(map(repr, missing))} missing, expected "
            f"{', '.join(layout.names)}. Fetch the data set again, or check the path."
        )
    return [base / name for name in layout.names]


def _read(layout: _Layout, path: Path) -> PublishedData:
    contents = _read_archive(layout, path) if path.is_file() else _read_folder(layout, path)
    batches: dict[str, Split] = {}
    class_names: tuple[str, ...] = ()
    for name, label, content in contents:
        if name == layout.meta:
            class_names = layout.parse_meta(label, content)
        else:
            batches[name] = layout.parse_batch(label, content)
    train = [batches[name] for name in layout.train]
    return PublishedData(
        splits={
            "train": Split(
                np.concatenate([batch.images for batch in train]), np.concatenate([batch.labels for batch in train])
            ),
            "test": batches[layout.test],
        },
        class_names=class_names,
        citation=_CITATION,
    )


def _read_folder(layout: _Layout, path: Path) -> Iterator[tuple[str, str, bytes]]:
    for file in _files(layout, path):
        _check_size(repr(str(file)), file.stat().st_size)
        yield file.name, repr(str(file)), file.read_bytes()


def _read_archive(layout: _Layout, path: Path) -> Iterator[tuple[str, str, bytes]]:
    seen = set()
    with _open_archive(path) as archive:
        for member in archive:
            folder, _, name = _plain(member.name).partition("/")
            if folder != layout.folder or name not in layout.names:
                continue
            label = f"{name!r} in {str(path)!r}"
            if not member.isreg() or member.issparse() or name in seen:
                raise SourceError(f"{label} is no plain file, or is there twice. Do not use it, fetch the original.")
            seen.add(name)
            _check_size(label, member.size)
            file = archive.extractfile(member)
            yield name, label, file.read() if file else b""
    missing = [name for name in layout.names if name not in seen]
    if missing:
        raise SourceError(
            f"{str(path)!r} is not a whole {layout.folder}: {', '.join(map(repr, missing))} missing. "
            "Fetch the data set again, or check the path."
        )


def _check_size(label: str, size: int) -> None:
    if size > _MAX_FILE_BYTES:
        raise SourceError(f"{label} has {size} bytes; a batch of CIFAR has at most {_MAX_FILE_BYTES}. Wrong file?")


# The archive.


class _Bounded(io.RawIOBase):
    """A stream that refuses to yield more than a data set's worth, whatever an archive's headers claim."""

    def __init__(self, stream: Any, name: str) -> None:
        self._stream = stream
        self._name = name
        self._left = _MAX_ARCHIVE_BYTES

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        block: bytes = self._stream.read(min(size, self._left + 1) if size >= 0 else self._left + 1)
        self._left -= len(block)
        if self._left < 0:
            raise SourceError(
                f"{self._name} unpacks to more than {_MAX_ARCHIVE_BYTES} bytes; CIFAR does not. Fetch the original."
            )
        return block


@contextmanager
def _open_archive(path: Path) -> Iterator[tarfile.TarFile]:
    """Open a tar or tar.gz as a stream; whatever is wrong with it becomes a SourceError."""
    with ExitStack() as stack:
        try:
            raw = stack.enter_context(path.open("rb"))
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream = stack.enter_context(gzip.GzipFile(fileobj=raw)) if packed else raw
            bounded = _Bounded(stream, repr(str(path)))
            yield stack.enter_context(tarfile.open(fileobj=bounded, mode="r|"))
        except LsmixError:
            raise
        except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
            raise SourceError(f"{str(path)!r} is damaged, cut short or no tar.gz ({error}). Fetch it again.") from error


def _plain(member_name: str) -> str:
    return member_name.removeprefix("./")


# Their content.


def _to_split(label: str, planes: np.ndarray[Any, np.dtype[np.uint8]], labels: Any) -> Split:
    """Turn planes uint8 (N, 3072) into images (N, 32, 32, 3)."""
    if not len(planes):
        raise SourceError(f"{label} holds no images. Fetch it again.")
    numbers = np.asarray(labels, np.int64)
    if numbers.min() < 0 or numbers.max() >= _CLASSES:
        raise SourceError(
            f"{label} has labels in {numbers.min()}..{numbers.max()}, expected 0..{_CLASSES - 1}. "
            "It is damaged or no CIFAR-10: fetch it again."
        )
    images = planes.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
    return Split(np.ascontiguousarray(images), numbers)


def _entry(label: str, batch: dict[str | bytes, Any], key: str) -> Any:
    for written in (key.encode(), key):  # Python 2 wrote bytes, Python 3 writes text
        if written in batch:
            return batch[written]
    raise SourceError(
        f"{label} has no {key!r}; it has {str(sorted(map(repr, batch)))[:200]}. Is it a batch of CIFAR-10?"
    )


def _parse_python_batch(label: str, content: bytes) -> Split:
    batch = load_batch(content, name=label)
    planes, labels = _entry(label, batch, "data"), _entry(label, batch, "labels")
    if not isinstance(planes, np.ndarray) or planes.dtype != np.uint8 or planes.shape[1:] != (_PIXELS,):
        got = f"{planes.dtype} of shape {planes.shape}" if isinstance(planes, np.ndarray) else type(planes).__name__
        raise SourceError(
            f"{label}: 'data' must be uint8 of shape (n, {_PIXELS}); got {got}. Is it a batch of CIFAR-10?"
        )
    if not isinstance(labels, list) or not all(type(one) is int and 0 <= one < 256 for one in labels):
        raise SourceError(f"{label}: 'labels' must be a list of small integers. Is it a batch of CIFAR-10?")
    if len(labels) != len(planes):
        raise SourceError(f"{label} is not whole: {len(planes)} images, {len(labels)} labels. Fetch it again.")
    return _to_split(label, planes, labels)


def _parse_python_meta(label: str, content: bytes) -> tuple[str, ...]:
    names = _entry(label, load_batch(content, name=label), "label_names")
    if not isinstance(names, list) or not all(isinstance(name, str | bytes) for name in names):
        raise SourceError(f"{label}: 'label_names' must be a list of names. Fetch it again.")
    texts = [name if isinstance(name, str) else name.decode("utf-8", "replace") for name in names]
    return _check_names(label, texts)


def _parse_binary_batch(label: str, content: bytes) -> Split:
    whole, rest = divmod(len(content), _RECORD)
    if rest:
        raise SourceError(
            f"{label} is cut short or no binary batch: expected a multiple of {_RECORD} bytes (one label and "
            f"{_PIXELS} pixels an image), found {len(content)} = {whole} × {_RECORD} + {rest}. Fetch it again."
        )
    records = np.frombuffer(content, np.uint8).reshape(whole, _RECORD)
    return _to_split(label, records[:, 1:], records[:, 0])


def _parse_binary_meta(label: str, content: bytes) -> tuple[str, ...]:
    return _check_names(label, content.decode("utf-8", "replace").split())


def _check_names(label: str, names: list[str]) -> tuple[str, ...]:
    if len(names) != _CLASSES:
        raise SourceError(f"{label} names {len(names)} classes, expected {_CLASSES}. Fetch it again.")
    return tuple(names)


def _format(name: str, layout: _Layout) -> SourceFormat:
    return SourceFormat(
        name=name,
        looks_for=f"{layout.train[0]!r} … {layout.meta!r} in the folder or in its {layout.folder!r}, or their tar.gz",
        recognise=lambda path: _recognise(layout, path),
        files=lambda path: _files(layout, path),
        read=lambda path: _read(layout, path),
    )


CIFAR10_PYTHON = _format(
    "cifar10-python",
    _Layout(
        folder="cifar-10-batches-py",
        train=tuple(f"data_batch_{k}" for k in range(1, 6)),
        test="test_batch",
        meta="batches.meta",
        parse_batch=_parse_python_batch,
        parse_meta=_parse_python_meta,
    ),
)
CIFAR10_BINARY = _format(
    "cifar10-binary",
    _Layout(
        folder="cifar-10-batches-bin",
        train=tuple(f"data_batch_{k}.bin" for k in range(1, 6)),
        test="test_batch.bin",
        meta="batches.meta.txt",
        parse_batch=_parse_binary_batch,
        parse_meta=_parse_binary_meta,
    ),
)
