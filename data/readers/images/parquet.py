"""Reader for Hugging Face data sets in Parquet files, or in the Arrow files of ``save_to_disk``.

They need a column of image structs and a column of labels, optionally with ``ClassLabel`` names. Splits are derived
from the names of files, such as ``train-00000-of-00002.parquet``, or of folders; rows keep their order. At most two row
groups of each Parquet file are kept in memory; Arrow files are memory-mapped. Requires pyarrow (the extra ``parquet``).
"""

import itertools
import struct
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import msgspec

from lsmix.data.errors import RecipeError, SourceError, format_bytes
from lsmix.data.readers.images.splits import Labelled, leave_out_beside, make_listing, role_in
from lsmix.data.readers.source_images import (
    ImageConfig,
    ImageListing,
    SourceFormat,
    SourceReport,
    has_ending,
    most_unpacked,
    refused_if_damaged,
)
from lsmix.data.readers.trees import is_hidden, part_order, walk

__all__ = ["PARQUET"]

_ENDINGS = (".parquet", ".arrow")
_SPARE_BYTES = 256 << 20  # any compression ratio is allowed up to this size
_MAX_GROUP_BYTES = 4 << 30  # per row group, because row groups are read into memory
_GROUPS = 2  # row groups kept in memory: the current and the next one


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return [path / name for name in sorted(_names(path), key=part_order)]


def _names(folder: Path) -> Iterator[str]:
    return (name for name in walk(folder) if name.lower().endswith(_ENDINGS) and not is_hidden(name))


def _recognise(path: Path) -> bool:
    return has_ending(path, _ENDINGS) if path.is_file() else any(_names(path))


@contextmanager
def _images(path: Path, config: ImageConfig) -> Iterator[ImageListing]:
    files = _files(path)
    if not files:
        raise SourceError(f"{str(path)!r} contains no Parquet or Arrow files. Check the path.")
    base = path if path.is_dir() else path.parent
    tables = {file.relative_to(base).as_posix(): _Table(file, config) for file in files}
    labelled = [item for name, table in tables.items() for item in table.rows(name)]
    class_names = next((table.class_names for table in tables.values() if table.class_names), None)

    def read(name: str) -> bytes:
        file, _, row = name.rpartition("#")
        return tables[file].image(int(row))

    def label(name: str) -> str:
        file, _, row = name.rpartition("#")
        return f"row {row} of {str(base / file)!r}"

    report = SourceReport(found=len(labelled), unit="rows and files")
    leave_out_beside(path, report)
    yield make_listing(labelled, repr(str(path)), report, read, label, class_names)


class _Table:
    """A Parquet or Arrow file. The images of a row group are read when one of them is requested."""

    def __init__(self, path: Path, config: ImageConfig) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise RecipeError("Parquet and Arrow files require pyarrow. Run: pip install 'lsmix[parquet]'") from error
        self._path = path
        self._lock = threading.Lock()
        self._groups: dict[int, list[Any]] = {}
        self._arrow = None
        with self._readable():
            if has_ending(path, ".arrow"):
                with pa.memory_map(str(path)) as file:
                    _check_messages(pa.ipc.MessageReader.open_stream(file))
                self._arrow = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
                self._arrow.validate(full=True)
                schema = self._arrow.schema
            else:
                self._file = pq.ParquetFile(path)
                self._check_groups(path.stat().st_size)
                schema = self._file.schema_arrow
            self._find_columns(schema, config)

    def _check_groups(self, file_bytes: int) -> None:
        metadata = self._file.metadata
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        sizes = [group.total_byte_size for group in groups]
        most = most_unpacked(file_bytes, _SPARE_BYTES)
        if sum(sizes) > most or max(sizes, default=0) > _MAX_GROUP_BYTES:
            raise SourceError(
                f"{str(self._path)!r} would unpack to {format_bytes(sum(sizes))}, with row groups of up to "
                f"{format_bytes(max(sizes))}; lsmix reads at most {format_bytes(most)} from a file of this size, in "
                f"row groups of at most {format_bytes(_MAX_GROUP_BYTES)}. Write it again in smaller row groups."
            )
        self._starts = [0, *itertools.accumulate(group.num_rows for group in groups)]

    def _find_columns(self, schema: Any, config: ImageConfig) -> None:
        import pyarrow as pa

        structs = [
            field.name
            for field in schema
            if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
        ]
        wanted = (config.label_column, "label", "labels", "fine_label")
        labels = [name for name in wanted if name in schema.names]
        if len(structs) != 1 or not labels:
            raise SourceError(
                f"{str(self._path)!r} must have one column of images (a struct with bytes) and a column of labels; its "
                f"columns are {schema.names[:20]}. Set data.label_column."
            )
        self._image_column, self._label_column = structs[0], labels[0]
        self.class_names = _class_names(schema.metadata or {}, self._label_column)

    def rows(self, name: str) -> Iterator[Labelled]:
        """Yield every row with its label."""
        role = role_in(name)
        with self._readable():
            stored = self._file.read(columns=[self._label_column]) if self._arrow is None else self._arrow
            labels = stored.column(self._label_column).to_pylist()
        for row, label in enumerate(labels):
            if not isinstance(label, str | int):
                raise SourceError(f"row {row} of {str(self._path)!r} has the label {label!r}. Correct it.")
            yield Labelled(f"{name}#{row}", label, role)

    def image(self, row: int) -> bytes:
        """Return the content of the image of a row."""
        with self._lock, self._readable():
            if self._arrow is not None:
                content = (self._arrow.column(self._image_column)[row].as_py() or {}).get("bytes")
            else:
                content = self._in_group(row)
        if not isinstance(content, bytes):
            raise SourceError(
                f"row {row} of {str(self._path)!r} contains no image, possibly only a path. Embed the images."
            )
        return content

    def _in_group(self, row: int) -> Any:
        group = next(number for number, end in enumerate(self._starts[1:]) if row < end)
        if group not in self._groups:
            while len(self._groups) >= _GROUPS:
                del self._groups[min(self._groups)]
            column = self._file.read_row_group(group, columns=[f"{self._image_column}.bytes"]).column(0)
            self._groups[group] = (
                column.combine_chunks().field("bytes") if column.num_chunks != 1 else column.chunk(0).field("bytes")
            )
        return self._groups[group][row - self._starts[group]].as_py()

    def _readable(self) -> AbstractContextManager[None]:
        import pyarrow as pa

        errors = (pa.ArrowException, OSError, ValueError, LookupError, struct.error)
        kind = "an Arrow file" if has_ending(self._path, ".arrow") else "a Parquet file"
        return refused_if_damaged(repr(str(self._path)), kind, *errors)


def _check_messages(messages: Iterable[Any]) -> None:
    """Raise ValueError for compressed batches, which could unpack to any size, and for dictionaries.

    ``save_to_disk`` writes neither. The metadata of a message is a FlatBuffer in which field 3 of a record batch is its
    compression.
    """
    for message in messages:
        data = message.metadata.to_pybytes()

        def at(table: int, field: int, data: bytes = data) -> int:
            (back,) = struct.unpack_from("<i", data, table)
            (size,) = struct.unpack_from("<H", data, table - back)
            (offset,) = struct.unpack_from("<H", data, table - back + 4 + 2 * field) if 4 + 2 * field < size else (0,)
            return table + offset if offset else 0

        def target(place: int, data: bytes = data) -> int:
            return place + int(struct.unpack_from("<I", data, place)[0])

        if message.type not in ("schema", "record batch") or (
            message.type == "record batch" and at(target(at(target(0), 2)), 3)
        ):
            raise ValueError("it contains compressed batches or dictionaries")


def _class_names(metadata: dict[bytes, bytes], column: str) -> tuple[str, ...] | None:
    """Return the names of a ClassLabel that the datasets library stored in the schema; None if there are none."""
    try:
        features = msgspec.json.decode(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return msgspec.convert(features[column]["names"], tuple[str, ...])
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


PARQUET = SourceFormat(
    name="parquet",
    recognise=_recognise,
    files=_files,
    images=_images,
)
