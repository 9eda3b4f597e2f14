"""Write HDF5 files. HDF5 creates their structure in memory; Python writes it, and then the rows, to disk.

HDF5 must not write to disk itself: when a write fails, HDF5 2.0.0 crashes, or reports success and leaves wrong bytes.
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
    """Allocate the space of a contiguous array without writing its rows; return its extent."""
    if array.size:
        array[:1] = np.zeros((1, *array.shape[1:]), array.dtype)  # HDF5 allocates the space at the first write
    row_bytes = int(np.prod(array.shape[1:], dtype=np.int64)) * array.dtype.itemsize
    return Extent(array.id.get_offset() or 0, row_bytes, len(array))


@contextmanager
def new_hdf5(path: Path, create: Callable[[Any], dict[str, Extent]]) -> Iterator[tuple[IO[bytes], dict[str, Extent]]]:
    """Create a file without the rows of some arrays; yield it with their extents, for ``write_rows``.

    Args:
        path: The file; an existing file is replaced.
        create: A function that creates groups, arrays and attributes in an open HDF5 file. It returns the results of
            ``reserve``, by name, for the arrays whose rows are written later.
    """
    with tempfile.NamedTemporaryFile(dir=_memory_folder(), prefix="lsmix-", suffix=".h5") as draft:
        # The oldest header version contains no timestamps, so the bytes depend only on the content.
        with h5py.File(draft.name, "w", libver=("earliest", "v110")) as file:
            extents = create(file)
        with path.open("wb") as stream:
            _copy_structure(draft, stream, extents)
            yield stream, extents


def write_rows(stream: IO[bytes], extent: Extent, first: int, rows: NDArray[Any]) -> None:
    """Write rows of an array, in the array's dtype, starting at row ``first``."""
    stream.seek(extent.offset + first * extent.row_bytes)
    stream.write(np.ascontiguousarray(rows).data.cast("B") if rows.size else b"")


def _memory_folder() -> str | None:
    """Return an in-memory folder, where a sparse file needs only the few kilobytes written to it; None without one."""
    return _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else None


def _copy_structure(draft: IO[bytes], stream: IO[bytes], extents: dict[str, Extent]) -> None:
    """Copy the draft without the rows in ``extents``, which are left as holes."""
    begin, end = 0, os.fstat(draft.fileno()).st_size
    for extent in sorted(extent for extent in extents.values() if extent.rows):
        _copy(draft, stream, begin, extent.offset)
        begin = extent.offset + extent.rows * extent.row_bytes
    _copy(draft, stream, begin, end)
    stream.truncate(end)


def _copy(draft: IO[bytes], stream: IO[bytes], begin: int, end: int) -> None:
    for start in range(begin, end, _BLOCK_BYTES):
        stream.seek(start)
        stream.write(os.pread(draft.fileno(), min(_BLOCK_BYTES, end - start), start))
