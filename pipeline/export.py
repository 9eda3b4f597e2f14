"""Writing a pool in another format: what ``lsmix export`` does."""

from pathlib import Path
from typing import Any, Literal

from lsmix.data.pool import open_pool
from lsmix.data.progress import NullProgress, Progress, graceful_signals, stop_point
from lsmix.data.store import local_target

__all__ = ["export_pool"]


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
        pool: the artifact's folder or its URL.
        dest: the folder to make.
        format: a name in ``EXPORT_FORMATS``: "hdf5", "parquet", "webdataset", "folder", or one of another package.
        shard_images: images in a file (of "folder": in a sub-folder); 0 takes about 500 MB, or 5,000 images.
        image: how images are packed in forms that hold image files, without loss.
        progress: is told what happens; None tells nobody.

    Returns:
        Facts ready for JSON: ``folder``, ``format``, ``images``, ``files``, ``bytes``, ``root``, ``pixel_digest``.

    Raises:
        LsmixError: with one sentence on what is wrong, where, and what to do.
    """
    from lsmix.data.exports.writing import write_export

    target = local_target(dest, "an export")
    progress = progress or NullProgress()
    opened = open_pool(pool)

    def advance(rows: int) -> None:
        progress.advance(rows)
        stop_point()

    progress.start(f"export {target.name}", 2 * len(opened), "image")  # each is read for its digest, then written
    with graceful_signals():
        record = write_export(opened, target, form=format, shard_images=shard_images, encoding=image, on_rows=advance)
    progress.finish()
    return {
        "folder": str(target),
        "format": format,
        "images": record.facts.images,
        "files": record.files,
        "bytes": record.bytes,
        "root": record.facts.root,
        "pixel_digest": record.pixel_digest,
    }
