"""Export a pool as Parquet in the layout of Hugging Face ``datasets``: encoded images, and labels with class names.

Columns are not compressed because the images already are.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lsmix.data.errors import LsmixError
from lsmix.data.exports.format import ExportFormat, ExportJob

__all__ = ["PARQUET_FORMAT", "parquet_file"]

_ABOUT_KEY = b"lsmix"
_HUB_KEY = b"huggingface"
_Append = Callable[[Mapping[str, Any]], None]  # column name to array (n,) or list


@contextmanager
def parquet_file(path: Path, job: ExportJob, leading: Mapping[str, str]) -> Iterator[_Append]:
    """Create a Parquet file for a pool's columns without the image; yield a function that appends a row group.

    Args:
        path: The file to create.
        job: The export.
        leading: Additional columns at the front, name to type: "image", "string" or "int64".

    Raises:
        LsmixError: Pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as error:
        raise LsmixError(f"this format needs pyarrow ({error}). Install it: pip install 'lsmix[parquet]'") from error
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    fields = [(name, image if kind == "image" else pa.type_for_alias(kind)) for name, kind in leading.items()]
    # ``datasets`` needs the features to decode images and to show class names.
    features: dict[str, Any] = {
        name: {"_type": "Image"} if kind == "image" else {"dtype": kind, "_type": "Value"}
        for name, kind in leading.items()
    }
    class_names = job.pool.class_names
    for column in job.pool.attributes.columns():
        if column.row == "image":
            continue
        kind = pa.from_numpy_dtype(np.dtype(column.dtype))
        fields.append((column.name, pa.list_(kind) if column.row == "more" else kind))
        feature: dict[str, Any] = {"dtype": column.dtype, "_type": "Value"}
        # ``datasets`` rejects duplicate class names.
        if column.kind == "label" and len(set(class_names)) == len(class_names):
            feature = {"names": class_names, "_type": "ClassLabel"}
        features[column.name] = {"feature": feature, "_type": "Sequence"} if column.row == "more" else feature
    about = {_HUB_KEY: msgspec.json.encode({"info": {"features": features}}), _ABOUT_KEY: job.about}
    schema = pa.schema(fields).with_metadata(about)
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False, "version": "2.6"}
    with pa.parquet.ParquetWriter(path, schema, **options) as writer:

        def append(columns: Mapping[str, Any]) -> None:
            table = pa.Table.from_arrays([pa.array(columns[field.name], field.type) for field in schema], schema=schema)
            writer.write_table(table, row_group_size=len(table))

        yield append


def _write(job: ExportJob) -> Iterator[Path]:
    for path, rows in job.shards("parquet"):
        with parquet_file(path, job, {"image": "image"}) as append:
            for block in job.blocks(rows):
                images = [{"bytes": job.encode(image)} for image in block.pop("image")]
                numbers = {name: values if values.ndim == 1 else list(values) for name, values in block.items()}
                append({"image": images, **numbers})
        yield path


PARQUET_FORMAT = ExportFormat(
    write=_write,
    encodes=True,
    hub_files=("pool-*.parquet",),
    row_overhead_bytes=256,
    loads_with="datasets.load_dataset(folder)",
)
