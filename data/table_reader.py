"""Reading columns through memory maps: any rows in any order, at about the speed of copying memory.

No byte leaves this module unchecked; each inner chunk's CRC32C is compared when the chunk is first
touched. Needs NumPy alone: zarr-python reads the same files, some hundred times slower.
"""

import functools
import mmap
import os
import stat
import sys
import threading
import types
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from lsmix.data.artifact import MANIFEST_NAME, Artifact
from lsmix.data.errors import CorruptError, FormatError, LsmixError
from lsmix.data.table import METADATA_NAME, Column, ColumnStore, check_chunk, open_store, read_index, shard_bytes

if TYPE_CHECKING:
    import zarr

__all__ = ["ColumnArray", "ColumnReader", "LocatedRows", "ShardFiles", "open_artifact_columns", "open_columns"]

_OPEN_SHARDS = 128  # a column's mapped shards; each holds a file descriptor, of which a process commonly has 1,024

# Of a column's maps, before their pages are let go. Pages of a map count as memory of the process, though the kernel takes
# them back when it needs them; a page that is wanted again comes from the kernel's cache.
_TOUCHED_BYTES = 160 << 20
_FIRST_ADDRESS, _MOST_ADDRESS = 4096, 1 << 47  # nothing is ever mapped below or above; 0 would mean no memory at all
_LITTLE_ENDIAN = sys.byteorder == "little"


class ShardFiles(Protocol):
    """Where the shards of a store are, when they are not in its folder. Shards go by their paths in the store."""

    most_open: int  # how many shards of a column may be mapped at a time, at least 1

    def where(self, name: str) -> str:
        """Return what to call a shard in messages; the store itself for ""."""

    def open(self, name: str) -> IO[bytes]:
        """Return a shard's file, opened to read; it is closed once it is mapped."""

    def prefetch(self, names: Sequence[str]) -> None:
        """Learn that all of these shards will be opened next."""


class ColumnArray:
    """One column, read as if it were an array: ``column[3]``, ``column[10:20]``, ``column[[5, 2, 2]]``.

    Every read gives a new array in the machine's byte order. Safe to share among threads.
    """

    def __init__(
        self, store: ColumnStore, column: Column, *, check_crc: bool = True, files: ShardFiles | None = None
    ) -> None:
        self._store = store
        self._column = column
        self._check_crc = check_crc
        self._files = files
        self._most_open = files.most_open if files else _OPEN_SHARDS
        self._slots = store.shard_rows // column.chunk_rows
        self._maps: OrderedDict[int, _MappedShard] = OrderedDict()
        self._lock = threading.Lock()
        chunks = -(-store.rows // column.chunk_rows)
        self._offsets = np.zeros(chunks, np.int64)  # of each chunk in its shard; known once the shard is mapped
        self._checked = np.zeros(chunks, bool)  # kept when a shard's map is dropped
        self._settled = np.zeros(chunks, bool)  # checked, and counted among what was touched
        self._touched_bytes = 0
        self._mapped_before = _mapped_bytes()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole column: (rows, …)."""
        return (self._store.rows, *self._column.row_shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the column."""
        return np.dtype(self._column.dtype)

    @property
    def chunk_rows(self) -> int:
        """Rows in an inner chunk, the unit that is checked as a whole."""
        return self._column.chunk_rows

    @property
    def row_bytes(self) -> int:
        """Size of one row."""
        return self._column.row_bytes

    def __len__(self) -> int:
        return self._store.rows

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self), self.chunk_rows):
            yield from self[start : start + self.chunk_rows]

    def __repr__(self) -> str:
        return f"ColumnArray({self._column.name!r}, shape={self.shape}, dtype={self.dtype})"

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError(f"column {self._column.name!r} is on disk: it cannot become an array without a copy.")
        return np.asarray(self[:], dtype)

    def __getitem__(self, key: SupportsIndex | slice | ArrayLike) -> Any:
        """Return rows; one index gives one row, a slice or a list of indices an array of rows."""
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step == 1:
                return self._span(start, max(start, stop))
            return self.gather(np.arange(start, stop, step))
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
        index = self._wrap(np.asarray(rows, np.int64))
        chunk = index // self.chunk_rows
        together = max(_TOUCHED_BYTES // 4 // self._column.chunk_bytes, 1)
        if len(index) <= together or len(np.unique(chunk)) <= together:
            return self.locate(index).take()
        # Rows from all over the column: chunk by chunk, so that the pages of those that are done can go.
        taken = np.empty((len(index), *self._column.row_shape), self.dtype)
        order = np.argsort(index, kind="stable")
        group = np.cumsum(np.diff(chunk[order], prepend=chunk[order[0]]) > 0) // together
        for part in np.split(order, np.flatnonzero(np.diff(group)) + 1):
            taken[part] = self.locate(index[part]).take()
        return taken

    def locate(self, rows: ArrayLike) -> "LocatedRows":
        """Find and check the given rows, as ``gather`` does, and copy none yet: for taking them part by part."""
        index = self._wrap(np.asarray(rows, np.int64))
        chunk, row = np.divmod(index, self.chunk_rows)
        shard = chunk // self._slots
        maps = self._prepare(chunk, set(np.flatnonzero(np.bincount(shard)).tolist()))
        places = self._offsets[chunk] + row * self.row_bytes
        return LocatedRows(self._column, maps, shard, places)

    def release(self) -> None:
        """Drop the maps of all shards, whose pages count as memory of this process; the next read maps them again."""
        with self._lock:
            self._let_go()
            self._maps.clear()

    def _span(self, start: int, stop: int) -> NDArray[Any]:
        if start >= stop:
            return np.empty((0, *self._column.row_shape), self.dtype)
        chunks = np.arange(start // self.chunk_rows, (stop - 1) // self.chunk_rows + 1)
        pieces = []
        if self._files:
            self._prefetch(self._files, set((chunks // self._slots).tolist()))
        # Shard by shard, so that a whole column can be read with few shards mapped at once.
        for shard in range(int(chunks[0]) // self._slots, int(chunks[-1]) // self._slots + 1):
            own = chunks[chunks // self._slots == shard]
            memory = self._prepare(own, {shard})[shard].memory
            for chunk in own.tolist():
                first = chunk * self.chunk_rows
                low, high = max(start, first) - first, min(stop, first + self.chunk_rows) - first
                offset = int(self._offsets[chunk])
                pieces.append(memory[offset + low * self.row_bytes : offset + high * self.row_bytes])
        return _as_rows(self._column, _join(pieces))

    def _wrap(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        if not rows.size:
            return rows
        low, high = int(rows.min()), int(rows.max())
        if low < -len(self) or high >= len(self):
            bad = high if high >= len(self) else low
            raise IndexError(f"row {bad} is outside of column {self._column.name!r}, which has {len(self)} rows.")
        return rows if low >= 0 else np.where(rows < 0, rows + len(self), rows)

    def _prepare(self, chunks: NDArray[np.int64], shards: set[int]) -> "dict[int, _MappedShard]":
        """Map the shards of these chunks and check those chunks that nobody has touched before."""
        if self._files:
            self._prefetch(self._files, shards)
        maps = {shard: self._map(shard) for shard in shards}
        settled = self._settled[chunks]
        if not settled.all():
            self._settle(np.unique(chunks[~settled]), maps)
        return maps

    def _settle(self, chunks: NDArray[np.int64], maps: "dict[int, _MappedShard]") -> None:
        """Check chunks that nobody has touched before; let go of the pages of all others when they become many."""
        if self._check_crc:
            for chunk in chunks[~self._checked[chunks]].tolist():
                mapped = maps[chunk // self._slots]
                check_chunk(mapped.bytes, int(self._offsets[chunk]), self._column.chunk_bytes, where=mapped.location)
                self._checked[chunk] = True
        with self._lock:
            self._touched_bytes += len(chunks) * self._column.chunk_bytes
            # The kernel may map 2 MiB for a page that is touched, so what was touched is only a lower bound; but what others
            # in this process have mapped since is not ours to let go.
            many = self._touched_bytes > _TOUCHED_BYTES // 4
            if many and max(self._touched_bytes, _mapped_bytes() - self._mapped_before) > _TOUCHED_BYTES:
                self._let_go()
                self._touched_bytes = len(chunks) * self._column.chunk_bytes
            self._settled[chunks] = True

    def _let_go(self) -> None:
        for mapped in self._maps.values():
            mapped.let_go()
        self._settled[:] = False
        self._touched_bytes = 0

    def _map(self, shard: int) -> "_MappedShard":
        mapped = self._maps.get(shard)
        if mapped is not None and self._store.shards <= self._most_open:
            return mapped  # nothing is ever dropped, so there is no order to keep
        with self._lock:
            mapped = self._maps.get(shard)
            if mapped is None:
                mapped = self._open(self._column.shard_name(shard))
                first = shard * self._slots
                last = min(first + self._slots, len(self._offsets))
                self._offsets[first:last] = read_index(
                    mapped.bytes,
                    slots=self._slots,
                    chunks=last - first,
                    chunk_bytes=self._column.chunk_bytes,
                    where=mapped.location,
                )
                self._maps[shard] = mapped
                if len(self._maps) > self._most_open:
                    self._maps.popitem(last=False)  # unmapped when the last slice of it is gone
            self._maps.move_to_end(shard)
            return mapped

    def _open(self, name: str) -> "_MappedShard":
        if self._files:
            with self._files.open(name) as file:
                return _MappedShard(file, self._files.where(name))
        path = self._store.folder / name
        try:
            with path.open("rb") as file:
                return _MappedShard(file, str(path))
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise CorruptError(f"{str(path)!r} cannot be read: {error}. Fetch or make it again.") from error

    def _prefetch(self, files: ShardFiles, shards: set[int]) -> None:
        missing = sorted(shards - self._maps.keys())
        if len(missing) > 1:
            files.prefetch([self._column.shard_name(shard) for shard in missing])


def _mapped_bytes() -> int:
    """Return how much of files this process has mapped and touched, libraries included; 0 where nobody says."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - no path object for a kernel's file
            return int(file.read().split()[2]) * mmap.PAGESIZE
    except OSError:
        return 0


def _as_rows(column: Column, content: NDArray[Any]) -> NDArray[Any]:
    """Return rows (n, …) of a column in the machine's byte order, from their bytes in memory of their own."""
    dtype = np.dtype(column.dtype)
    rows = content.view(dtype) if _LITTLE_ENDIAN else content.view(dtype.newbyteorder("<")).astype(dtype)
    return rows.reshape(-1, *column.row_shape)


def _join(pieces: Iterable[memoryview]) -> NDArray[np.uint8]:
    # A bytearray, not bytes: the array must be writable, or torch warns of each batch.
    return np.frombuffer(bytearray().join(pieces), np.uint8)


@functools.lru_cache(maxsize=16)
def _all_memory(row_bytes: int) -> NDArray[np.void] | None:
    """Return this process's whole address space as an array: element i is the ``row_bytes`` bytes at address i + 4096.

    It reads nothing until it is indexed, and whoever does that answers for the addresses. None where addresses do not
    fit, which they do for rows below 64 KiB.
    """
    limit = np.iinfo(np.int64).max // row_bytes
    if limit < _MOST_ADDRESS:
        return None
    face = {
        "shape": (limit,),
        "typestr": f"|V{row_bytes}",
        "data": (_FIRST_ADDRESS, True),
        "strides": (1,),
        "version": 3,
    }
    return np.asarray(types.SimpleNamespace(__array_interface__=face))


class LocatedRows:
    """Rows of a column that were found and checked; holds the maps that they lie in, so they stay where they are.

    Args:
        column: whose rows these are.
        maps: the mapped shards by number.
        shards: shard of each row, (n,).
        places: where each row begins in its shard, (n,).
    """

    def __init__(
        self,
        column: Column,
        maps: "Mapping[int, _MappedShard]",
        shards: NDArray[np.int64],
        places: NDArray[np.int64],
    ) -> None:
        self._column = column
        self._maps = maps
        self._shards = shards
        self._places = places
        self._memory = _all_memory(column.row_bytes)
        if self._memory is not None and maps:
            begins = np.zeros(max(maps) + 1, np.int64)
            begins[list(maps)] = [mapped.address - _FIRST_ADDRESS for mapped in maps.values()]
            self._addresses = begins[shards] + places

    def take(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Return rows ``start`` to ``stop`` − 1 of those located, (n, …), a new array."""
        if not self._maps:
            return np.empty((0, *self._column.row_shape), self._column.dtype)
        if self._memory is None:
            size = self._column.row_bytes
            where = zip(self._shards[start:stop].tolist(), self._places[start:stop].tolist(), strict=True)
            return _as_rows(self._column, _join(self._maps[s].memory[a : a + size] for s, a in where))
        # One indexing over all maps at once, at the speed of copying memory; joining slices of the maps takes 1.4 times
        # as long. Every address lies in a map held here: ``_prepare`` compared the
        # shard's index with its file, and ``_wrap`` the rows with the column.
        return _as_rows(self._column, self._memory[self._addresses[start:stop]])


class _MappedShard:
    """The bytes of one shard's file."""

    def __init__(self, file: IO[bytes], where: str) -> None:
        self.location = where
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.memory = memoryview(self._map)
        self.bytes = np.frombuffer(self._map, np.uint8)
        self.address = int(self.bytes.__array_interface__["data"][0])

    def let_go(self) -> None:
        """Let the kernel take the map's pages back; they come again when they are read."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


class ColumnReader(Mapping[str, ColumnArray]):
    """All columns of a store, by name, and the store's attributes."""

    def __init__(
        self,
        store: ColumnStore,
        attributes: dict[str, Any],
        *,
        check_crc: bool = True,
        files: ShardFiles | None = None,
    ) -> None:
        self.store = store
        self.attributes = attributes
        self.check_crc = check_crc
        self._files = files
        self._arrays = {
            column.name: ColumnArray(store, column, check_crc=check_crc, files=files) for column in store.columns
        }

    def __getitem__(self, name: str) -> ColumnArray:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def open_zarr(self) -> "zarr.Group":
        """Return the same columns through zarr-python, for whatever speaks Zarr, such as ``dask.array.from_zarr``."""
        if self._files:
            raise FormatError(
                f"{self._files.where('')!r} lies afar, where zarr is not asked. Fetch it with 'lsmix pull'."
            )
        import zarr

        return zarr.open_group(self.store.folder, mode="r", zarr_format=3, use_consolidated=False)

    def check_against_zarr(self) -> None:
        """Compare the first and the last row of every shard with what zarr-python, the reference, reads there.

        Raises:
            CorruptError: the two differ, or zarr-python cannot read it.
        """
        try:
            self._compare_rows(self.open_zarr())
        except LsmixError:
            raise
        except Exception as error:  # whatever zarr-python raises on a store that is none to it
            raise CorruptError(
                f"{str(self.store.folder)!r} cannot be read by zarr-python: {type(error).__name__}: {error}. Do not use it; "
                "make the artifact again."
            ) from error

    def _compare_rows(self, group: "zarr.Group") -> None:
        for name, column in self.items():
            reference: Any = group[name]
            for shard in range(self.store.shards):
                rows = self.store.shard_range(shard)
                for row in (rows[0], rows[-1]):
                    if not np.array_equal(column[row], reference[row], equal_nan=column.dtype.kind == "f"):
                        raise CorruptError(
                            f"{str(self.store.folder)!r}: lsmix and zarr-python read row {row} of {name!r} differently. "
                            "Do not use it; make the artifact again."
                        )

    def shard_names(self) -> list[str]:
        """Return the paths of all shards' files, relative to the store's folder."""
        return [column.shard_name(shard) for column in self.store.columns for shard in range(self.store.shards)]


def open_columns(folder: Path, *, check_crc: bool = True) -> ColumnReader:
    """Open the columns in ``folder`` for reading; nothing is mapped before its first use.

    Args:
        folder: a Zarr v3 group as ``ColumnStore`` writes it.
        check_crc: whether to compare each chunk's checksum when it is first touched.

    Raises:
        MissingError: there is no store.
        FormatError: it is laid out in another way.
        CorruptError: metadata is damaged, or a shard is missing or shorter than its rows need.
    """
    store, attributes = open_store(folder)
    for column in store.columns:
        for shard in range(store.shards):
            _check_file(store, column, shard)
    return ColumnReader(store, attributes, check_crc=check_crc)


def _check_file(store: ColumnStore, column: Column, shard: int) -> None:
    # Before anything is allocated: metadata may claim any number of rows, but only files can back them.
    path = f"{store.folder}/{column.shard_name(shard)}"
    least = shard_bytes(
        len(store.shard_range(shard)),
        row_bytes=column.row_bytes,
        chunk_rows=column.chunk_rows,
        shard_rows=store.shard_rows,
    )
    try:
        facts = os.lstat(path)
    except OSError as error:
        raise CorruptError(f"{path!r} is missing: {error.strerror}. Fetch or make it again.") from error
    if not stat.S_ISREG(facts.st_mode) or facts.st_size < least:
        kind = f"{facts.st_size} bytes" if stat.S_ISREG(facts.st_mode) else "no plain file"
        raise CorruptError(f"{path!r} is damaged: expected {least} bytes or more, got {kind}. Make it again.")


def open_artifact_columns(artifact: Artifact, name: str, *, check_crc: bool = True) -> ColumnReader:
    """Return the columns called ``name`` of an artifact whose files are on this machine.

    Raises:
        MissingError: it has no such columns.
        FormatError: they are of a format that this version does not read.
        CorruptError: a file is damaged, or not in the manifest.
    """
    columns = open_columns(artifact.folder / name, check_crc=check_crc)
    metadata = [METADATA_NAME, *(f"{column}/{METADATA_NAME}" for column in columns)]
    for path in (*metadata, *columns.shard_names()):
        if f"{name}/{path}" not in artifact.records:
            raise CorruptError(
                f"{artifact.where(f'{name}/{path}')!r} is not listed in {MANIFEST_NAME}: it was put there later. "
                "Fetch or make the artifact again."
            )
    return columns
