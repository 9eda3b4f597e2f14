"""Pools as a folder of images, one sub-folder a class, as torchvision's ``ImageFolder`` reads them.

An image is in the folder of its *first* label; the second label and its share are in ``metadata.jsonl`` and
``metadata.parquet``, which have every column of every row. Names of folders begin with the label's number, so that sorted
names give the labels. Of class names they keep letters, digits, "_" and "-" only.
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
_TABLE = "metadata.parquet"  # the same for datasets, which takes the labels for numbers otherwise
_GROUP_ROWS = 10_000  # of the table, written at once
_MOST_ENTRIES = 9999  # of a folder, for the big hubs


def _write(job: ExportJob) -> Iterator[Path]:
    names = job.pool.class_names
    folders, counts = _class_folders(names), [0] * len(names)
    if max(len(folders), -(-len(job.pool) // job.shard_images)) > _MOST_ENTRIES:
        raise RecipeError(
            f"{len(folders)} classes in sub-folders of {job.shard_images} images make folders of more than {_MOST_ENTRIES} "
            "entries, which the big hubs refuse. Choose larger sub-folders, or webdataset."
        )
    with (
        (job.folder / _LINES).open("wb") as lines,
        parquet_file(job.folder / _TABLE, job, {"file_name": "string", "row": "int64"}) as append,
    ):
        rows: list[dict[str, Any]] = []  # that are not in the table yet
        for image, facts in job.samples(range(len(job.pool))):
            label, row = facts["label_a"], facts["row"]
            inside = f"{counts[label] // job.shard_images:04d}"
            name = f"images/{folders[label]}/{inside}/{row:08d}.{job.encoding}"
            path = job.folder / name
            if not counts[label] % job.shard_images:
                path.parent.mkdir(parents=True)
            path.write_bytes(image)
            counts[label] += 1
            rows.append({"file_name": name, **facts})
            lines.write(msgspec.json.encode(rows[-1]) + b"\n")
            if len(rows) == _GROUP_ROWS or row == len(job.pool) - 1:
                append({key: [facts[key] for facts in rows] for key in rows[0]})
                rows.clear()
            yield path
    yield job.folder / _LINES
    yield job.folder / _TABLE


def _class_folders(names: tuple[str, ...]) -> list[str]:
    """Return the folder of each class: its number, and what is harmless in its name."""
    digits = len(str(len(names) - 1))
    plain = (re.sub("[^A-Za-z0-9_-]+", "_", name).strip("_")[:40] for name in names)
    return [f"{label:0{digits}d}-{name}".rstrip("-") for label, name in enumerate(plain)]


FOLDER_FORMAT = ExportFormat(
    write=_write,
    encodes=True,
    hub_files=("images/**", "metadata.parquet"),
    row_overhead_bytes=1024,
    loads_with='torchvision.datasets.ImageFolder(f"{folder}/images")',
    note="An image is in the folder of its first label. `metadata.jsonl` and `metadata.parquet` have the rest, a row an image.",
    folder_images=5000,
)
