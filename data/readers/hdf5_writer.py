"""Write HDF5 files: HDF5 lays them out in memory without their rows, and Python writes them.

HDF5 itself never writes to a disk: when a write failed, HDF5 2.0.0 crashed, or ended without an error and with wrong bytes.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

__all__ = ["Extent", "new_hdf5", "reserve", "write_rows"]

_BLOCK_BYTES = 1 << 20
_SHARED_MEMORY = "/dev/shm"  # noqa: S108 - the file's name is random and only its owner may open it


class Extent(NamedTuple):
    """The position of an array's rows in the file."""

    offset: int  # of the first row
    row_bytes: int
    rows: int


def reserve(array: Any) -> Extent:
    """Give a contiguous array of a file that is laid out its place, without its rows."""
    if array.size:
        array[:1] = np.zeros((1, *array.shape[1:]), array.dtype)  # places are given at the first write
    row_bytes = int(np.prod(array.shape[1:], dtype=np.int64)) * array.dtype.itemsize
    return Extent(array.id.get_offset() or 0, row_bytes, len(array))


@contextmanager
def new_hdf5(path: Path, lay_out: Callable[[Any], dict[str, Extent]]) -> Iterator[tuple[IO[bytes], dict[str, Extent]]]:
    """Write a new file but for the rows of some arrays, and yield it with their places, for ``write_rows``.

    Args:
        path: the file; what was there is replaced.
        lay_out: makes groups, arrays and attributes in an open HDF5 file, and returns what ``reserve`` said of the arrays
            whose rows come later, by any name.
    """
    with tempfile.NamedTemporaryFile(dir=_memory(), prefix="lsmix-", suffix=".h5") as draft:
        # The oldest layout of headers holds no times, so that the bytes depend on the content only.
        with h5py.File(draft.name, "w", libver=("earliest", "v110")) as file:
            places = lay_out(file)
        with path.open("wb") as stream:
            _copy_between(draft, stream, places)
            yield stream, places


def write_rows(stream: IO[bytes], place: Extent, first: int, rows: NDArray[Any]) -> None:
    """Write rows of an array, in its dtype, from row ``first`` on."""
    stream.seek(place.offset + first * place.row_bytes)
    stream.write(np.ascontiguousarray(rows).data.cast("B") if rows.size else b"")


def _memory() -> str | None:
    """Return a folder in memory, where a file takes only the few kilobytes that are written to it; None where there is none."""
    return _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else None


def _copy_between(draft: IO[bytes], stream: IO[bytes], places: dict[str, Extent]) -> None:
    """Copy all of the draft but the rows whose places are known, which stay empty at first."""
    begin, end = 0, os.fstat(draft.fileno()).st_size
    for place in sorted(place for place in places.values() if place.rows):
        _copy(draft, stream, begin, place.offset)
        begin = place.offset + place.rows * place.row_bytes
    _copy(draft, stream, begin, end)
    stream.truncate(end)


def _copy(draft: IO[bytes], stream: IO[bytes], begin: int, end: int) -> None:
    for start in range(begin, end, _BLOCK_BYTES):
        stream.seek(start)
        stream.write(os.pread(draft.fileno(), min(_BLOCK_BYTES, end - start), start))
