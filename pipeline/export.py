"""Writing a pool in another format: what ``lsmix export`` does."""

from pathlib import Path
from typing import Any, Literal

from lsmix.data.artifact import FileRecord
from lsmix.data.pool import open_pool
from lsmix.data.pool_spec import PLAN_NAME
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
    """Write a pool to the new folder ``dest`` in another format, with its card: what ``lsmix export`` does.

    Args:
        pool: the artifact's folder or its URL.
        dest: the folder to make.
        format: a name in ``EXPORT_FORMATS``: "hdf5", "parquet", "webdataset", "folder", or one of another package.
        shard_images: images in a file (of "folder": in a sub-folder); 0 takes about 500 MB, or 5,000 images.
        image: how images are packed in formats that hold image files, without loss.
        progress: optional progress reporter.

    Returns:
        Facts ready for JSON: ``folder``, ``format``, ``images``, ``files``, ``bytes``, ``content_digest`` of the export, ``pool_content_digest``,
        ``pixel_digest``.

    Raises:
        LsmixError: with one sentence on what is wrong, where, and what to do.
    """
    from lsmix.data.exports.format import EXPORT_FORMATS
    from lsmix.data.exports.writing import write_export
    from lsmix.pipeline.views.dataset_card.card import write_card_files

    target = local_target(dest, "an export")
    progress = progress or NullProgress()
    opened = open_pool(pool)

    def advance(rows: int) -> None:
        progress.advance(rows)
        stop_point()

    def describe(folder: Path, files: list[FileRecord]) -> None:
        if opened.spec is None:
            progress.warning(f"pool {opened.location!r} has no {PLAN_NAME}, so its export has no card.")
        else:
            write_card_files(folder, opened, files, form=EXPORT_FORMATS.load(format))

    progress.start(f"export {target.name}", len(opened), "image")
    with graceful_signals():
        manifest = write_export(
            opened,
            target,
            form=format,
            shard_images=shard_images,
            encoding=image,
            describe=describe,
            on_rows=advance,
        )
    progress.finish()
    return {
        "folder": str(target),
        "format": format,
        "images": len(opened),
        "files": len(manifest.files),
        "bytes": sum(file.bytes for file in manifest.files),
        "content_digest": manifest.content_digest,
        "pool_content_digest": opened.manifest.content_digest,
        "pixel_digest": manifest.counts["pixel_digest"],
    }
