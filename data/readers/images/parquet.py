"""Hugging Face data sets as Parquet files: a column of image structs, and one of labels with its ``ClassLabel`` names.

Splits follow the files' names, such as ``train-00000-of-00002.parquet``, or their folders; rows keep their order. Needs
pyarrow (the extra ``parquet``). Row groups are read one after the other, so one file of a thread's is in memory.
"""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from lsmix.data.errors import RecipeError, SourceError
from lsmix.data.readers.images.splits import SPLIT_ROLES, Labelled, make_listing
from lsmix.data.readers.source_images import ImageConfig, ImageListing, SourceFormat, SourceReport
from lsmix.data.readers.trees import part_order, walk

__all__ = ["PARQUET"]

_ENDING = ".parquet"
_RATIO = 100  # a file whose columns unpack to more than this many times its size …
_RATIO_BYTES = 256 << 20  # … and to more than this is a bomb
_MOST_GROUP_BYTES = 4 << 30  # of a row group, which is read as a whole
_GROUPS = 2  # row groups in memory: the one in use, and the next


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    names = (name for name in walk(path) if name.endswith(_ENDING) and not name.startswith(".") and "/." not in name)
    return [path / name for name in sorted(names, key=part_order)]


def _recognise(path: Path) -> bool:
    return path.suffix == _ENDING if path.is_file() else bool(_files(path))


@contextmanager
def _images(path: Path, config: ImageConfig) -> Iterator[ImageListing]:
    files = _files(path)
    if not files:
        raise SourceError(f"{str(path)!r} holds no Parquet files. Check the path.")
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

    report = SourceReport(found=len(labelled))
    yield make_listing(labelled, repr(str(path)), report, read, label, class_names)


class _Table:
    """One Parquet file; the images of a row group are read when one of them is wanted."""

    def __init__(self, path: Path, config: ImageConfig) -> None:
        try:
            import pyarrow.parquet as pq
        except ImportError as error:
            raise RecipeError("Parquet files need pyarrow. Run: pip install 'lsmix[parquet]'") from error
        self._path = path
        self._lock = threading.Lock()
        self._groups: dict[int, list[Any]] = {}
        with self._readable():
            self._file = pq.ParquetFile(path)
            metadata = self._file.metadata
            sizes = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
            most = max(_RATIO_BYTES, _RATIO * path.stat().st_size)
            if sum(size.total_byte_size for size in sizes) > most or any(
                size.total_byte_size > _MOST_GROUP_BYTES for size in sizes
            ):
                raise SourceError(f"{str(path)!r} would unpack to far more than its size. Do not use it.")
            self._starts = [0]
            for size in sizes:
                self._starts.append(self._starts[-1] + size.num_rows)
            self._find_columns(config)

    def _find_columns(self, config: ImageConfig) -> None:
        import pyarrow as pa

        schema = self._file.schema_arrow
        structs = [
            field.name
            for field in schema
            if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
        ]
        wanted = (config.label_column, "label", "labels", "fine_label")
        labels = [name for name in wanted if name in schema.names]
        if len(structs) != 1 or not labels:
            raise SourceError(
                f"{str(self._path)!r} must have one column of images (a struct with bytes) and a column of labels; it has "
                f"{schema.names[:20]}. Set data.label_column."
            )
        self._image_column, self._label_column = structs[0], labels[0]
        self.class_names = _class_names(schema.metadata or {}, self._label_column)

    def rows(self, name: str) -> Iterator[Labelled]:
        """Yield every row with its label."""
        words = re.split(r"[^a-z]+", name.lower().removesuffix(_ENDING))
        role = next((SPLIT_ROLES[word] for word in words if word in SPLIT_ROLES), "")
        with self._readable():
            labels = self._file.read(columns=[self._label_column]).column(0).to_pylist()
        for row, label in enumerate(labels):
            if not isinstance(label, str | int):
                raise SourceError(f"row {row} of {str(self._path)!r} has the label {label!r}. Correct it.")
            yield Labelled(f"{name}#{row}", label, role)

    def image(self, row: int) -> bytes:
        """Return the content of the image of a row."""
        group = next(number for number, end in enumerate(self._starts[1:]) if row < end)
        with self._lock, self._readable():
            if group not in self._groups:
                while len(self._groups) >= _GROUPS:
                    del self._groups[min(self._groups)]
                column = self._file.read_row_group(group, columns=[f"{self._image_column}.bytes"]).column(0)
                self._groups[group] = (
                    column.combine_chunks().field("bytes") if column.num_chunks != 1 else column.chunk(0).field("bytes")
                )
            content = self._groups[group][row - self._starts[group]].as_py()
        if not isinstance(content, bytes):
            raise SourceError(
                f"row {row} of {str(self._path)!r} holds no image, perhaps only a path. Embed the images."
            )
        return content

    @contextmanager
    def _readable(self) -> Iterator[None]:
        import pyarrow as pa

        try:
            yield
        except (pa.ArrowException, OSError, ValueError, KeyError, IndexError) as error:
            if isinstance(error, SourceError):
                raise
            raise SourceError(
                f"{str(self._path)!r} is damaged or no Parquet file ({error}). Fetch it again."
            ) from error


def _class_names(metadata: dict[bytes, bytes], column: str) -> tuple[str, ...] | None:
    """Return the names of a ClassLabel, as the datasets library writes them to the schema; None without one."""
    try:
        features = msgspec.json.decode(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return msgspec.convert(features[column]["names"], tuple[str, ...])
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


PARQUET = SourceFormat(
    name="parquet",
    looks_for="Parquet files with a column of images and one of labels, as Hugging Face has them",
    recognise=_recognise,
    files=_files,
    images=_images,
)
