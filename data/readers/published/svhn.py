"""Reader for the cropped digits of SVHN: ``train_32x32.mat``, ``test_32x32.mat`` and optionally ``extra_32x32.mat``.

The published label 10, which stands for the digit 0, becomes 0. Extra images are appended to the training images.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lsmix.data.errors import SourceError
from lsmix.data.readers.published.mat5 import read_arrays
from lsmix.data.readers.source_images import PublishedData, SourceFormat, Split, check_complete, join_splits

__all__ = ["SVHN"]

_TRAIN, _TEST, _EXTRA = "train_32x32.mat", "test_32x32.mat", "extra_32x32.mat"
_SHAPE = (32, 32, 3)


def _recognise(path: Path) -> bool:
    return path.is_dir() and any((path / name).is_file() for name in (_TRAIN, _TEST, _EXTRA))


def _files(path: Path, names: tuple[str, ...]) -> list[Path]:
    if not path.is_dir():
        raise SourceError(f"{str(path)!r} is not a folder. Set data.path to the folder with {_TRAIN!r} and {_TEST!r}.")
    missing = [name for name in names if not (path / name).is_file()]
    advice = "Download it, or set extra = false." if missing == [_EXTRA] else "Download the data set again."
    check_complete(path, "SVHN", missing, advice)
    return [path / name for name in names]


def _read(path: Path, names: tuple[str, ...]) -> PublishedData:
    splits = {file.name: _read_file(file) for file in _files(path, names)}
    train = join_splits([splits[name] for name in (_TRAIN, _EXTRA) if name in splits])
    return PublishedData(
        splits={"train": train, "test": splits[_TEST]},
        class_names=tuple("0123456789"),
        licence="for non-commercial use only",
        citation="Y. Netzer, T. Wang, A. Coates, A. Bissacco, B. Wu and A. Y. Ng, Reading Digits in Natural Images with "
        "Unsupervised Feature Learning, 2011",
    )


def _read_file(file: Path) -> Split:
    name, found = repr(str(file)), read_arrays(file)
    if not {"X", "y"} <= set(found):
        raise SourceError(
            f"{name} must contain numeric arrays 'X' and 'y'; it contains {list(found)[:20]}. Is it SVHN?"
        )
    pixels, digits = found["X"], found["y"]
    if pixels.dtype != np.uint8 or len(pixels.shape) != 4 or pixels.shape[:3] != _SHAPE or not pixels.shape[3]:
        raise SourceError(
            f"{name}: 'X' must be uint8 of shape (32, 32, 3, n); got {pixels.dtype} {pixels.shape}. Is it SVHN?"
        )
    count = pixels.shape[3]
    if digits.shape not in ((count, 1), (1, count)):
        raise SourceError(
            f"{name}: 'y' must have the shape ({count}, 1), one per image; got {digits.shape}. Is it SVHN?"
        )
    labels = _to_labels(name, digits.ravel())
    return Split(np.ascontiguousarray(pixels.transpose(3, 0, 1, 2)), labels)


def _to_labels(name: str, digits: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    if not ((digits >= 1) & (digits <= 10) & (digits % 1 == 0)).all():
        raise SourceError(
            f"{name}: 'y' must contain integers from 1 to 10, where 10 is the digit 0; got others. Is it SVHN?"
        )
    return digits.astype(np.int64) % 10


def _format(names: tuple[str, ...], variants: dict[str, SourceFormat]) -> SourceFormat:
    return SourceFormat(
        name="svhn",
        recognise=_recognise,
        files=lambda path: _files(path, names),
        read=lambda path: _read(path, names),
        variants=variants,
    )


SVHN = _format((_TRAIN, _TEST), {"extra": _format((_TRAIN, _TEST, _EXTRA), {})})
