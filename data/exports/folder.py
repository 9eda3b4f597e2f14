"""Pools as a folder of images, one sub-folder a class, as torchvision's ``ImageFolder`` reads them.

An image lies under the class of its *first* label; the second label and its share stand in
``metadata.jsonl``, which has every column of every row. Names of folders begin with the label's number, so that sorted
names give the labels, and never hold what a stranger's class name could smuggle in.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from lsmix.data.errors import RecipeError
from lsmix.data.exports.format import ExportFormat, ExportJob
from lsmix.data.exports.rows import row_metadata

__all__ = ["FOLDER_FORMAT"]

_METADATA = "metadata.jsonl"
_MOST_ENTRIES = 9999  # of a folder, for the big hubs


def _write(job: ExportJob) -> Iterator[Path]:
    coder, names = job.coder, job.pool.class_names
    folders, counts, first = _class_folders(names), [0] * len(names), 0
    if max(len(folders), -(-len(job.pool) // job.shard_images)) > _MOST_ENTRIES:
        raise RecipeError(
            f"{len(folders)} classes in sub-folders of {job.shard_images} images make folders of more than {_MOST_ENTRIES} "
            "entries, which the big hubs refuse. Choose larger sub-folders, or webdataset."
        )
    with (job.folder / _METADATA).open("wb") as lines:
        for block in job.blocks(range(len(job.pool))):
            for image, facts in zip(block["image"], row_metadata(block, first, names), strict=True):
                label, row = facts["label_a"], facts["row"]
                inside = f"{counts[label] // job.shard_images:04d}"
                name = f"images/{folders[label]}/{inside}/{row:08d}.{coder.ending}"
                path = job.folder / name
                if not counts[label] % job.shard_images:
                    path.parent.mkdir(parents=True)
                path.write_bytes(coder.encode(image))
                counts[label] += 1
                lines.write(msgspec.json.encode({"file_name": name, **facts}) + b"\n")
                yield path
            first += len(block["status"])
    yield job.folder / _METADATA


def _class_folders(names: tuple[str, ...]) -> list[str]:
    """Return the folder of each class: its number, and what is harmless in its name."""
    digits = len(str(len(names) - 1))
    plain = (re.sub("[^A-Za-z0-9_-]+", "_", name).strip("_")[:40] for name in names)
    return [f"{label:0{digits}d}-{name}".rstrip("-") for label, name in enumerate(plain)]


FOLDER_FORMAT = ExportFormat(
    write=_write,
    encodes=True,
    row_overhead_bytes=1024,
    loads_with='torchvision.datasets.ImageFolder(f"{folder}/images")',
    note="An image is in the folder of its first label. `metadata.jsonl` has the rest, a line an image.",
    folder_images=5000,
)
