"""Pools as Parquet, as Hugging Face ``datasets`` writes and reads them: encoded images, labels with their class names.

Columns are plain and uncompressed, since the images are compressed already.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lsmix.data.errors import LsmixError
from lsmix.data.exports.format import ExportFormat, ExportJob
from lsmix.data.pool import Pool

__all__ = ["PARQUET_FORMAT"]

_FACTS_KEY = b"lsmix"
_HUB_KEY = b"huggingface"


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
    schema = _schema(pa, job.pool).with_metadata(_metadata(job))
    for path, rows in job.shards("parquet"):
        options = {"compression": "none", "use_dictionary": False, "write_statistics": False, "version": "2.6"}
        with pa.parquet.ParquetWriter(path, schema, **options) as writer:
            for block in job.blocks(rows):
                count = len(block["status"])
                files = pa.array([coder.encode(image) for image in block.pop("image")], pa.binary())
                image = pa.StructArray.from_arrays([files, pa.nulls(count, pa.string())], names=["bytes", "path"])
                columns = {"image": image, **{name: _to_arrow(pa, values) for name, values in block.items()}}
                table = pa.Table.from_arrays([columns[field.name] for field in schema], schema=schema)
                writer.write_table(table, row_group_size=count)
        yield path


def _schema(pa: Any, pool: Pool) -> Any:
    fields = [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))]
    for column in pool.attributes.columns():
        if column.row != "image":
            kind = pa.from_numpy_dtype(np.dtype(column.dtype))
            fields.append((column.name, pa.list_(kind) if column.row == "more" else kind))
    return pa.schema(fields)


def _metadata(job: ExportJob) -> dict[bytes, bytes]:
    """Return what makes ``datasets`` decode images and name classes, and our own facts."""
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    class_names = job.pool.class_names
    for column in job.pool.attributes.columns():
        if column.row == "image":
            continue
        feature: dict[str, Any] = {"dtype": column.dtype, "_type": "Value"}
        # datasets refuses names that stand for two classes.
        if column.kind == "label" and len(set(class_names)) == len(class_names):
            feature = {"names": class_names, "_type": "ClassLabel"}
        features[column.name] = {"feature": feature, "_type": "Sequence"} if column.row == "more" else feature
    return {_HUB_KEY: msgspec.json.encode({"info": {"features": features}}), _FACTS_KEY: job.about}


def _to_arrow(pa: Any, values: NDArray[Any]) -> Any:
    if values.ndim == 1:
        return pa.array(values)
    offsets = np.arange(0, values.size + 1, values.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.reshape(-1)))


PARQUET_FORMAT = ExportFormat(
    write=_write,
    encodes=True,
    hub_files="pool-*.parquet",
    row_overhead_bytes=256,
    loads_with='datasets.load_dataset("parquet", data_files=f"{folder}/pool-*.parquet")',
)
