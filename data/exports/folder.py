"""Export a pool as a folder of images with one sub-folder per class, the layout of torchvision's ``ImageFolder``.

Each image is stored in the folder of its *first* label; ``metadata.jsonl`` and ``metadata.parquet`` contain all columns
of all rows, including the second label and its share. Folder names begin with the label's number, because
``ImageFolder`` numbers classes in sorted order, and keep only letters, digits, "_" and "-" of the class name.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from lsmix.data.errors import RecipeError
from lsmix.data.exports.format import ExportFormat, ExportJob
from lsmix.data.exports.parquet import parquet_file

__all__ = ["FOLDER_FORMAT"]

_LINES = "metadata.jsonl"  # for people and scripts
_TABLE = "metadata.parquet"  # the same for ``datasets``, which would read the labels of the JSON file as plain integers
_GROUP_ROWS = 10_000  # rows per row group of the table
_MAX_ENTRIES = 9999  # per folder, because Hugging Face and similar hubs reject larger folders


def _write(job: ExportJob) -> Iterator[Path]:
    names = job.pool.class_names
    folders, counts = _class_folders(names), [0] * len(names)
    if max(len(folders), -(-len(job.pool) // job.shard_images)) > _MAX_ENTRIES:
        raise RecipeError(
            f"{len(folders):,} classes with {job.shard_images:,} images per sub-folder need folders of more than "
            f"{_MAX_ENTRIES:,} entries, which the large hubs reject. Choose larger sub-folders, or webdataset."
        )
    with (
        (job.folder / _LINES).open("wb") as lines,
        parquet_file(job.folder / _TABLE, job, {"file_name": "string", "row": "int64"}) as append,
    ):
        pending: list[dict[str, Any]] = []  # rows that are not in the table yet
        for image, metadata in job.samples(range(len(job.pool))):
            label, row = metadata["label_a"], metadata["row"]
            sub_folder = f"{counts[label] // job.shard_images:04d}"
            name = f"images/{folders[label]}/{sub_folder}/{row:08d}.{job.encoding}"
            path = job.folder / name
            if not counts[label] % job.shard_images:
                path.parent.mkdir(parents=True)
            path.write_bytes(image)
            counts[label] += 1
            pending.append({"file_name": name, **metadata})
            lines.write(msgspec.json.encode(pending[-1]) + b"\n")
            if len(pending) == _GROUP_ROWS or row == len(job.pool) - 1:
                append({key: [values[key] for values in pending] for key in pending[0]})
                pending.clear()
            yield path
    yield job.folder / _LINES
    yield job.folder / _TABLE


def _class_folders(names: tuple[str, ...]) -> list[str]:
    """Return the folder name of each class: its number and up to 40 characters of its sanitised name."""
    digits = len(str(len(names) - 1))
    sanitised = (re.sub("[^A-Za-z0-9_-]+", "_", name).strip("_")[:40] for name in names)
    return [f"{label:0{digits}d}-{name}".rstrip("-") for label, name in enumerate(sanitised)]


FOLDER_FORMAT = ExportFormat(
    write=_write,
    encodes=True,
    hub_files=("images/**", "metadata.parquet"),
    row_overhead_bytes=1024,
    loads_with='torchvision.datasets.ImageFolder(f"{folder}/images")',
    note="Each image is in the folder of its first label. `metadata.jsonl` and `metadata.parquet` have all columns, "
    "one row per image.",
    folder_images=5000,
)
