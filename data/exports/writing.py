"""Writing a pool in another format: all of it beside its final name, and then the rename.

The pool is read twice, first for the facts that every file carries, so that a damaged one is found before anything is
written.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

from lsmix.data.errors import LsmixError, RecipeError
from lsmix.data.exports.atomic_folder import check_space, folder_beside
from lsmix.data.exports.format import EXPORT_FORMATS, README_NAME, ExportFormat, ExportJob
from lsmix.data.exports.image_coder import Encoding, ImageCoder
from lsmix.data.exports.metadata import gather_facts
from lsmix.data.exports.readme import readme_text
from lsmix.data.exports.record import ExportRecord, write_record
from lsmix.data.mixing import nearest
from lsmix.data.pool import Pool

__all__ = ["write_export"]

_FILE_BYTES = 500_000_000  # of a file, unless asked otherwise
_MOST_FILE_BYTES = 20_000_000_000  # the big hubs refuse longer ones
_MOST_FILES = 9_990  # … and folders of 10,000 files


def write_export(
    pool: Pool,
    target: Path,
    *,
    form: str,
    shard_images: int = 0,
    encoding: Encoding = "png",
    on_rows: Callable[[int], None] = lambda rows: None,
) -> ExportRecord:
    """Write a pool to a new folder in another form.

    Args:
        pool: any.
        target: the folder to make; its parent exists.
        form: a name in ``EXPORT_FORMATS``.
        shard_images: images in a file (of "folder": in a sub-folder); 0 takes about 500 MB, or 5,000 images.
        encoding: how images are packed in forms that hold image files: "png" or "webp", both without loss.
        on_rows: is told the number of rows read, and then of rows written, block by block.

    Returns:
        The record that lies in the folder too.

    Raises:
        RecipeError: the form is unknown or cannot hold these images, the files would be too many or too long, or there
            is something at ``target`` already.
        MissingError: there is no folder to put it in.
        LockedError: another process is writing it.
        DiskSpaceError: it would not fit on the disk.
        CorruptError: the pool is damaged.
        LsmixError: a library that the form needs is not installed.
    """
    kind: ExportFormat = EXPORT_FORMATS.load(form)
    if encoding not in get_args(Encoding):
        raise RecipeError(f"unknown image encoding {encoding!r}.{nearest(encoding, list(get_args(Encoding)))}")
    if kind.encodes:
        ImageCoder(encoding, pool.image_shape)  # which says what it cannot hold
    row_bytes = sum(column.row_bytes for column in pool.columns.values()) + kind.row_overhead_bytes
    shard_images = _shard_images(kind, shard_images, len(pool), row_bytes)
    with folder_beside(target) as folder:
        check_space(folder, row_bytes * len(pool), f"the export of {pool.location!r}")
        facts = gather_facts(pool, on_rows)
        job = ExportJob(
            pool=pool, facts=facts, folder=folder, shard_images=shard_images, encoding=encoding, on_rows=on_rows
        )
        written_as = encoding if kind.encodes else "raw"
        return write_record(
            folder, _files(kind, job), facts, format=form, encoding=written_as, shard_images=shard_images
        )


def _files(kind: ExportFormat, job: ExportJob) -> Iterator[Path]:
    for path in kind.write(job):
        name = path.relative_to(job.folder).as_posix()
        if not kind.may_hold(name):
            raise LsmixError(f"the export format wrote {name!r}, which its pattern {kind.files!r} does not allow.")
        yield path
    path = job.folder / README_NAME
    path.write_text(readme_text(job.pool, job.facts, kind), encoding="utf-8", newline="\n")
    yield path


def _shard_images(kind: ExportFormat, asked: int, images: int, row_bytes: int) -> int:
    if kind.folder_images:
        if asked > _MOST_FILES:
            raise RecipeError(
                f"sub-folders of {asked} images: the big hubs refuse 10,000 files and more. Ask for fewer."
            )
        return asked or kind.folder_images
    shard_images = asked or max(_FILE_BYTES // row_bytes, 1)
    if shard_images < images and -(-images // shard_images) > _MOST_FILES:
        raise RecipeError(
            f"{shard_images} images a file make {-(-images // shard_images)} files, and the big hubs refuse 10,000 and "
            f"more in a folder. Ask for {-(-images // _MOST_FILES)} images or more."
        )
    if min(shard_images, images) * row_bytes > _MOST_FILE_BYTES:
        raise RecipeError(
            f"{shard_images} images of {row_bytes} bytes make files of more than 20 GB, which the big hubs refuse. "
            f"Ask for {_MOST_FILE_BYTES // row_bytes} images or fewer."
        )
    return shard_images
