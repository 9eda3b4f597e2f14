"""Reader for NumPy archives (.npz) with arrays of images and labels.

An array's header is checked against the size of the archive member before memory is allocated. Objects are never read.
"""

import io
import math
import tokenize
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from lsmix.data.errors import SourceError, format_bytes
from lsmix.data.readers.named_arrays import choose_names, number_classes, to_split
from lsmix.data.readers.source_images import (
    UNPACK_RATIO,
    PublishedData,
    SourceFormat,
    has_ending,
    most_unpacked,
    refused_if_damaged,
)
from lsmix.data.readers.trees import ARCHIVE_ERRORS, check_packing

__all__ = ["NPZ"]

_NAMES = "class_names"
_HEAD_BYTES = 1 << 14  # more than the longest header that NumPy reads
_MAX_DIMENSIONS = 4
_MAX_LENGTH = 1 << 48  # of a dimension
_LAST_CHARACTER = 0x10FFFF  # of Unicode
# Exceptions that NumPy raises for invalid headers, which it reads with Python's parser.
_HEADER_ERRORS = (ValueError, KeyError, TypeError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError)
_SPARE_BYTES = 256 << 20  # any compression ratio is allowed up to this size; labels, unlike images, can exceed 1000:1


def _recognise(path: Path) -> bool:
    return path.is_file() and has_ending(path, ".npz")


def _read(path: Path) -> PublishedData:
    where = repr(str(path))
    with (
        refused_if_damaged(where, "an .npz archive", *ARCHIVE_ERRORS, advice="Write it again."),
        zipfile.ZipFile(path) as archive,
    ):
        return _read_archive(path, archive)


def _read_archive(path: Path, archive: zipfile.ZipFile) -> PublishedData:
    unpacked = sum(info.file_size for info in archive.infolist())
    if unpacked > most_unpacked(path.stat().st_size, _SPARE_BYTES):
        raise SourceError(
            f"{str(path)!r} would unpack from {format_bytes(path.stat().st_size)} to {format_bytes(unpacked)}, more "
            f"than {UNPACK_RATIO} times its size. If you trust it, save it again uncompressed with numpy.savez."
        )
    keys = {name.removesuffix(".npy") for name in archive.namelist()}
    splits = {}
    for split, names in choose_names(repr(str(path)), keys, keys).items():
        images, labels = (_read_array(path, archive, name) for name in names)
        splits[split] = to_split(repr(str(path)), names, images, labels)
    named = _NAMES in keys
    class_names = _read_names(path, archive) if named else number_classes(repr(str(path)), splits)
    return PublishedData(splits=splits, class_names=class_names)


def _read_names(path: Path, archive: zipfile.ZipFile) -> tuple[str, ...]:
    names = _read_array(path, archive, _NAMES)
    if names.dtype.kind != "U" or names.ndim != 1:
        raise SourceError(
            f"{_NAMES!r} in {str(path)!r} must be a one-dimensional array of strings; got {names.dtype} of shape "
            f"{names.shape}. Save numpy.array([...names...])."
        )
    # Python would turn larger numbers into strings that cannot even be printed.
    if names.size and int(np.frombuffer(names.tobytes(), names.dtype.str[0] + "u4").max()) > _LAST_CHARACTER:
        raise SourceError(f"{_NAMES!r} in {str(path)!r} is damaged: it contains an invalid character. Write it again.")
    return tuple(names.tolist())


def _read_array(path: Path, archive: zipfile.ZipFile, key: str) -> npt.NDArray[Any]:
    info = archive.getinfo(f"{key}.npy" if f"{key}.npy" in archive.namelist() else key)
    where = f"{key!r} in {str(path)!r}"
    check_packing(info, where)
    with archive.open(info) as file:
        head = io.BytesIO(file.read(_HEAD_BYTES))  # limited, because a header may claim a length of four gigabytes
        with refused_if_damaged(where, "a NumPy array", *_HEADER_ERRORS, advice="Write it again."):
            read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(head)]
            shape, _, dtype = read_header(head)
        if dtype.hasobject or dtype.fields or dtype.subdtype or not dtype.itemsize:
            raise SourceError(
                f"{where} contains Python objects or records ({dtype}), which are never read. Save arrays of numbers."
            )
        # Not isinstance: NumPy's header parser accepts True as an integer, but reshape does not.
        plain = all(type(length) is int and 0 <= length < _MAX_LENGTH for length in shape)
        if len(shape) > _MAX_DIMENSIONS or not plain:
            raise SourceError(
                f"{where} is damaged: {str(shape)[:100]} is not a valid shape for images or labels. Write it again."
            )
        size = math.prod(shape) * dtype.itemsize
        if info.file_size - head.tell() != size:
            raise SourceError(
                f"{where} is damaged: {dtype} of shape {shape} needs {size} bytes, got {info.file_size - head.tell()}. "
                "Write it again."
            )
    with archive.open(info) as file:
        array: npt.NDArray[Any] = npy.read_array(file, allow_pickle=False)
    return array


NPZ = SourceFormat(name="npz", recognise=_recognise, read=_read)
