"""The layout of columns on Zarr v3, and writing them shard by shard."""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import google_crc32c
import msgspec
import numpy as np
from numpy.typing import NDArray

from lsmix.data.atomic import DECODE_ERRORS, write_atomic
from lsmix.data.errors import CorruptError, FormatError, MissingError

__all__ = [
    "ARRAY_BYTES",
    "CRC_BYTES",
    "GROUP_BYTES",
    "METADATA_NAME",
    "MOST_COLUMNS",
    "Column",
    "ColumnStore",
    "Dtype",
    "check_chunk",
    "index_bytes",
    "open_store",
    "read_index",
    "rows_per_chunk",
    "rows_per_shard",
    "shard_bytes",
    "shard_pieces",
]

METADATA_NAME = "zarr.json"
_CHUNK_BYTES = 800_000  # the best measured sizes for 3 KiB rows: chunks of 256 rows in shards of 8,192
_CHUNKS_A_SHARD = 32
GROUP_BYTES = 1 << 20  # of metadata that are read: 20,000 class names and a citation
ARRAY_BYTES = 1 << 14  # … of a column
MOST_COLUMNS = 64  # a pool has fourteen at most
_WRITERS = 8  # threads that write one shard of all columns; a pool has eight or nine
Dtype = Literal["uint8", "int64", "float32", "float64"]
_Size = Annotated[int, msgspec.Meta(ge=1, le=2**48)]
_Model = TypeVar("_Model", bound=msgspec.Struct)


@dataclass(frozen=True, kw_only=True)
class Column:
    """One array of a column store: ``rows`` rows of the same shape."""

    name: str  # a word of lower-case letters, digits and underscores
    dtype: Dtype
    row_shape: tuple[int, ...] = ()  # shape of one row; () for one number
    chunk_rows: int  # rows in an inner chunk, a divisor of the store's rows per shard

    @property
    def row_bytes(self) -> int:
        """Size of one row."""
        return math.prod(self.row_shape) * np.dtype(self.dtype).itemsize

    @property
    def chunk_bytes(self) -> int:
        """Size of one inner chunk without its checksum."""
        return self.chunk_rows * self.row_bytes

    def shard_name(self, shard: int) -> str:
        """Return the path of a shard's file, relative to the store's folder."""
        return "/".join([self.name, "c", str(shard), *("0" for _ in self.row_shape)])


@dataclass(frozen=True, kw_only=True)
class ColumnStore:
    """Where and how a group of columns lies on disk; it holds no state, so any process may write any shard."""

    folder: Path  # the Zarr group
    columns: tuple[Column, ...]
    rows: int  # rows of every column, at least 1
    shard_rows: int  # rows in every shard but the last

    @property
    def shards(self) -> int:
        """Number of shards of each column."""
        return -(-self.rows // self.shard_rows)

    def shard_range(self, shard: int) -> range:
        """Return the rows that a shard holds.

        Raises:
            IndexError: there is no such shard.
        """
        if not 0 <= shard < self.shards:
            raise IndexError(f"shard {shard} is outside of 0 to {self.shards - 1}, the shards of {str(self.folder)!r}.")
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows))

    def create(self, attributes: Mapping[str, Any]) -> None:
        """Write the metadata, which makes the group readable by any Zarr v3 library once its shards are there."""
        for column in self.columns:
            _check_column(column, self.shard_rows)
            _write_json(self.folder / column.name / METADATA_NAME, _array_metadata(self, column), ARRAY_BYTES)
        _write_json(self.folder / METADATA_NAME, _Group(attributes=dict(attributes)), GROUP_BYTES)

    def write_shard(self, shard: int, arrays: Mapping[str, NDArray[Any]]) -> dict[str, str]:
        """Write one whole shard of every column; writing it again is harmless.

        Args:
            shard: which one.
            arrays: the shard's rows by column, (n, *row_shape) in the column's dtype.

        Returns:
            The SHA-256 of each file written, by its path relative to the store's folder.

        Raises:
            ValueError: a column is left out or unknown, or its array has another shape or dtype.
        """
        from concurrent.futures import ThreadPoolExecutor  # which readers need not load

        count = len(self.shard_range(shard))
        if set(arrays) != {column.name for column in self.columns}:
            raise ValueError(
                f"a shard of {str(self.folder)!r} takes {sorted(c.name for c in self.columns)}, got {sorted(arrays)}."
            )
        for column in self.columns:
            rows, shape = arrays[column.name], (count, *column.row_shape)
            if rows.shape != shape or rows.dtype != np.dtype(column.dtype):
                raise ValueError(
                    f"shard {shard} of column {column.name!r} takes {column.dtype} {shape}, got {rows.dtype} {rows.shape}."
                )
        digests, written = {}, []
        # Hashing (2 GB/s) and waiting for the disk, twice a column, overlap: that was most of the time.
        with ThreadPoolExecutor(_WRITERS, "write") as threads:
            for column in self.columns:
                pieces = shard_pieces(arrays[column.name], chunk_rows=column.chunk_rows, shard_rows=self.shard_rows)
                name = column.shard_name(shard)
                written.append(threads.submit(write_atomic, self.folder / name, *pieces))
                digests[name] = threads.submit(_sha256, pieces)
        for column_written in written:
            column_written.result()
        return {name: digest.result() for name, digest in digests.items()}

    def is_written(self, shard: int) -> bool:
        """Tell whether every column has this shard on disk, in full length."""
        count = len(self.shard_range(shard))
        for column in self.columns:
            path = self.folder / column.shard_name(shard)
            expected = shard_bytes(
                count, row_bytes=column.row_bytes, chunk_rows=column.chunk_rows, shard_rows=self.shard_rows
            )
            if not path.is_file() or path.stat().st_size != expected:
                return False
        return True


def _sha256(pieces: Iterable[memoryview]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def rows_per_chunk(row_bytes: int, shard_rows: int) -> int:
    """Return the rows in an inner chunk: about 0.8 MB, and a divisor of ``shard_rows``.

    Example:
        >>> from lsmix.data.table import rows_per_chunk
        >>> rows_per_chunk(3072, 8192)
        256
    """
    most = shard_rows // -(-shard_rows // max(_CHUNK_BYTES // row_bytes, 1))
    return next(rows for rows in range(most, 0, -1) if shard_rows % rows == 0)


def rows_per_shard(row_bytes: int, rows: int | None = None) -> int:
    """Return the rows in a shard: a power of two with about 25 MB.

    With ``rows``, the rows of the whole column, a small column gets one shard that is no longer than it must be.

    Example:
        >>> from lsmix.data.table import rows_per_shard
        >>> rows_per_shard(3072), rows_per_shard(3072, rows=1000)
        (8192, 1024)
    """
    whole = _power_of_two(_CHUNK_BYTES // row_bytes) * _CHUNKS_A_SHARD
    return whole if rows is None else min(whole, 1 << (max(rows, 1) - 1).bit_length())


def open_store(folder: Path) -> tuple[ColumnStore, dict[str, Any]]:
    """Return the layout and the attributes of the store in ``folder``, whether or not its shards are written.

    Raises:
        MissingError: there is no store.
        FormatError: it is a Zarr group, but not laid out as lsmix lays columns out.
        CorruptError: its metadata is damaged.
    """
    if not (folder / METADATA_NAME).is_file():
        raise MissingError(f"no columns at {str(folder)!r}: {METADATA_NAME} is not there. Make or fetch them again.")
    group = _read_json(folder / METADATA_NAME, _Group, GROUP_BYTES)
    paths = sorted(folder.glob(f"*/{METADATA_NAME}"))
    if not paths:
        raise CorruptError(f"{str(folder)!r} has no columns at all. Make or fetch it again.")
    if len(paths) > MOST_COLUMNS:
        _refuse(folder, f"it has {len(paths)} columns, and at most {MOST_COLUMNS} are read")
    found = {path.parent.name: _read_json(path, _Array, ARRAY_BYTES) for path in paths}
    columns = {name: _column(folder, name, array) for name, array in found.items()}
    extents = {(array.shape[0], array.chunk_grid.configuration.chunk_shape[0]) for array in found.values()}
    if len(extents) > 1:
        _refuse(folder, f"its columns have different (rows, rows per shard): {sorted(extents)}")
    rows, shard_rows = extents.pop()
    for column in columns.values():
        if shard_rows % column.chunk_rows:
            _refuse(folder, f"chunks of {column.chunk_rows} rows do not fill a shard of {shard_rows}")
    return ColumnStore(
        folder=folder, columns=tuple(columns.values()), rows=rows, shard_rows=shard_rows
    ), group.attributes


def _power_of_two(most: int) -> int:
    return 1 << (max(most, 1).bit_length() - 1)


def _check_column(column: Column, shard_rows: int) -> None:
    if not re.fullmatch("[a-z][a-z0-9_]*", column.name):
        raise ValueError(f"{column.name!r} is no name for a column: use lower-case letters, digits and underscores.")
    if column.chunk_rows < 1 or shard_rows % column.chunk_rows or column.row_bytes < 1:
        raise ValueError(
            f"column {column.name!r}: chunks of {column.chunk_rows} rows do not fill shards of {shard_rows}."
        )


# The metadata, written and read through the same models, so that what is not as we write it is refused by name.
# Written here and not by zarr-python: its bytes count in an artifact's root digest, and must not change with a version.


class _Json(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of all parts of the metadata."""


class _Endian(_Json, frozen=True, omit_defaults=False):
    endian: Literal["little"] = "little"


class _BytesCodec(_Json, frozen=True, tag_field="name", tag="bytes"):
    configuration: _Endian | msgspec.UnsetType = msgspec.UNSET  # zarr-python leaves it out for single bytes


class _Nothing(_Json, frozen=True):
    """A configuration in which nothing is said."""


class _Crc32cCodec(_Json, frozen=True, tag_field="name", tag="crc32c"):
    configuration: _Nothing | msgspec.UnsetType = msgspec.UNSET


class _ShardingConfiguration(_Json, frozen=True, omit_defaults=False):
    chunk_shape: list[_Size]
    codecs: tuple[_BytesCodec, _Crc32cCodec]
    index_codecs: tuple[_BytesCodec, _Crc32cCodec]
    index_location: Literal["end"] = "end"


class _ShardingCodec(_Json, frozen=True, tag_field="name", tag="sharding_indexed"):
    configuration: _ShardingConfiguration


class _GridConfiguration(_Json, frozen=True):
    chunk_shape: list[_Size]


class _RegularGrid(_Json, frozen=True, tag_field="name", tag="regular"):
    configuration: _GridConfiguration


class _Separator(_Json, frozen=True, omit_defaults=False):
    separator: Literal["/"] = "/"


class _DefaultKeys(_Json, frozen=True, tag_field="name", tag="default", omit_defaults=False):
    configuration: _Separator = _Separator()


class _Array(_Json, frozen=True, kw_only=True, omit_defaults=False):
    zarr_format: Literal[3] = 3
    node_type: Literal["array"] = "array"
    shape: list[_Size]
    data_type: Dtype
    chunk_grid: _RegularGrid
    chunk_key_encoding: _DefaultKeys = _DefaultKeys()
    fill_value: float = 0
    codecs: tuple[_ShardingCodec]
    attributes: dict[str, Any] = {}
    dimension_names: list[str | None] | msgspec.UnsetType | None = msgspec.UNSET
    storage_transformers: tuple[()] | msgspec.UnsetType = msgspec.UNSET


class _Group(_Json, frozen=True, kw_only=True, omit_defaults=False):
    zarr_format: Literal[3] = 3
    node_type: Literal["group"] = "group"
    attributes: dict[str, Any] = {}


def _array_metadata(store: ColumnStore, column: Column) -> _Array:
    little = _BytesCodec(configuration=_Endian())
    sharding = _ShardingConfiguration(
        chunk_shape=[column.chunk_rows, *column.row_shape],
        codecs=(little if np.dtype(column.dtype).itemsize > 1 else _BytesCodec(), _Crc32cCodec()),
        index_codecs=(little, _Crc32cCodec()),
    )
    grid = _GridConfiguration(chunk_shape=[store.shard_rows, *column.row_shape])
    return _Array(
        shape=[store.rows, *column.row_shape],
        data_type=column.dtype,
        chunk_grid=_RegularGrid(configuration=grid),
        fill_value=0.0 if column.dtype.startswith("float") else 0,
        codecs=(_ShardingCodec(configuration=sharding),),
    )


def _column(folder: Path, name: str, array: _Array) -> Column:
    sharding = array.codecs[0].configuration
    row_shape = array.shape[1:]
    if not sharding.chunk_shape[1:] == array.chunk_grid.configuration.chunk_shape[1:] == row_shape:
        _refuse(folder / name, "its chunks do not hold whole rows")
    if array.data_type != "uint8" and sharding.codecs[0].configuration is msgspec.UNSET:
        _refuse(folder / name, "its bytes have no stated order")
    if math.prod(row_shape) * 8 > 2**48:
        _refuse(folder / name, f"rows of shape {row_shape} are beyond all reason")
    return Column(name=name, dtype=array.data_type, row_shape=tuple(row_shape), chunk_rows=sharding.chunk_shape[0])


def _refuse(path: Path, reason: str) -> NoReturn:
    raise FormatError(
        f"{str(path)!r} is not laid out as lsmix lays columns out: {reason}. Read it with a Zarr library, or make it again."
    )


def _write_json(path: Path, record: msgspec.Struct, most_bytes: int) -> None:
    content = msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"
    if len(content) > most_bytes:
        raise FormatError(
            f"{str(path)!r} would have {len(content)} bytes, and lsmix reads at most {most_bytes}. "
            "Shorten the names of the classes, or the citation."
        )
    write_atomic(path, content)


def _read_json(path: Path, kind: type[_Model], most_bytes: int) -> _Model:
    if path.is_symlink():
        _refuse(path, "it is a link")
    if (size := path.stat().st_size) > most_bytes:
        _refuse(path, f"it has {size} bytes, and lsmix reads at most {most_bytes}")
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except msgspec.ValidationError as error:
        _refuse(path, str(error))
    except DECODE_ERRORS as error:
        raise CorruptError(f"{str(path)!r} is damaged: {error}. Make or fetch it again.") from error


CRC_BYTES = 4
_EMPTY = np.uint64(2**64 - 1)  # offset and size of a chunk that is not stored
_ENTRY = np.dtype("<u8")


def index_bytes(chunks: int) -> int:
    """Return the size of the index of a shard with room for ``chunks`` inner chunks, its checksum included."""
    return chunks * 2 * _ENTRY.itemsize + CRC_BYTES


def shard_bytes(rows: int, *, row_bytes: int, chunk_rows: int, shard_rows: int) -> int:
    """Return the size of a shard that holds ``rows`` rows, when its chunks lie back to back."""
    chunks = -(-rows // chunk_rows)
    return chunks * (chunk_rows * row_bytes + CRC_BYTES) + index_bytes(shard_rows // chunk_rows)


def shard_pieces(rows: NDArray[Any], *, chunk_rows: int, shard_rows: int) -> list[memoryview]:
    """Return the bytes of the shard that holds ``rows``, as pieces to be written one behind the other.

    Whole chunks are views of the rows' own memory: a shard of 25 MB is written without a copy.

    Args:
        rows: (n, …) with 1 ≤ n ≤ shard_rows; only a column's last shard has fewer than ``shard_rows``.
        chunk_rows: rows in an inner chunk, a divisor of ``shard_rows``.
        shard_rows: rows that a whole shard has.

    A last chunk that is not full is padded with zeros; chunks that lie wholly beyond the rows are left out.

    Raises:
        ValueError: the number of rows does not fit.

    Example:
        >>> import numpy as np
        >>> from lsmix.data.table import shard_pieces
        >>> pieces = shard_pieces(np.zeros((3, 5), np.uint8), chunk_rows=2, shard_rows=4)
        >>> sum(len(piece) for piece in pieces)  # 2·(2·5 + 4) + 2·16 + 4
        64
    """
    if not 1 <= len(rows) <= shard_rows or shard_rows % chunk_rows:
        raise ValueError(f"{len(rows)} rows in chunks of {chunk_rows} do not make a shard of at most {shard_rows}.")
    content = np.ascontiguousarray(rows, dtype=rows.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
    chunk_bytes = content.size // len(rows) * chunk_rows
    slots, pieces = shard_rows // chunk_rows, []
    for start in range(0, content.size, chunk_bytes):
        chunk = content[start : start + chunk_bytes]
        if chunk.size < chunk_bytes:
            chunk = np.concatenate([chunk, np.zeros(chunk_bytes - chunk.size, np.uint8)])
        pieces += [chunk.data, _crc(chunk).data]
    chunks = len(pieces) // 2
    index = np.full((slots, 2), _EMPTY, _ENTRY)
    index[:chunks, 0] = np.arange(chunks) * (chunk_bytes + CRC_BYTES)
    index[:chunks, 1] = chunk_bytes + CRC_BYTES
    return [*pieces, index.reshape(-1).view(np.uint8).data, _crc(index).data]


def read_index(shard: NDArray[np.uint8], *, slots: int, chunks: int, chunk_bytes: int, where: str) -> NDArray[np.int64]:
    """Return the offsets, (chunks,), at which a shard's inner chunks begin.

    Args:
        shard: all bytes of the shard, uint8 (bytes,); only the index is read.
        slots: inner chunks that a whole shard has.
        chunks: inner chunks that hold rows; every one must be stored.
        chunk_bytes: size of a chunk without its checksum.
        where: the file, for messages.

    Raises:
        CorruptError: the index is damaged, leaves a chunk out, or points outside of the shard.
    """
    end = shard.size - index_bytes(slots)
    if end < chunks * (chunk_bytes + CRC_BYTES):
        least = chunks * (chunk_bytes + CRC_BYTES) + index_bytes(slots)
        raise CorruptError(f"{where!r} is cut short: expected {least} bytes or more, got {shard.size}. Fetch it again.")
    if not np.array_equal(shard[-CRC_BYTES:], _crc(shard[end:-CRC_BYTES])):
        raise CorruptError(f"{where!r} is damaged: the checksum of its index does not fit. Fetch or make it again.")
    index = shard[end:-CRC_BYTES].view(_ENTRY).reshape(slots, 2)[:chunks]
    offsets, sizes = index[:, 0], index[:, 1]
    last = np.uint64(end - chunk_bytes - CRC_BYTES)
    if (offsets > last).any() or (sizes != chunk_bytes + CRC_BYTES).any():
        bad = int(np.flatnonzero((offsets > last) | (sizes != chunk_bytes + CRC_BYTES))[0])
        state = "missing" if offsets[bad] == _EMPTY else "of a wrong size or outside of the file"
        raise CorruptError(f"{where!r} is damaged: its chunk {bad} is {state}. Fetch or make it again.")
    starts = offsets.astype(np.int64)
    if (np.diff(np.sort(starts)) < chunk_bytes + CRC_BYTES).any():
        raise CorruptError(f"{where!r} is damaged: two of its chunks overlap. Fetch or make it again.")
    return starts


def check_chunk(shard: NDArray[np.uint8], offset: int, chunk_bytes: int, *, where: str) -> None:
    """Raise CorruptError unless the chunk at ``offset`` fits the checksum that lies behind it."""
    end = offset + chunk_bytes
    if not np.array_equal(shard[end : end + CRC_BYTES], _crc(shard[offset:end])):
        raise CorruptError(
            f"{where!r} is damaged: the checksum of bytes {offset} to {end - 1} does not fit. Fetch or make it again."
        )


def _crc(content: NDArray[Any]) -> NDArray[np.uint8]:
    # google_crc32c reads an array's memory in place, but turns memoryviews down; 7 GB/s on one core.
    value: int = google_crc32c.value(content)
    return np.array([value], "<u4").view(np.uint8)
