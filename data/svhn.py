"""SVHN, cropped digits, as published: ``train_32x32.mat``, ``test_32x32.mat`` and perhaps ``extra_32x32.mat``.

The one rule: SciPy sees a file only after its parts were found to add up, to unpack to a data set's worth at most, and to
hold plain numbers of the right shape. The label 10 stands for the digit 0 and becomes 0.
"""

import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from lsmix.data.errors import SourceError
from lsmix.data.source_images import PublishedData, SourceFormat, Split

__all__ = ["SVHN"]

_TRAIN, _TEST, _EXTRA = "train_32x32.mat", "test_32x32.mat", "extra_32x32.mat"
_SHAPE = (32, 32, 3)
_NUMBERS = frozenset([*(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)), "single", "double"])

_HEADER_BYTES = 128
_COMPRESSED, _MATRIX = 15, 14  # types of a MATLAB 5 file's parts
_BLOCK_BYTES = 1 << 20
_MAX_BYTES = 2 << 30  # unpacked; extra_32x32.mat, the largest, has 1.6 GB
_RATIO = 100  # a part that unpacks to more than this many times the file's size …
_RATIO_BYTES = 64 << 20  # … and to more than this is a bomb


def _recognise(path: Path) -> bool:
    return path.is_dir() and any((path / name).is_file() for name in (_TRAIN, _TEST, _EXTRA))


def _files(path: Path, names: tuple[str, ...]) -> list[Path]:
    if not path.is_dir():
        raise SourceError(f"{str(path)!r} is no folder; SVHN is a folder with {_TRAIN!r} and {_TEST!r}. Give that.")
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        less = "Fetch it, or say extra = false." if missing == [_EXTRA] else "Fetch the data set again."
        raise SourceError(f"{str(path)!r} is not a whole SVHN: {', '.join(map(repr, missing))} missing. {less}")
    return [path / name for name in names]


def _read(path: Path, names: tuple[str, ...]) -> PublishedData:
    splits = {file.name: _read_file(file) for file in _files(path, names)}
    train = splits[_TRAIN]
    if _EXTRA in splits:
        more = splits.pop(_EXTRA)
        train = Split(np.concatenate([train.images, more.images]), np.concatenate([train.labels, more.labels]))
    return PublishedData(
        splits={"train": train, "test": splits[_TEST]},
        class_names=tuple("0123456789"),
        licence="for non-commercial use only",
        citation="Y. Netzer, T. Wang, A. Coates, A. Bissacco, B. Wu and A. Y. Ng, Reading Digits in Natural Images with "
        "Unsupervised Feature Learning, 2011",
    )


def _read_file(file: Path) -> Split:
    # Imported here since it takes a while, which no other format should pay.
    from scipy.io import loadmat, whosmat

    name = repr(str(file))
    with _as_source_error(name):
        _check_parts(file, name)
        count = _check_arrays(name, whosmat(file, appendmat=False))
        arrays = loadmat(file, appendmat=False, variable_names=["X", "y"])
        pixels, digits = arrays.get("X"), arrays.get("y")
    images_found = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape == (*_SHAPE, count)
    if not images_found or not isinstance(digits, np.ndarray) or digits.size != count:
        raise SourceError(f"{name} holds other arrays than its headers say. Do not use it, fetch the original.")
    return Split(np.ascontiguousarray(pixels.transpose(3, 0, 1, 2)), _to_labels(name, digits.ravel()))


def _to_labels(name: str, digits: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    if digits.dtype.kind not in "iuf" or not ((digits >= 1) & (digits <= 10) & (digits % 1 == 0)).all():
        raise SourceError(
            f"{name}: 'y' must hold whole numbers from 1 to 10, where 10 is the digit 0; got others. Is it SVHN?"
        )
    return digits.astype(np.int64) % 10


def _check_arrays(name: str, listed: list[tuple[str, tuple[int, ...], str]]) -> int:
    """Return the number of images that the headers of 'X' and 'y' agree on."""
    found = {array: (tuple(shape), kind) for array, shape, kind in listed}
    if len(found) < len(listed) or not {"X", "y"} <= set(found):
        raise SourceError(
            f"{name} must hold 'X' and 'y' once each; it holds {[array for array, _, _ in listed][:20]}. Is it SVHN?"
        )
    (shape, kind), (label_shape, label_kind) = found["X"], found["y"]
    if kind != "uint8" or len(shape) != 4 or shape[:3] != _SHAPE or not shape[3]:
        raise SourceError(f"{name}: 'X' must be uint8 of shape (32, 32, 3, n); got {kind} of shape {shape}.")
    if label_kind not in _NUMBERS or label_shape not in ((shape[3], 1), (1, shape[3])):
        raise SourceError(
            f"{name}: 'y' must be numbers of shape ({shape[3]}, 1), one an image; got {label_kind} of shape {label_shape}."
        )
    return shape[3]


# A file before SciPy: a header of 128 bytes, then parts, each a tag (type, bytes) and its content, mostly compressed.


def _check_parts(file: Path, name: str) -> None:
    size = file.stat().st_size
    budget = min(_MAX_BYTES, max(_RATIO_BYTES, _RATIO * size))
    with file.open("rb") as stream:
        header = stream.read(_HEADER_BYTES)
        if header.startswith(b"MATLAB 7.3"):
            raise SourceError(f"{name} is a MATLAB 7.3 file; SVHN is published as MATLAB 5. Fetch the original.")
        order = {b"IM": "<", b"MI": ">"}.get(header[126:])
        if order is None:
            raise SourceError(f"{name} is damaged or no MATLAB 5 file. Fetch it again.")
        while (position := stream.tell()) < size:
            tag = stream.read(8)
            kind, length = struct.unpack(f"{order}II", tag) if len(tag) == 8 else (0, size)
            if position + 8 + length > size or kind not in (_COMPRESSED, _MATRIX):
                raise SourceError(f"{name} is damaged or cut short at byte {position} of {size}. Fetch it again.")
            if kind == _COMPRESSED:
                budget -= _unpacked_bytes(stream, length, budget, name)
            stream.seek(position + 8 + length)


def _unpacked_bytes(stream: IO[bytes], length: int, budget: int, name: str) -> int:
    """Return how long a compressed part is unpacked, without keeping it."""
    unpacker, unpacked = zlib.decompressobj(), 0
    while length and not unpacker.eof:
        packed = stream.read(min(length, _BLOCK_BYTES))
        length -= len(packed)
        while packed and not unpacker.eof:
            unpacked += len(unpacker.decompress(packed, _BLOCK_BYTES))
            packed = unpacker.unconsumed_tail
            if unpacked > budget:
                raise SourceError(f"{name} unpacks to far more than SVHN can. Do not use it, fetch the original.")
    if not unpacker.eof:
        raise SourceError(f"{name} is damaged: a compressed part is cut short. Fetch it again.")
    return unpacked


@contextmanager
def _as_source_error(name: str) -> Iterator[None]:
    """Turn whatever SciPy raises on a damaged file, or warns of, into a SourceError."""
    from scipy.io.matlab import MatReadError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    except SourceError:
        raise
    except (
        MatReadError, OSError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, MemoryError,
        RuntimeError, AttributeError, AssertionError, Warning, struct.error, zlib.error,
    ) as error:  # fmt: skip
        raise SourceError(f"{name} is damaged ({type(error).__name__}: {error}). Fetch it again.") from error


def _format(names: tuple[str, ...], variants: dict[str, SourceFormat]) -> SourceFormat:
    return SourceFormat(
        name="svhn",
        looks_for=f"{_TRAIN!r} and {_TEST!r} in the folder",
        recognise=_recognise,
        files=lambda path: _files(path, names),
        read=lambda path: _read(path, names),
        variants=variants,
    )


SVHN = _format((_TRAIN, _TEST), {"extra": _format((_TRAIN, _TEST, _EXTRA), {})})
