"""Numeric arrays of a MATLAB 5 file (.mat), as SVHN is published in.

An array's header is checked against what the file holds before any memory is taken, and whatever is no plain
array of real numbers is passed over. Read by code of our own, since SciPy 1.17 was seen to end the process with a
segmentation fault on files with a flipped byte.

Format: a header of 128 bytes, then elements, each a tag (type, bytes) and its content. A matrix consists of elements in
turn: flags with its class, dimensions, name, numbers in Fortran order and perhaps a smaller type than its class. A
compressed element is a zlib stream that holds a matrix.
"""

import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from lsmix.data.errors import SourceError

__all__ = ["MatArray", "list_arrays"]

_HEADER_BYTES = 128
_COMPRESSED, _MATRIX = 15, 14  # types of elements
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
_COMPLEX = 0x0800  # in a matrix's flags
_HEAD_BYTES = 256  # more than any header of a matrix with up to _MAX_DIMENSIONS, whose name has up to 63 characters
_PACKED_HEAD_BYTES = 4096  # which unpack to a header at least
_PADDING_BYTES = 64  # more than can follow the numbers of a matrix
_MAX_DIMENSIONS = 8
_MAX_ELEMENTS = 1000
_MAX_BYTES = 2 << 30  # of an array; extra_32x32.mat of SVHN, the largest published one, has 1.6 GB
_RATIO = 100  # an array that unpacks to more than this many times its bytes in the file …
_RATIO_BYTES = 64 << 20  # … and to more than this is a bomb


@dataclass(frozen=True, slots=True, kw_only=True)
class MatArray:
    """An array that a file holds, known by its header."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    stored: np.dtype[Any]  # what its numbers are written as
    position: int  # in the file, of the matrix or of its zlib stream
    length: int  # bytes there
    packed: bool
    offset: int  # in the matrix, of the numbers

    def read(self) -> npt.NDArray[Any]:
        """Return the numbers.

        Raises:
            SourceError: they are cut short.
        """
        size = math.prod(self.shape) * self.stored.itemsize
        with self.path.open("rb") as stream:
            stream.seek(self.position)
            content = stream.read(self.length)
        if self.packed:
            content = self._unpacked(content, self.offset + size)
        if len(content) < self.offset + size:
            raise SourceError(f"{self.name!r} of {str(self.path)!r} is cut short. Fetch it again.")
        numbers = np.frombuffer(content, self.stored, math.prod(self.shape), self.offset)
        return numbers.astype(self.dtype, copy=False).reshape(self.shape, order="F")

    def _unpacked(self, content: bytes, size: int) -> bytes:
        unpacker = zlib.decompressobj()
        try:
            unpacked = unpacker.decompress(content, size + _PADDING_BYTES)
        except zlib.error as error:
            raise SourceError(f"{self.name!r} of {str(self.path)!r} is damaged ({error}). Fetch it again.") from error
        if not unpacker.eof:  # only at its end does zlib compare the checksum
            raise SourceError(f"{self.name!r} of {str(self.path)!r} does not end where it should. Fetch it again.")
        return unpacked


def list_arrays(path: Path) -> list[MatArray]:
    """Return the plain numeric arrays of a file, by their headers.

    Raises:
        SourceError: it is no MATLAB 5 file, damaged, or has an array that would unpack to far more than it is.
    """
    where, size = repr(str(path)), path.stat().st_size
    found: list[MatArray] = []
    with path.open("rb") as stream:
        header = stream.read(_HEADER_BYTES)
        if header.startswith(b"MATLAB 7.3"):
            raise SourceError(f"{where} is a MATLAB 7.3 file; expected MATLAB 5. Fetch the original.")
        order = {b"IM": "<", b"MI": ">"}.get(header[126:])
        if order is None:
            raise SourceError(f"{where} is damaged or no MATLAB 5 file. Fetch it again.")
        for _ in range(_MAX_ELEMENTS):
            position = stream.tell()
            if position == size:
                return found
            tag = stream.read(8)
            kind, length = struct.unpack(f"{order}II", tag) if len(tag) == 8 else (0, 0)
            if kind not in (_COMPRESSED, _MATRIX) or length > size - position - 8:
                raise SourceError(f"{where} is damaged or cut short at byte {position} of {size}. Fetch it again.")
            # A matrix that is not compressed has its tag here already; it is read again, to begin alike.
            start, length = (position + 8, length) if kind == _COMPRESSED else (position, length + 8)
            stream.seek(start)
            head = _head(stream, length, packed=kind == _COMPRESSED)
            array = _parse_head(path, head, order, start, length, packed=kind == _COMPRESSED)
            found += [array] if array else []
            stream.seek(start + length)
    raise SourceError(f"{where} has more than {_MAX_ELEMENTS} arrays, as no published data set does. Wrong file?")


def _head(stream: IO[bytes], length: int, *, packed: bool) -> bytes:
    """Return the first bytes of a matrix, or fewer where there are no more."""
    if not packed:
        return stream.read(min(length, _HEAD_BYTES))
    try:
        return zlib.decompressobj().decompress(stream.read(min(length, _PACKED_HEAD_BYTES)), _HEAD_BYTES)
    except zlib.error as error:
        raise SourceError(f"{stream.name!r} is damaged ({error}). Fetch it again.") from error


def _parse_head(path: Path, head: bytes, order: str, position: int, length: int, *, packed: bool) -> MatArray | None:
    """Return what the beginning of a matrix says; None for one of another kind than real numbers."""
    try:
        kind, total = struct.unpack_from(f"{order}II", head)
        flags_type, flags_bytes, flags = struct.unpack_from(f"{order}III", head, 8)
        if (kind, flags_type, flags_bytes) != (_MATRIX, 6, 8):
            raise SourceError(f"an array of {str(path)!r} at byte {position} is damaged. Fetch it again.")
        if flags & 0xFF not in _CLASSES or flags & _COMPLEX:
            return None
        _, dimensions, after = _element(head, order, 24)
        _, name, after = _element(head, order, after)
        stored, numbers, offset = _tag(head, order, after)
        shape = struct.unpack(f"{order}{len(dimensions) // 4}i", dimensions)
        stored_type = np.dtype(order + _NUMBERS[stored])
    except (struct.error, KeyError) as error:
        raise SourceError(f"an array of {str(path)!r} at byte {position} is damaged. Fetch it again.") from error
    label = f"{name.decode('latin-1')!r} of {str(path)!r}"
    size = math.prod(shape) * stored_type.itemsize
    if not 2 <= len(shape) <= _MAX_DIMENSIONS or min(shape) < 0 or size != numbers or offset + size > total + 8:
        raise SourceError(f"{label} is damaged: shape {shape} needs {size} bytes, got {numbers}. Fetch it again.")
    if size > min(_MAX_BYTES, max(_RATIO_BYTES, _RATIO * length)) or (not packed and offset + size > length):
        raise SourceError(
            f"{label} would unpack from {length} to {size} bytes, as no published data set does. Do not use it, fetch the original."
        )
    return MatArray(
        path=path,
        name=name.decode("latin-1"),
        shape=shape,
        dtype=np.dtype(_CLASSES[flags & 0xFF]),
        stored=stored_type,
        position=position,
        length=length,
        packed=packed,
        offset=offset,
    )


def _tag(head: bytes, order: str, at: int) -> tuple[int, int, int]:
    """Return (type, bytes, where the content begins); a small element has both in one number and its content behind it."""
    kind, length = struct.unpack_from(f"{order}II", head, at)
    return (kind & 0xFFFF, kind >> 16, at + 4) if kind >> 16 else (kind, length, at + 8)


def _element(head: bytes, order: str, at: int) -> tuple[int, bytes, int]:
    """Return (type, content, where the next element begins), which is at a multiple of 8 bytes."""
    kind, length, begin = _tag(head, order, at)
    if begin + length > len(head):
        raise struct.error("an element goes on past the header")
    return kind, head[begin : begin + length], -(-(begin + length) // 8) * 8
