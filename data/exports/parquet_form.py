"""Pools as Parquet, as Hugging Face ``datasets`` writes and reads them: images as files within, labels with their names.

The one rule: columns are plain and not compressed (images are already), which also lets a reader know what memory a
stranger's file can take before it takes any: no more than the file is long.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lsmix.data.errors import LsmixError, SourceError
from lsmix.data.exports.facts import MAX_FACTS_BYTES, ExportFacts, seal_facts, unseal_facts
from lsmix.data.exports.form import ExportForm, ExportJob
from lsmix.data.exports.rows import Block, block_rows, pool_blocks
from lsmix.data.pool import pool_columns
from lsmix.data.readers.decode import ImageDecoder

__all__ = ["PARQUET_FORM", "ParquetRows"]

_FACTS_KEY = b"lsmix"
_HUB_KEY = b"huggingface"
_MAX_GROUP_BYTES = 1 << 30
_ENCODINGS = frozenset(["PLAIN", "RLE", "BIT_PACKED"])  # the latter two of levels
_SMALLEST_IMAGE_BYTES = 40  # no PNG and no WebP is shorter
_Columns = Mapping[str, tuple[str, tuple[int, ...]]]  # dtype and shape of a row, by name


def _arrow() -> Any:
    """Return pyarrow.

    Raises:
        LsmixError: it is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as error:
        raise LsmixError(f"Parquet needs pyarrow ({error}). Install it: pip install 'lsmix[parquet]'") from error
    return pa


def _write(job: ExportJob) -> Iterator[Path]:
    pa, coder = _arrow(), job.coder
    schema = _schema(pa, job.columns).with_metadata(_metadata(job))
    for path, rows in job.shards("parquet"):
        options = {"compression": "none", "use_dictionary": False, "write_statistics": False, "version": "2.6"}
        with pa.parquet.ParquetWriter(path, schema, **options) as writer:
            for block in pool_blocks(job.pool, rows):
                count = len(block["state"])
                files = pa.array([coder.encode(image) for image in block.pop("image")], pa.binary())
                image = pa.StructArray.from_arrays([files, pa.nulls(count, pa.string())], names=["bytes", "path"])
                columns = {"image": image, **{name: _to_arrow(pa, values) for name, values in block.items()}}
                table = pa.Table.from_arrays([columns[field.name] for field in schema], schema=schema)
                writer.write_table(table, row_group_size=count)
                job.on_rows(count)
        yield path


def _schema(pa: Any, columns: _Columns) -> Any:
    fields = [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))]
    for name, (dtype, row_shape) in columns.items():
        if name != "image":
            kind = pa.from_numpy_dtype(np.dtype(dtype))
            fields.append((name, pa.list_(kind) if row_shape else kind))
    return pa.schema(fields)


def _metadata(job: ExportJob) -> dict[bytes, bytes]:
    """Return what makes ``datasets`` decode images and name classes, and our own facts."""
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    class_names = job.facts.class_names
    for name, (dtype, row_shape) in job.columns.items():
        if name == "image":
            continue
        feature: dict[str, Any] = {"dtype": dtype, "_type": "Value"}
        # datasets refuses names that stand for two classes.
        if name.startswith("label_") and len(set(class_names)) == len(class_names):
            feature = {"names": class_names, "_type": "ClassLabel"}
        features[name] = {"feature": feature, "_type": "Sequence"} if row_shape else feature
    return {_HUB_KEY: msgspec.json.encode({"info": {"features": features}}), _FACTS_KEY: seal_facts(job.facts)}


def _to_arrow(pa: Any, values: NDArray[Any]) -> Any:
    if values.ndim == 1:
        return pa.array(values)
    offsets = np.arange(0, values.size + 1, values.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.reshape(-1)))


class ParquetRows:
    """The rows of one file that an export wrote, or a stranger."""

    ending = "parquet"

    def __init__(self, path: Path, file: Any) -> None:
        self._path, self._file = path, file
        facts = (file.schema_arrow.metadata or {}).get(_FACTS_KEY)
        if facts is None:
            raise SourceError(f"{str(path)!r} has no facts of a pool: 'lsmix export' did not write it.")
        self.facts: ExportFacts = unseal_facts(facts, repr(str(path)))
        self.rows = 0

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator["ParquetRows"]:
        """Open a file.

        Raises:
            SourceError: it is no Parquet file, or no export of a pool.
            CorruptError, FormatError: its facts are damaged or of another version.
        """
        pa = _arrow()
        try:
            # A footer of many times the facts' size is none of ours; Thrift would allocate what it claims.
            with pa.parquet.ParquetFile(path, thrift_string_size_limit=2 * MAX_FACTS_BYTES, pre_buffer=False) as file:
                yield cls(path, file)
        except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError) as error:
            if isinstance(error, LsmixError):
                raise
            raise SourceError(
                f"{str(path)!r} is damaged or no Parquet file ({error}). Fetch or export it again."
            ) from error

    def blocks(self) -> Iterator[Block]:
        """Go through the rows in blocks.

        Raises:
            SourceError: a column is missing, of another type, packed in a way that is not read, or holds no images.
        """
        pa = _arrow()
        columns = pool_columns(self.facts.attributes, self.facts.image_shape, str(self._path))
        expected = _schema(pa, columns)
        found = self._file.schema_arrow
        if not found.remove_metadata().equals(expected):
            raise SourceError(
                f"{str(self._path)!r} must have the columns {_brief(expected)}, got {_brief(found)}. Export it again."
            )
        for group in range(self._file.num_row_groups):
            self._check_group(group, columns)
        step = block_rows(math.prod(self.facts.image_shape))
        height, width, _ = self.facts.image_shape
        decoder = ImageDecoder(width, height)
        for batch in self._file.iter_batches(batch_size=step, use_threads=False):
            yield self._block(batch, columns, decoder)
            self.rows += len(batch)

    def _check_group(self, index: int, columns: _Columns) -> None:
        """Refuse what would unpack to more than it takes in the file."""
        group = self._file.metadata.row_group(index)
        where = f"row group {index} of {str(self._path)!r}"
        size = 0
        for number in range(group.num_columns):
            chunk = group.column(number)
            name, _, inner = chunk.path_in_schema.partition(".")
            dtype, row_shape = columns[name]
            least = np.dtype(dtype).itemsize * math.prod(row_shape) * group.num_rows
            if name == "image":
                least = _SMALLEST_IMAGE_BYTES * group.num_rows if inner == "bytes" else 0
            if chunk.compression != "UNCOMPRESSED" or not set(chunk.encodings) <= _ENCODINGS:
                raise SourceError(
                    f"{where}: column {name!r} is packed ({chunk.compression}, {', '.join(chunk.encodings)}); only plain, "
                    "uncompressed columns, as 'lsmix export' writes them, are read. Fetch the export itself."
                )
            if chunk.total_compressed_size < least:
                raise SourceError(f"{where}: column {name!r} has fewer bytes than its rows need. Do not use it.")
            size += chunk.total_compressed_size
        if size > min(_MAX_GROUP_BYTES, self._path.stat().st_size):
            raise SourceError(
                f"{where} claims {size} bytes, more than there are or than is read at once. Do not use it."
            )

    def _block(self, batch: Any, columns: _Columns, decoder: ImageDecoder) -> Block:
        block: Block = {"image": np.empty((len(batch), *self.facts.image_shape), np.uint8)}
        files = batch.column("image").field("bytes").to_pylist()
        for index, content in enumerate(files):
            name = f"image {self.rows + index} of {str(self._path)!r}"
            if content is None:
                raise SourceError(f"{name} is missing. Fetch or export it again.")
            image = decoder.decode(content, name)
            image = image[..., None] if image.ndim == 2 else image
            if image.shape != self.facts.image_shape:
                raise SourceError(f"{name} is {image.shape}, expected {self.facts.image_shape}. Export it again.")
            block["image"][index] = image
        for name, (dtype, row_shape) in columns.items():
            if name != "image":
                block[name] = self._numbers(batch.column(name), name, row_shape).astype(dtype, copy=False)
        return block

    def _numbers(self, column: Any, name: str, row_shape: tuple[int, ...]) -> NDArray[Any]:
        values = column.flatten() if row_shape else column
        if column.null_count or values.null_count or len(values) != len(column) * math.prod(row_shape):
            raise SourceError(
                f"column {name!r} of {str(self._path)!r} has rows without their numbers. Export it again."
            )
        if row_shape and (np.diff(column.offsets.to_numpy()) != row_shape[0]).any():
            raise SourceError(f"column {name!r} of {str(self._path)!r} has rows of other lengths. Export it again.")
        array: NDArray[Any] = values.to_numpy(zero_copy_only=False)
        return array.reshape(-1, *row_shape)


def _brief(schema: Any) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)[:500]


PARQUET_FORM = ExportForm(
    name="parquet",
    write=_write,
    encodes=True,
    row_overhead_bytes=256,
    loads_with='datasets.load_dataset("parquet", data_files=f"{folder}/pool-*.parquet")',
)
