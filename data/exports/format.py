"""The export formats by name, and what each of them consists of: how it writes a pool, and how its files are read.

Other packages add formats with the entry point group ``lsmix.export_formats``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from lsmix.data.exports.image_coder import Encoding, ImageCoder
from lsmix.data.exports.rows import Block, ColumnDigests, pool_blocks
from lsmix.data.mixing import Registry
from lsmix.data.pool import Pool
from lsmix.data.pool_spec import Provenance

__all__ = ["EXPORT_FORMATS", "ExportFormat", "ExportJob"]

EXPORT_FORMATS: Final = Registry(
    "export format",
    "lsmix.export_formats",
    {
        "hdf5": "lsmix.data.exports.hdf5:HDF5_FORMAT",
        "parquet": "lsmix.data.exports.parquet:PARQUET_FORMAT",
        "webdataset": "lsmix.data.exports.webdataset:WEBDATASET_FORMAT",
        "folder": "lsmix.data.exports.folder:FOLDER_FORMAT",
    },
)


@dataclass(frozen=True, kw_only=True)
class ExportJob:
    """A pool to write, and where."""

    pool: Pool
    origin: Provenance  # of the pool's images
    folder: Path  # empty
    shard_images: int  # rows in a file; of ``folder``, in a sub-folder
    encoding: Encoding  # of images in formats that hold image files
    on_rows: Callable[[int], None]  # gets the number of rows of each block once it is written
    digests: ColumnDigests = field(default_factory=ColumnDigests)  # of the rows that were read

    @property
    def coder(self) -> ImageCoder:
        """What encodes the images."""
        return ImageCoder(self.encoding, self.pool.image_shape)

    @property
    def about(self) -> bytes:
        """What a file says of the pool that it is from, as JSON."""
        facts = {
            "pool": self.pool.manifest.name,
            "pool_content_digest": self.pool.manifest.content_digest,
            "class_names": self.pool.class_names,
            "licence": self.origin.licence,
            "citation": self.origin.citation,
            "origin": self.origin,
        }
        return msgspec.json.encode(facts, order="sorted")

    def shards(self, ending: str) -> Iterator[tuple[Path, range]]:
        """Go through the files to write, ``pool-00000`` and so on, with the rows of each."""
        for number, start in enumerate(range(0, len(self.pool), self.shard_images)):
            path = self.folder / f"pool-{number:05d}.{ending}"
            yield path, range(start, min(start + self.shard_images, len(self.pool)))

    def blocks(self, rows: range) -> Iterator[Block]:
        """Go through rows of the pool by column, some megabytes at a time; each row of the pool is to be read once.

        Raises:
            CorruptError: a chunk is damaged, or a value is out of its range.
        """
        for block in pool_blocks(self.pool, rows):
            self.digests.update(block)
            yield block
            self.on_rows(len(block["status"]))


@dataclass(frozen=True, kw_only=True)
class ExportFormat:
    """One format that pools are exported in."""

    # Writes the files of a job and yields each one when it is complete, so that it can be hashed at once. Names are those
    # of ``ExportJob.shards``; other names are refused, see ``ARTIFACT_FILES``.
    write: Callable[[ExportJob], Iterator[Path]]
    encodes: bool  # whether it holds image files, so that ``encoding`` counts
    row_overhead_bytes: int  # of a row beyond its pixels and numbers, about
    loads_with: str  # a line of Python that reads it from ``folder``, for the export's README
    hub_files: str = "samples.csv"  # what the Hugging Face Hub shows as a table
    note: str = ""  # a paragraph for that README
    folder_images: int = 0  # of a format with a file for each image: images in a sub-folder, unless asked otherwise
