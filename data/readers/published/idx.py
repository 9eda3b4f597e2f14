"""Reader for MNIST and data sets in its format (Fashion-MNIST, KMNIST): a folder with four idx files or .gz files."""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lsmix.data.errors import SourceError
from lsmix.data.readers.named_arrays import number_classes
from lsmix.data.readers.source_images import (
    PublishedData,
    SourceFormat,
    Split,
    check_complete,
    check_file,
    refused_if_damaged,
)

__all__ = ["IDX"]

_PREFIXES = {"train": "train", "test": "t10k"}
_KINDS = {"images": ("images-idx3-ubyte", 3), "labels": ("labels-idx1-ubyte", 1)}  # name and number of dimensions
_UINT8 = 8  # third byte of the magic number
_MAX_BYTES = 4 << 30  # per array


def _find(path: Path, split: str, kind: str) -> Path | None:
    name = f"{_PREFIXES[split]}-{_KINDS[kind][0]}"
    names = (name, f"{name}.gz", name.replace("-idx", ".idx"))
    return next((path / one for one in names if (path / one).is_file()), None)


def _files(path: Path) -> list[Path]:
    found = {(split, kind): _find(path, split, kind) for split in _PREFIXES for kind in _KINDS}
    missing = [f"{_PREFIXES[split]}-{_KINDS[kind][0]}" for (split, kind), file in found.items() if file is None]
    check_complete(path, "MNIST", missing)
    return [file for file in found.values() if file]


def _read(path: Path) -> PublishedData:
    arrays = [_read_array(file, dimensions) for file, dimensions in zip(_files(path), (3, 1, 3, 1), strict=True)]
    splits = {
        split: Split(images[..., None], labels.astype(np.int64))
        for split, images, labels in zip(_PREFIXES, arrays[::2], arrays[1::2], strict=True)
    }
    return PublishedData(splits=splits, class_names=number_classes(repr(str(path)), splits))


def _read_array(file: Path, dimensions: int) -> npt.NDArray[Any]:
    check_file(file)
    head_bytes = 4 * (1 + dimensions)
    with (
        refused_if_damaged(repr(str(file)), "an idx file", OSError, EOFError, struct.error, zlib.error),
        gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream,
    ):
        magic, *shape = struct.unpack(f">{1 + dimensions}I", stream.read(head_bytes))
        size = math.prod(shape)
        if magic != (_UINT8 << 8) + dimensions or size > _MAX_BYTES:
            raise SourceError(
                f"{str(file)!r} is not an idx file with bytes in {dimensions} dimension(s). Download it again."
            )
        if file.suffix != ".gz" and file.stat().st_size != head_bytes + size:
            raise SourceError(f"{str(file)!r} must have {head_bytes + size:,} bytes. Download it again.")
        content = b"".join(_pieces(stream, size))
    if len(content) != size:
        got = f"only {len(content):,}" if len(content) < size else "more"
        raise SourceError(f"{str(file)!r} must contain {size:,} bytes of data, got {got}. Download it again.")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _pieces(stream: Any, size: int) -> Any:
    """Yield up to ``size`` + 1 bytes in pieces, because ``read(size)`` would allocate a size that may be wrong."""
    left = size + 1
    while left and (piece := stream.read(min(left, 1 << 20))):
        left -= len(piece)
        yield piece


IDX = SourceFormat(
    name="idx",
    recognise=lambda path: path.is_dir() and _find(path, "train", "images") is not None,
    files=_files,
    read=_read,
)
