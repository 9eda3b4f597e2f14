"""What every form of export has in common: a job to write, and the files that come of it.

The one rule: a writer yields each file when it is whole and never touches it again, so that it can be hashed at once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lsmix.data.exports.image_coder import Encoding, ImageCoder
from lsmix.data.exports.metadata import ExportFacts
from lsmix.data.pool import Pool

__all__ = ["ExportFormat", "ExportJob"]


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
    """One form of export."""

    name: str  # what users call it
    write: Callable[[ExportJob], Iterator[Path]]
    encodes: bool  # whether it holds image files, so that ``encoding`` counts
    row_overhead_bytes: int  # of a row beyond its pixels and numbers, about
    loads_with: str  # a line of Python that reads it from ``folder``, for the export's README
