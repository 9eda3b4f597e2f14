"""The export formats by name, and what each of them consists of: how it writes a pool, and which files come of it.

Other packages add formats with the entry point group ``lsmix.export_formats``.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lsmix.data.exports.image_coder import Encoding, ImageCoder
from lsmix.data.exports.metadata import ExportFacts
from lsmix.data.mixing import Registry
from lsmix.data.pool import Pool

__all__ = ["EXPORT_FORMATS", "README_NAME", "ExportFormat", "ExportJob"]

README_NAME: Final = "README.md"  # of every export
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
    facts: ExportFacts
    folder: Path  # empty
    shard_images: int  # rows in a file; of ``folder``, in a sub-folder
    encoding: Encoding  # of images in forms that hold image files
    on_rows: Callable[[int], None]  # is told rows as they are written

    @property
    def coder(self) -> ImageCoder:
        """What encodes the images."""
        return ImageCoder(self.encoding, self.pool.image_shape)

    def shards(self, ending: str) -> Iterator[tuple[Path, range]]:
        """Go through the files to write, ``pool-00000`` and so on, with the rows of each."""
        for number, start in enumerate(range(0, len(self.pool), self.shard_images)):
            path = self.folder / f"pool-{number:05d}.{ending}"
            yield path, range(start, min(start + self.shard_images, len(self.pool)))


@dataclass(frozen=True, kw_only=True)
class ExportFormat:
    """One format that pools are exported in."""

    # Writes the files of a job and yields each one when it is complete, so that it can be hashed at once.
    write: Callable[[ExportJob], Iterator[Path]]
    files: (
        str  # a regular expression for the whole path of each file it writes; an export that lists another is refused
    )
    encodes: bool  # whether it holds image files, so that ``encoding`` counts
    row_overhead_bytes: int  # of a row beyond its pixels and numbers, about
    loads_with: str  # a line of Python that reads it from ``folder``, for the export's README
    note: str = ""  # a paragraph for that README
    folder_images: int = 0  # of a format with sub-folders for files: images in each, unless asked otherwise

    def may_hold(self, path: str) -> bool:
        """Tell whether an export in this format can hold a file at a path, relative to its folder."""
        return path == README_NAME or re.fullmatch(self.files, path) is not None
