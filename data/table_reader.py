"""Reading tables through memory maps: any rows in any order.

A chunk's CRC32C is compared when the chunk is first mapped, once for each opened table. A process maps at most 64 chunk
files at a time, since a map holds a file descriptor.
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
    """One column, read as if it were an array: ``column[3]``, ``column[10:20]``, ``column[[5, 2, 2]]``.

    Every read gives a new array in the machine's byte order. Safe to share among threads.
    """

    def __init__(self, table: Table, column: Column, files: TableFiles, *, check_crc: bool) -> None:
        self._table = table
        self._column = column
        self._files = files
        self._unchecked = bytearray([check_crc]) * table.shards  # by chunk
        self.shape = (table.rows, *column.row_shape)  # of the whole column
        self.dtype: np.dtype[Any] = np.dtype(column.dtype)
        self.row_bytes = column.row_bytes
        self._row_dtype = np.dtype(
            (np.void, column.row_bytes)
        )  # copied as bytes: a tenth faster than along several axes

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
            raise ValueError(f"column {self._column.name!r} is on disk: it cannot become an array without a copy.")
        return np.asarray(self[:], dtype)

    def __getitem__(self, key: SupportsIndex | slice | ArrayLike) -> Any:
        """Return rows; one index gives one row, a slice or a list of indices an array of rows."""
        if isinstance(key, slice):
            return self.gather(np.arange(*key.indices(len(self))))
        rows = np.asarray(key)
        if rows.dtype.kind not in "iu" and rows.size:
            raise TypeError(f"rows of column {self._column.name!r} are picked by integers, got {rows.dtype}.")
        return self.gather(rows.reshape(-1)).reshape((*rows.shape, *self._column.row_shape))[()]

    def gather(self, rows: ArrayLike) -> NDArray[Any]:
        """Return the given rows, in the given order.

        Args:
            rows: integers (n,) in −len to len−1; they may repeat.

        Returns:
            (n, …), a new array.

        Raises:
            IndexError: a row is outside of the column.
            CorruptError: a chunk that holds one of the rows is damaged.
        """
        chunk, row = np.divmod(self._wrap(np.asarray(rows, np.int64)), self._table.chunk_rows)
        taken = np.empty(len(row), self._row_dtype)
        order = np.argsort(chunk, kind="stable")
        edges = np.flatnonzero(np.diff(chunk[order], prepend=-1, append=self._table.shards)).tolist()
        chunks = chunk[order[edges[:-1]]].tolist()
        if len(chunks) > 1:
            self._files.prefetch([self._column.chunk_path(number) for number in chunks])
        for number, (begin, end) in zip(chunks, pairwise(edges), strict=True):
            own = order[begin:end]
            taken[own] = _map_chunk(self, number)[row[own]]
        stored = taken.view(self.dtype.newbyteorder("<")).reshape(-1, *self._column.row_shape)
        return stored.astype(self.dtype, copy=False)

    def _wrap(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        if not rows.size:
            return rows
        low, high = int(rows.min()), int(rows.max())
        if low < -len(self) or high >= len(self):
            bad = high if high >= len(self) else low
            raise IndexError(f"row {bad} is outside of column {self._column.name!r}, which has {len(self)} rows.")
        return rows if low >= 0 else np.where(rows < 0, rows + len(self), rows)


@functools.lru_cache(maxsize=64)  # maps of a process, of all tables together; it needs no lock that a fork could break
def _map_chunk(column: ColumnReader, chunk: int) -> NDArray[np.void]:
    """Map a chunk file and return its rows, (chunk_rows,), read only.

    Raises:
        CorruptError: it cannot be read, is shorter than its rows need, or its checksum does not fit.
    """
    files, path = column._files, column._column.chunk_path(chunk)
    where, file_bytes = f"{files.location}/{path}", column._table.chunk_file_bytes(column._column)
    with files.open(path) as file:
        try:
            content = np.frombuffer(mmap.mmap(file.fileno(), file_bytes, access=mmap.ACCESS_READ), np.uint8)
        except ValueError as error:  # it is shorter
            raise CorruptError(f"{where!r} cannot be read: {error}. Fetch or make it again.") from error
        except OSError as error:
            raise unreadable(where, error) from error
    if column._unchecked[chunk]:
        if crc32c(content[:-CRC_BYTES]) != content[-CRC_BYTES:].tobytes():
            raise CorruptError(f"{where!r} is damaged: its checksum does not fit. Fetch or make it again.")
        column._unchecked[chunk] = False
    return content[:-CRC_BYTES].view(column._row_dtype)


class TableReader(dict[str, ColumnReader]):
    """All columns of a table, by name, and the table's attributes; use ``open_table``."""

    def __init__(self, table: Table, attributes: dict[str, Any], files: TableFiles, *, check_crc: bool) -> None:
        super().__init__({item.name: ColumnReader(table, item, files, check_crc=check_crc) for item in table.columns})
        self.table = table
        self.attributes = attributes
        self._files = files

    def check_against_zarr(self) -> None:
        """Compare the first and the last row of every column with what zarr-python, the reference, reads there.

        Raises:
            CorruptError: the two differ, or zarr-python cannot read it.
        """
        import zarr

        rows, where = [0, self.table.rows - 1], self._files.location
        advice = "Do not use it; make the artifact again."
        for name, column in self.items():
            try:
                array: Any = zarr.open_group(where, mode="r", zarr_format=3, use_consolidated=False)[name]
                reference = np.stack([array[row] for row in rows])
            except Exception as error:  # whatever zarr-python raises on an array that it cannot read
                raise CorruptError(
                    f"{where!r} cannot be read by zarr-python: {type(error).__name__}: {error}. {advice}"
                ) from error
            if not np.array_equal(column[rows], reference, equal_nan=column.dtype.kind == "f"):
                raise CorruptError(
                    f"{where!r}: lsmix and zarr-python read rows {rows} of {name!r} differently. {advice}"
                )


def open_table(files: TableFiles, *, check_crc: bool = True) -> TableReader:
    """Open a table for reading; no chunk is opened before its first use.

    Args:
        files: its listed files.
        check_crc: whether to compare each chunk's checksum when it is first mapped.

    Raises:
        MissingError: there is no table.
        FormatError: it is laid out in another way.
        CorruptError: metadata is damaged, or a chunk is not listed or of another size than its rows need.
    """
    table, attributes = read_table(files)
    # Before anything is allocated: metadata may claim any number of rows, but only listed files can back them.
    for column in table.columns:
        expected = table.chunk_file_bytes(column)
        for shard in range(table.shards):
            path = column.chunk_path(shard)
            if (size := files.sizes.get(path)) != expected:
                what = (
                    "is not in the manifest" if size is None else f"is damaged: expected {expected} bytes, got {size}"
                )
                raise CorruptError(f"{f'{files.location}/{path}'!r} {what}. Fetch or make the artifact again.")
    return TableReader(table, attributes, files, check_crc=check_crc)


def open_artifact_table(artifact: Artifact, name: str, *, check_crc: bool = True) -> TableReader:
    """Return the table called ``name`` of an artifact.

    Args:
        artifact: on this machine or at a URL.
        name: of the Zarr group in it.
        check_crc: as for ``open_table``.

    Raises:
        MissingError: it has no such table.
        FormatError: the table is of a format that this version does not read.
        CorruptError: a file is damaged, or not in the manifest.
        DownloadError: the URL cannot be reached.
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
