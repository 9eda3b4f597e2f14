"""Tables: columns with the same number of rows, stored as the arrays of a Zarr v3 group and written chunk by chunk.

Every column is a Zarr array with regular chunks, split along the rows only, and the codecs ``bytes`` and ``crc32c``. A
chunk file contains the rows of a full chunk, little-endian, followed by a CRC32C of four bytes. A *shard* is one chunk of
every column: the unit of work, writing and transfer. Tables have no state, so any process can write any shard.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any, Literal, NoReturn, TypeVar

import google_crc32c
import msgspec
import numpy as np
from numpy.typing import NDArray

from lsmix.data.atomic import DECODE_ERRORS, write_atomic
from lsmix.data.errors import CorruptError, FormatError, MissingError

__all__ = [
    "CRC_BYTES",
    "METADATA_NAME",
    "Column",
    "Dtype",
    "Table",
    "TableFiles",
    "crc32c",
    "default_chunk_rows",
    "read_table",
    "table_in",
]

METADATA_NAME = "zarr.json"
CRC_BYTES = 4
_CHUNK_BYTES = 24 << 20  # of the widest column: 8,192 rows of 32×32×3
_ROWS_STEP = 256  # the rows of a chunk are a multiple of this, because the loaders read blocks of 256 rows
_LEAST_SHARDS = 8  # of larger tables
_GROUP_BYTES = 1 << 20  # limit of the group's metadata: 20,000 class names and a citation
_ARRAY_BYTES = 1 << 14  # limit of a column's metadata
_MOST_COLUMNS = 64  # a pool has at most fourteen
_MOST_BYTES = 2**48  # size of a row
_WRITERS = 8  # threads that write the columns of a shard; a pool has eight or nine columns
Dtype = Literal["uint8", "int64", "float32", "float64"]
_Size = Annotated[int, msgspec.Meta(ge=1, le=2**48)]
_Model = TypeVar("_Model", bound=msgspec.Struct)


@dataclass(frozen=True, kw_only=True)
class Column:
    """One array of a table."""

    name: str  # lower-case letters, digits and underscores
    dtype: Dtype
    row_shape: tuple[int, ...] = ()  # shape of one row; () for a number
    row_axes: tuple[str, ...] = field(default=(), compare=False)  # names of a row's axes, for other Zarr libraries

    @property
    def row_bytes(self) -> int:
        """Size of one row in bytes."""
        return math.prod(self.row_shape) * np.dtype(self.dtype).itemsize

    def chunk_path(self, shard: int) -> str:
        """Return the path of a shard's chunk of this column, relative to the table's folder."""
        return "/".join([self.name, "c", str(shard), *("0" for _ in self.row_shape)])


@dataclass(frozen=True, kw_only=True)
class Table:
    """The layout of a table, with methods that write it."""

    folder: Path  # the Zarr group
    columns: tuple[Column, ...]
    rows: int  # of every column, at least 1
    chunk_rows: int  # rows per chunk; the last chunk is padded with zeros

    @property
    def shards(self) -> int:
        """Number of shards, i.e. of chunks in each column."""
        return -(-self.rows // self.chunk_rows)

    def shard_range(self, shard: int) -> range:
        """Return the rows of a shard.

        Raises:
            IndexError: The shard does not exist.
        """
        if not 0 <= shard < self.shards:
            raise IndexError(f"shard {shard} does not exist: {str(self.folder)!r} has shards 0 to {self.shards - 1}.")
        return range(shard * self.chunk_rows, min((shard + 1) * self.chunk_rows, self.rows))

    def chunk_file_bytes(self, column: Column) -> int:
        """Return the size in bytes of every chunk file of a column."""
        return self.chunk_rows * column.row_bytes + CRC_BYTES

    def chunk_paths(self) -> list[str]:
        """Return the paths of all chunk files, relative to the table's folder."""
        return [column.chunk_path(shard) for column in self.columns for shard in range(self.shards)]

    def create(self, attributes: Mapping[str, Any]) -> None:
        """Write the metadata. Once the chunks are written, too, any Zarr v3 library can read the group.

        Raises:
            FormatError: The attributes take more than 1 MiB.
        """
        import zarr  # here because readers do not need it
        from zarr.codecs import BytesCodec, Crc32cCodec
        from zarr.storage import MemoryStore

        files: dict[str, Any] = {}  # zarr-python writes to memory, so that the files can be written atomically
        group = zarr.create_group(MemoryStore(files), zarr_format=3, attributes=dict(attributes))
        for column in self.columns:
            group.create_array(
                column.name,
                shape=(self.rows, *column.row_shape),
                chunks=(self.chunk_rows, *column.row_shape),
                dtype=column.dtype,
                serializer=BytesCodec(endian="little"),
                compressors=Crc32cCodec(),
                filters=None,
                fill_value=0,
                dimension_names=[
                    "row",
                    *(column.row_axes or (f"axis_{axis + 1}" for axis in range(len(column.row_shape)))),
                ],
            )
        for path, buffer in files.items():
            content = buffer.to_bytes() + b"\n"
            if len(content) > _GROUP_BYTES:
                raise FormatError(
                    f"{str(self.folder / path)!r} would have {len(content):,} bytes; lsmix reads at most {_GROUP_BYTES:,}. "
                    "Shorten the class names or the citation."
                )
            write_atomic(self.folder / path, content)

    def write_shard(self, shard: int, arrays: Mapping[str, NDArray[Any]]) -> dict[str, str]:
        """Write a shard, one chunk of every column; an existing shard is replaced.

        Args:
            shard: Number of the shard.
            arrays: Rows of the shard by column, (n, *row_shape) in the column's dtype.

        Returns:
            The SHA-256 of each written file, by path relative to the table's folder.

        Raises:
            ValueError: A column is missing or unknown, or its array has another shape or dtype.
        """
        from concurrent.futures import ThreadPoolExecutor  # here because readers do not need it

        count = len(self.shard_range(shard))
        expected = {column.name: (column.dtype, (count, *column.row_shape)) for column in self.columns}
        found = {name: (rows.dtype.name, rows.shape) for name, rows in arrays.items()}
        if found != expected:
            raise ValueError(f"shard {shard} of {str(self.folder)!r} must have {expected}, got {found}.")
        pieces = {
            column.chunk_path(shard): _chunk_file(arrays[column.name], self.chunk_file_bytes(column))
            for column in self.columns
        }
        # Hash (2 GB/s) while the threads wait for the disk, twice per column; together these took most of the time.
        with ThreadPoolExecutor(_WRITERS, "write") as threads:
            written = [threads.submit(write_atomic, self.folder / path, *content) for path, content in pieces.items()]
            digests = dict(zip(pieces, threads.map(_sha256, pieces.values()), strict=True))
        for column_written in written:
            column_written.result()
        return digests

    def is_written(self, shard: int) -> bool:
        """Return whether the chunk file of every column exists and has its full length."""
        for column in self.columns:
            path = self.folder / column.chunk_path(shard)
            if not path.is_file() or path.stat().st_size != self.chunk_file_bytes(column):
                return False
        return True


def default_chunk_rows(row_bytes: int, rows: int) -> int:
    """Return the number of rows per chunk: about 25 MB, and at most an eighth of the table, rounded up to 256 rows.

    Args:
        row_bytes: Size of a row of the widest column.
        rows: Number of rows in the table.

    Example:
        >>> from lsmix.data.table import default_chunk_rows
        >>> default_chunk_rows(3072, 1_000_000), default_chunk_rows(3072, 10_000), default_chunk_rows(3072, 100)
        (8192, 1280, 100)
    """
    full = max(_CHUNK_BYTES // row_bytes, 1)
    full -= full % _ROWS_STEP if full > _ROWS_STEP else 0
    eighth = -(-rows // (_LEAST_SHARDS * _ROWS_STEP)) * _ROWS_STEP
    return min(full, eighth, rows)


def crc32c(content: NDArray[np.uint8]) -> bytes:
    """Return the CRC32C of an array as four bytes, little-endian."""
    # google_crc32c reads the array in place (7 GB/s on one core), but does not accept memoryviews.
    value: int = google_crc32c.value(content)
    return value.to_bytes(CRC_BYTES, "little")


def _chunk_file(rows: NDArray[Any], file_bytes: int) -> list[memoryview | bytes]:
    """Return the pieces of a chunk file: rows and checksum. For a full chunk the rows are not copied."""
    content = np.ascontiguousarray(rows, dtype=rows.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
    if padding := file_bytes - CRC_BYTES - content.size:
        content = np.concatenate([content, np.zeros(padding, np.uint8)])
    return [content.data, crc32c(content)]


def _sha256(pieces: Sequence[memoryview | bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class TableFiles:
    """Access to the listed files of a table, local or remote; paths are relative to the Zarr group."""

    location: str  # folder or URL of the group, for messages
    sizes: Mapping[str, int]  # size in bytes of each listed file
    open: Callable[[str], IO[bytes]]  # opens a listed file for reading; raises LsmixError
    prefetch: Callable[[Sequence[str]], None] = lambda paths: None  # downloads files that will be opened next


def table_in(folder: Path) -> tuple[Table, dict[str, Any]]:
    """Return the layout and the attributes of the table in ``folder``, whose chunks may not be written yet.

    Raises:
        MissingError: There is no table.
        FormatError: The folder is a Zarr group, but does not have the layout of a table.
        CorruptError: The metadata is damaged.
    """
    found = [*folder.glob(METADATA_NAME), *folder.glob(f"*/{METADATA_NAME}")]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}
    return read_table(TableFiles(location=str(folder), sizes=sizes, open=lambda path: (folder / path).open("rb")))


def read_table(files: TableFiles) -> tuple[Table, dict[str, Any]]:
    """Return the layout and the attributes of a table from its metadata files.

    Raises:
        MissingError, FormatError, CorruptError: As for ``table_in``.
    """
    paths = sorted(path for path in files.sizes if path.count("/") == 1 and path.endswith(f"/{METADATA_NAME}"))
    if METADATA_NAME not in files.sizes:
        raise MissingError(f"no table at {files.location!r}: {METADATA_NAME} does not exist. Download or rebuild it.")
    if not paths:
        raise CorruptError(f"{files.location!r} has no columns. Download or rebuild it.")
    if len(paths) > _MOST_COLUMNS:
        _refuse(files.location, f"it has {len(paths)} columns; lsmix reads at most {_MOST_COLUMNS}")
    for path, most_bytes in {METADATA_NAME: _GROUP_BYTES, **dict.fromkeys(paths, _ARRAY_BYTES)}.items():
        if (size := files.sizes[path]) > most_bytes:
            _refuse(f"{files.location}/{path}", f"it has {size:,} bytes; lsmix reads at most {most_bytes:,}")
    files.prefetch([METADATA_NAME, *paths])
    group = _read_json(files, METADATA_NAME, _Group)
    arrays = [_read_json(files, path, _Array) for path in paths]
    found = [
        _column(f"{files.location}/{path}", path.split("/")[0], array)
        for path, array in zip(paths, arrays, strict=True)
    ]
    lengths = {(array.shape[0], chunk_rows) for array, (_, chunk_rows) in zip(arrays, found, strict=True)}
    if len(lengths) > 1:
        _refuse(files.location, f"its columns have different (rows, rows per chunk): {sorted(lengths)}")
    rows, chunk_rows = lengths.pop()
    columns = tuple(column for column, _ in found)
    return Table(folder=Path(files.location), columns=columns, rows=rows, chunk_rows=chunk_rows), group.attributes


class _Group(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    zarr_format: Literal[3]
    node_type: Literal["group"]
    attributes: dict[str, Any] = {}


class _Array(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    zarr_format: Literal[3]
    node_type: Literal["array"]
    shape: Annotated[list[_Size], msgspec.Meta(min_length=1)]
    data_type: Dtype
    chunk_grid: dict[str, Any]
    chunk_key_encoding: dict[str, Any]
    fill_value: float
    codecs: list[dict[str, Any]]
    attributes: dict[str, Any] = {}
    dimension_names: list[str | None] | None = None
    storage_transformers: tuple[()] = ()


_KEYS = {"name": "default", "configuration": {"separator": "/"}}
_LITTLE_ENDIAN = {"name": "bytes", "configuration": {"endian": "little"}}
_CODECS = [_LITTLE_ENDIAN, {"name": "crc32c"}]


def _column(where: str, name: str, array: _Array) -> tuple[Column, int]:
    """Return a column and its number of rows per chunk."""
    column = Column(name=name, dtype=array.data_type, row_shape=tuple(array.shape[1:]))
    codecs = [{key: value for key, value in codec.items() if value != {}} for codec in array.codecs]
    if column.dtype == "uint8" and codecs[:1] == [{"name": "bytes"}]:
        codecs[0] = _LITTLE_ENDIAN  # the endianness may be omitted for single bytes
    try:
        chunk_rows = msgspec.convert(array.chunk_grid["configuration"]["chunk_shape"][0], _Size)
    except (LookupError, TypeError, msgspec.ValidationError):
        chunk_rows = 1  # the comparison below fails then
    grid = {"name": "regular", "configuration": {"chunk_shape": [chunk_rows, *column.row_shape]}}
    if array.chunk_grid != grid:
        _refuse(where, "its chunk_grid does not have regular chunks of complete rows")
    if array.chunk_key_encoding != _KEYS:
        _refuse(where, f"its chunk_key_encoding is not {_KEYS}")
    if codecs != _CODECS:
        names = [str(codec.get("name"))[:40] for codec in codecs[:4]]
        _refuse(where, f"its codecs must be little-endian bytes and crc32c without settings; got {names}")
    if array.dimension_names is not None and len(array.dimension_names) != len(array.shape):
        _refuse(where, f"it has {len(array.dimension_names)} dimension_names; expected {len(array.shape)}")
    if column.row_bytes > _MOST_BYTES:
        _refuse(where, f"its shape has rows of more than {_MOST_BYTES:,} bytes")
    return column, chunk_rows


def _refuse(where: str, reason: str) -> NoReturn:
    raise FormatError(
        f"{where!r} does not have the layout that lsmix writes: {reason}. Read it with a Zarr library, or rebuild it."
    )


def _read_json(files: TableFiles, path: str, kind: type[_Model]) -> _Model:
    where = f"{files.location}/{path}"
    with files.open(path) as file:
        content = file.read(files.sizes[path])
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError as error:
        _refuse(where, str(error))
    except DECODE_ERRORS as error:
        raise CorruptError(f"{where!r} is damaged: {error}. Download or rebuild it.") from error
