"""The registry of export formats, and the interface that a format implements.

Other packages can add formats with the entry point group ``lsmix.export_formats``.
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

Block = dict[str, NDArray[Any]]  # consecutive rows: column name to array
Encoding = Literal["png", "webp"]
_BLOCK_BYTES = 8 << 20
# On 32×32 photographs zlib level 6 saves 3% over level 1 and takes 9% longer; WebP's slower methods save as little.
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
    """A pool to export, with the target folder and options."""

    pool: Pool
    origin: Provenance  # of the pool's images
    folder: Path  # an empty folder
    shard_images: int  # rows per file; for the format "folder", images per sub-folder
    encoding: Encoding  # for formats that contain image files
    on_rows: Callable[[int], None]  # called with the number of rows of each block after it was written
    digests: dict[str, Any] = field(default_factory=dict)  # a SHA-256 object per column, over the rows read so far

    @property
    def about(self) -> bytes:
        """JSON that describes the pool, to be stored in the exported files."""
        metadata = {
            "pool": self.pool.manifest.name,
            "pool_content_digest": self.pool.manifest.content_digest,
            "class_names": self.pool.class_names,
            "licence": self.origin.licence,
            "citation": self.origin.citation,
            "origin": self.origin,
        }
        return msgspec.json.encode(metadata, order="sorted")

    def shards(self, extension: str) -> Iterator[tuple[Path, range]]:
        """Yield the path of each file to write (``pool-00000.…``, ``pool-00001.…``, …) and its range of rows."""
        for number, start in enumerate(range(0, len(self.pool), self.shard_images)):
            path = self.folder / f"pool-{number:05d}.{extension}"
            yield path, range(start, min(start + self.shard_images, len(self.pool)))

    def blocks(self, rows: range) -> Iterator[Block]:
        """Yield rows of the pool in blocks of about 8 MiB.

        A format must read each row of the pool exactly once, in order, because the column digests are computed here.

        Raises:
            CorruptError: A chunk is damaged, or a value is out of range.
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
        """Yield each row of the pool as an encoded image and its metadata, which can be written as JSON."""
        names, row = self.pool.class_names, rows.start
        for block in self.blocks(rows):
            numbers = {name: values.tolist() for name, values in block.items() if name != "image"}
            for index, image in enumerate(block["image"]):
                metadata = {"row": row} | {name: values[index] for name, values in numbers.items()}
                metadata["class_a"], metadata["class_b"] = names[metadata["label_a"]], names[metadata["label_b"]]
                yield self.encode(image), metadata
                row += 1

    def encode(self, image: NDArray[np.uint8]) -> bytes:
        """Return an image uint8 (H, W, C) as the bytes of a lossless PNG or WebP file."""
        content = io.BytesIO()
        picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        if self.encoding == "png":
            picture.save(content, "PNG", compress_level=_PNG_LEVEL)
        else:
            picture.save(content, "WEBP", lossless=True, quality=0, method=0, exact=True)
        return content.getvalue()


@dataclass(frozen=True, kw_only=True)
class ExportFormat:
    """An export format."""

    # Writes the files of a job and yields each file once it is complete; the caller then hashes it. File names must
    # come from ``ExportJob.shards``; other names are rejected, see ``ARTIFACT_FILES``.
    write: Callable[[ExportJob], Iterator[Path]]
    encodes: bool  # whether the format contains image files, so that ``encoding`` applies
    row_overhead_bytes: int  # approximate size of a row in addition to its pixels and numbers
    loads_with: str  # a line of Python for the export's README that reads the files in ``folder``
    hub_files: tuple[str, ...] = ("samples.csv",)  # the files that Hugging Face ``datasets`` and its hub load as rows
    # The layout of these rows if the files do not declare it: columns as arrays, or samples of an image and a "json".
    hub_row: Literal["", "array", "sample"] = ""
    note: str = ""  # a paragraph for the export's README
    folder_images: int = 0  # default number of images per sub-folder, for formats with one file per image; else 0
