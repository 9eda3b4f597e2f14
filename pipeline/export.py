"""Export and import of pools, as the command line and programs ask for them.

The one rule: Ctrl-C stops between two blocks of rows, and leaves nothing under the name that was asked for.
"""

from pathlib import Path
from typing import Any, Literal

from lsmix.data.pool import open_pool
from lsmix.pipeline.interruption import graceful_signals, stop_point
from lsmix.pipeline.progress import Progress, SilentProgress

__all__ = ["export_pool", "import_pool"]


def export_pool(
    pool: Path | str,
    dest: Path | str,
    *,
    format: str,  # noqa: A002  # what the option is called
    shard_images: int = 0,
    image: Literal["png", "webp"] = "png",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a pool to the new folder ``dest`` in another form: what ``lsmix export`` does.

    Args:
        pool: the artifact's folder.
        dest: the folder to make.
        format: "hdf5", "parquet", "webdataset", "folder" or "npz".
        shard_images: images in a file (of "folder": in a sub-folder); 0 takes about 500 MB, or 5,000 images.
        image: how images are packed in forms that hold image files, without loss.
        progress: is told what happens; None tells nobody.

    Returns:
        Facts ready for JSON: ``folder``, ``format``, ``images``, ``files``, ``bytes``, ``root``, ``pixel_digest``.

    Raises:
        LsmixError: with one sentence on what is wrong, where, and what to do.
    """
    from lsmix.data.exports.writing import write_export

    progress = progress or SilentProgress()
    opened = open_pool(pool)

    def advance(rows: int) -> None:
        progress.advance(rows)
        stop_point()

    progress.start(f"export {Path(dest).name}", 2 * len(opened), "image")  # each is read for its digest, then written
    with graceful_signals():
        record = write_export(
            opened, Path(dest), form=format, shard_images=shard_images, encoding=image, on_rows=advance
        )
    progress.finish()
    return {
        "folder": str(dest),
        "format": format,
        "images": record.facts.images,
        "files": record.files,
        "bytes": record.bytes,
        "root": record.facts.root,
        "pixel_digest": record.pixel_digest,
    }


def import_pool(source: Path | str, dest: Path | str, *, progress: Progress | None = None) -> dict[str, Any]:
    """Make the pool of an HDF5 or Parquet export again, in the new folder ``dest``: what ``lsmix import`` does.

    Args:
        source: the export's folder, or a file of it that holds the whole pool.
        dest: the folder to make.
        progress: is told what happens; None tells nobody.

    Returns:
        Facts ready for JSON: ``folder``, ``images``, ``root``, ``exported_root``, ``pixel_digest``.

    Raises:
        LsmixError: with one sentence on what is wrong, where, and what to do.
    """
    from lsmix.data.exports.reading import read_export

    progress = progress or SilentProgress()

    def advance(rows: int) -> None:
        progress.advance(rows)
        stop_point()

    with graceful_signals():
        pool = read_export(
            Path(source),
            Path(dest),
            on_start=lambda images: progress.start(f"import {Path(dest).name}", images, "image"),
            on_rows=advance,
        )
    progress.finish()
    if pool.root != pool.exported_root:
        progress.warn(
            f"all values are as exported, but the root digest is {pool.root[:12]}, not {pool.exported_root[:12]}: "
            "the exported pool was laid out by another program or version."
        )
    return {"folder": str(dest), **pool._asdict()}
