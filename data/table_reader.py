"""Random access to the rows of tables through memory maps.

The CRC32C of a chunk is checked when the chunk is first mapped, once per opened table. A process maps at most 64 chunk
files at a time, because each map uses a file descriptor.
"""

import functools
import mmap
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from lsmix.data.artifact import Artifact
from lsmix.data.errors import CorruptError, unreadable
from lsmix.data.table import CRC_BYTES, Column, Table, TableFiles, crc32c, read_table

__all__ = ["ColumnReader", "TableReader", "open_artifact_table", "open_table"]


class ColumnReader:
    """One column, indexed like an array: ``column[3]``, ``column[10:20]``, ``column[[5, 2, 2]]``.

    Every read returns a new array in native byte order. A reader is safe to share among threads.
    """

    def __init__(self, table: Table, column: Column, files: TableFiles, *, check_crc: bool) -> None:
        self._table = table
        self._column = column
        self._files = files
        self._unchecked = bytearray([check_crc]) * table.shards  # by chunk: 1 if its CRC32C must still be checked
        self.shape = (table.rows, *column.row_shape)  # of the entire column
        self.dtype: np.dtype[Any] = np.dtype(column.dtype)
        self.row_bytes = column.row_bytes
        # Rows are copied as opaque bytes: 10% faster than along several axes.
        self._row_dtype = np.dtype((np.void, column.row_bytes))

    def __len__(self) -> int:
        return self._table.rows

    def __iter__(self) -> Iterator[Any]:
        for shard in range(self._table.shards):
            rows = self._table.shard_range(shard)
            yield from self[rows.start : rows.stop]

    def __repr__(self) -> str:
        return f"ColumnReader({self._column.name!r}, shape={self.shape}, dtype={self.dtype})"

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError(f"column {self._column.name!r} is on disk and cannot become an array without a copy.")
        return np.asarray(self[:], dtype)

    def __getitem__(self, key: SupportsIndex | slice | ArrayLike) -> Any:
        """Return one row for an integer, or an array of rows for a slice or a list of integers."""
        if isinstance(key, slice):
            return self.gather(np.arange(*key.indices(len(self))))
        rows = np.asarray(key)
        if rows.dtype.kind not in "iu" and rows.size:
            raise TypeError(f"rows of column {self._column.name!r} are indexed by integers, got {rows.dtype}.")
        return self.gather(rows.reshape(-1)).reshape((*rows.shape, *self._column.row_shape))[()]

    def gather(self, rows: ArrayLike) -> NDArray[Any]:
        """Return the given rows, in the given order.

        Args:
            rows: Integers (n,) from −len to len − 1; they may repeat.

        Returns:
            A new array (n, …).

        Raises:
            IndexError: A row is outside the column.
            CorruptError: A chunk with one of the rows is damaged.
        """
        chunk, row = np.divmod(self._wrap(np.asarray(rows, np.int64)), self._table.chunk_rows)
        gathered = np.empty(len(row), self._row_dtype)
        order = np.argsort(chunk, kind="stable")
        edges = np.flatnonzero(np.diff(chunk[order], prepend=-1, append=self._table.shards)).tolist()
        chunks = chunk[order[edges[:-1]]].tolist()
        if len(chunks) > 1:
            self._files.prefetch([self._column.chunk_path(number) for number in chunks])
        for number, (begin, end) in zip(chunks, pairwise(edges), strict=True):
            own = order[begin:end]
            gathered[own] = _map_chunk(self, number)[row[own]]
        stored = gathered.view(self.dtype.newbyteorder("<")).reshape(-1, *self._column.row_shape)
        return stored.astype(self.dtype, copy=False)

    def _wrap(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        if not rows.size:
            return rows
        low, high = int(rows.min()), int(rows.max())
        if low < -len(self) or high >= len(self):
            bad = high if high >= len(self) else low
            raise IndexError(f"row {bad} is out of range for column {self._column.name!r} with {len(self):,} rows.")
        return rows if low >= 0 else np.where(rows < 0, rows + len(self), rows)


@functools.lru_cache(maxsize=64)  # shared by all tables of a process; has no lock that a fork could leave locked
def _map_chunk(column: ColumnReader, chunk: int) -> NDArray[np.void]:
    """Map a chunk file and return its rows, (chunk_rows,), read-only.

    Raises:
        CorruptError: The file cannot be read or is truncated, or its checksum does not match.
    """
    files, path = column._files, column._column.chunk_path(chunk)
    where, file_bytes = f"{files.location}/{path}", column._table.chunk_file_bytes(column._column)
    with files.open(path) as file:
        try:
            content = np.frombuffer(mmap.mmap(file.fileno(), file_bytes, access=mmap.ACCESS_READ), np.uint8)
        except ValueError as error:  # it is truncated
            raise CorruptError(f"{where!r} cannot be read: {error}. Download or rebuild the artifact.") from error
        except OSError as error:
            raise unreadable(where, error) from error
    if column._unchecked[chunk]:
        if crc32c(content[:-CRC_BYTES]) != content[-CRC_BYTES:].tobytes():
            raise CorruptError(f"{where!r} is damaged: its checksum does not match. Download or rebuild the artifact.")
        column._unchecked[chunk] = False
    return content[:-CRC_BYTES].view(column._row_dtype)


class TableReader(dict[str, ColumnReader]):
    """All columns of a table by name, and its attributes; use ``open_table`` to create one."""

    def __init__(self, table: Table, attributes: dict[str, Any], files: TableFiles, *, check_crc: bool) -> None:
        super().__init__({item.name: ColumnReader(table, item, files, check_crc=check_crc) for item in table.columns})
        self.table = table
        self.attributes = attributes
        self._files = files

    def check_against_zarr(self) -> None:
        """Compare the first and the last row of every column with those that zarr-python, the reference, reads.

        Raises:
            CorruptError: The rows differ, or zarr-python cannot read the table.
        """
        import zarr

        rows, where = [0, self.table.rows - 1], self._files.location
        advice = "Rebuild the artifact."
        for name, column in self.items():
            try:
                array: Any = zarr.open_group(where, mode="r", zarr_format=3, use_consolidated=False)[name]
                reference = np.stack([array[row] for row in rows])
            except Exception as error:  # zarr-python raises various exceptions for unreadable arrays
                raise CorruptError(
                    f"{where!r} cannot be read by zarr-python: {type(error).__name__}: {error}. {advice}"
                ) from error
            if not np.array_equal(column[rows], reference, equal_nan=column.dtype.kind == "f"):
                raise CorruptError(
                    f"{where!r}: lsmix and zarr-python read rows {rows} of {name!r} differently. {advice}"
                )


def open_table(files: TableFiles, *, check_crc: bool = True) -> TableReader:
    """Open a table for reading; chunks are opened on first use.

    Args:
        files: The listed files of the table.
        check_crc: Check the CRC32C of each chunk when it is first mapped.

    Raises:
        MissingError: There is no table.
        FormatError: The layout is not that of a table.
        CorruptError: Metadata is damaged, or a chunk is not listed or has the wrong size.
    """
    table, attributes = read_table(files)
    # Check before allocating: metadata may claim any number of rows, but every row must be in a listed file.
    for column in table.columns:
        expected = table.chunk_file_bytes(column)
        for shard in range(table.shards):
            path = column.chunk_path(shard)
            if (size := files.sizes.get(path)) != expected:
                got = "is not in the manifest" if size is None else f"has {size:,} bytes, expected {expected:,}"
                raise CorruptError(f"{f'{files.location}/{path}'!r} {got}. Download or rebuild the artifact.")
    return TableReader(table, attributes, files, check_crc=check_crc)


def open_artifact_table(artifact: Artifact, name: str, *, check_crc: bool = True) -> TableReader:
    """Open the table ``name`` of an artifact for reading.

    Args:
        artifact: A local or remote artifact.
        name: Name of the Zarr group in the artifact.
        check_crc: As for ``open_table``.

    Raises:
        MissingError: The artifact has no such table.
        FormatError: The layout is not that of a table.
        CorruptError: A file is damaged or not in the manifest.
        DownloadError: The URL cannot be reached.
    """
    prefix = f"{name}/"
    files = TableFiles(
        location=artifact.where(name),
        sizes={
            path.removeprefix(prefix): file.bytes for path, file in artifact.records.items() if path.startswith(prefix)
        },
        open=lambda path: artifact.open(prefix + path),
        prefetch=lambda paths: artifact.prefetch([prefix + path for path in paths]),
    )
    return open_table(files, check_crc=check_crc)
