"""The export formats by name, and what each of them consists of: how it writes a pool, and how its files are read.

Other packages add formats with the entry point group ``lsmix.export_formats``.
"""

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lsmix.data.mixing import Registry
from lsmix.data.pool import Pool
from lsmix.data.pool_spec import Provenance

__all__ = ["EXPORT_FORMATS", "Block", "Encoding", "ExportFormat", "ExportJob"]

Block = dict[str, NDArray[Any]]  # some rows, by column
Encoding = Literal["png", "webp"]
_BLOCK_BYTES = 8 << 20
# Of 32×32 photographs zlib's level 6 saves 3% over level 1 and takes 9% longer; WebP's slower methods save as little.
_PNG_LEVEL = 1

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
    digests: dict[str, Any] = field(default_factory=dict)  # SHA-256 of each column, of the rows that were read

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
        columns = self.pool.columns
        step = max(_BLOCK_BYTES // sum(column.row_bytes for column in columns.values()), 1)
        for start in range(rows.start, rows.stop, step):
            stop = min(start + step, rows.stop)
            block = self.pool.rows(start, stop, tuple(columns))
            for name, values in block.items():
                stored = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
                self.digests.setdefault(name, hashlib.sha256()).update(stored.view(np.uint8).data)
            yield block
            self.on_rows(stop - start)

    def samples(self, rows: range) -> Iterator[tuple[bytes, dict[str, Any]]]:
        """Go through rows of the pool: the file of each image, and the rest of its row, ready for JSON."""
        names, row = self.pool.class_names, rows.start
        for block in self.blocks(rows):
            numbers = {name: values.tolist() for name, values in block.items() if name != "image"}
            for index, image in enumerate(block["image"]):
                facts = {"row": row} | {name: values[index] for name, values in numbers.items()}
                facts["class_a"], facts["class_b"] = names[facts["label_a"]], names[facts["label_b"]]
                yield self.encode(image), facts
                row += 1

    def encode(self, image: NDArray[np.uint8]) -> bytes:
        """Return the file of an image uint8 (H, W, C), without loss."""
        content = io.BytesIO()
        picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        if self.encoding == "png":
            picture.save(content, "PNG", compress_level=_PNG_LEVEL)
        else:
            picture.save(content, "WEBP", lossless=True, quality=0, method=0, exact=True)
        return content.getvalue()


@dataclass(frozen=True, kw_only=True)
class ExportFormat:
    """One format that pools are exported in."""

    # Writes the files of a job and yields each one when it is complete, so that it can be hashed at once. Names are those
    # of ``ExportJob.shards``; other names are refused, see ``ARTIFACT_FILES``.
    write: Callable[[ExportJob], Iterator[Path]]
    encodes: bool  # whether it holds image files, so that ``encoding`` counts
    row_overhead_bytes: int  # of a row beyond its pixels and numbers, about
    loads_with: str  # a line of Python that reads it from ``folder``, for the export's README
    hub_files: tuple[str, ...] = ("samples.csv",)  # what Hugging Face ``datasets`` and its hub take for the rows
    # How these rows look, if the files do not say so: with the columns as arrays, or as samples of an image and a "json".
    hub_row: Literal["", "array", "sample"] = ""
    note: str = ""  # a paragraph for that README
    folder_images: int = 0  # of a format with a file for each image: images in a sub-folder, unless asked otherwise
