"""Read the numeric arrays of a MATLAB 5 file (.mat), the format of SVHN.

SciPy is not used because SciPy 1.17 can crash with a segmentation fault on files with a flipped byte.

Format: a header of 128 bytes, then elements, each of which is a tag (type, number of bytes) and its content. A matrix
consists of further elements: flags with its class, dimensions, name, and numbers in Fortran order, whose type may be
smaller than the class. A compressed element is a zlib stream that contains a matrix.
"""

import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lsmix.data.errors import SourceError, format_bytes
from lsmix.data.readers.source_images import most_unpacked, refused_if_damaged

__all__ = ["read_arrays"]

_HEADER_BYTES = 128
_COMPRESSED, _MATRIX = 15, 14  # element types
_NUMBERS = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"}
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
_COMPLEX = 0x0800  # in the flags of a matrix
_PADDING_BYTES = 64  # upper bound of the padding after the numbers of a matrix
_MAX_BYTES = 2 << 30  # per array; the largest published one, extra_32x32.mat of SVHN, has 1.6 GB
_SPARE_BYTES = 64 << 20  # any compression ratio is allowed up to this size


def read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Return the real numeric arrays in a file by name.

    Raises:
        SourceError: The file is damaged, is not a MATLAB 5 file, or has an array with an implausible compression ratio.
    """
    arrays: dict[str, npt.NDArray[Any]] = {}
    with refused_if_damaged(repr(str(path)), "a MATLAB 5 file", ValueError, LookupError, struct.error, zlib.error):
        for matrix in _matrices(path):
            name, numbers = _parse(matrix)
            if numbers is not None and name not in arrays:
                arrays[name] = numbers
    return arrays


def _matrices(path: Path) -> Iterator[bytes]:
    """Yield every matrix, decompressed."""
    with path.open("rb") as stream:
        header = stream.read(_HEADER_BYTES)
        if header.startswith(b"MATLAB 7.3"):
            raise SourceError(f"{str(path)!r} is a MATLAB 7.3 file; expected MATLAB 5. Download the original file.")
        if header[126:] != b"IM":
            raise ValueError("it has an unknown header")
        size = path.stat().st_size
        while tag := stream.read(8):
            kind, length = struct.unpack("<II", tag)
            if kind not in (_COMPRESSED, _MATRIX) or length > size - stream.tell():
                raise ValueError(f"its element at byte {stream.tell() - 8:,} of {size:,} is truncated or invalid")
            content = stream.read(length)
            yield _unpacked(path, content) if kind == _COMPRESSED else tag + content


def _unpacked(path: Path, content: bytes) -> bytes:
    most = min(_MAX_BYTES, most_unpacked(len(content), _SPARE_BYTES))
    unpacker = zlib.decompressobj()
    matrix = unpacker.decompress(content, most)
    if unpacker.unconsumed_tail:
        raise SourceError(
            f"an array in {str(path)!r} would unpack from {format_bytes(len(content))} to more than "
            f"{format_bytes(most)}, which is not plausible for a data set. Download the original file."
        )
    if not unpacker.eof:  # zlib verifies the checksum only at the end of the stream
        raise ValueError("a compressed array is truncated")
    return matrix


def _parse(matrix: bytes) -> tuple[str, npt.NDArray[Any] | None]:
    """Return the name and the array of a matrix; ("", None) if it does not contain real numbers."""
    kind, _, flags_type, flags_bytes, flags = struct.unpack_from("<5I", matrix)
    if (kind, flags_type, flags_bytes) != (_MATRIX, 6, 8):
        raise ValueError("an array has an unknown header")
    if flags & 0xFF not in _CLASSES or flags & _COMPLEX:
        return "", None
    _, dimensions, after = _element(matrix, 24)
    _, name, after = _element(matrix, after)
    stored, numbers, after = _element(matrix, after)
    shape = struct.unpack(f"<{len(dimensions) // 4}i", dimensions)
    label, dtype = bytes(name).decode("latin-1"), np.dtype(_NUMBERS[stored])
    if len(matrix) - after > _PADDING_BYTES:
        raise ValueError(f"{label!r} is longer than its numbers")
    if not shape or min(shape) < 0 or math.prod(shape) * dtype.itemsize != len(numbers):
        raise ValueError(f"{label!r} of shape {shape} does not match its {len(numbers):,} bytes")
    return label, np.frombuffer(numbers, dtype).astype(_CLASSES[flags & 0xFF], copy=False).reshape(shape, order="F")


def _element(matrix: bytes, at: int) -> tuple[int, memoryview, int]:
    """Return the type and content of the element at an offset, and the offset of the next element, a multiple of 8.

    A small element has its type and length in one number, directly followed by its content.
    """
    kind, length = struct.unpack_from("<II", matrix, at)
    begin = at + 8
    if kind >> 16:
        kind, length, begin = kind & 0xFFFF, kind >> 16, at + 4
    content = memoryview(matrix)[begin : begin + length]
    if len(content) < length:
        raise ValueError("an element extends beyond its array")
    return kind, content, -(-(begin + length) // 8) * 8
