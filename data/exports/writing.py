"""Writing a pool in another format: an artifact of the stage "export", which gets its name when it is complete."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, get_args

from lsmix.data.artifact import (
    FileRecord,
    InputRecord,
    Manifest,
    content_digest,
    is_expected_path,
    record_file,
    write_manifest,
)
from lsmix.data.atomic import atomic_folder, check_room
from lsmix.data.errors import CorruptError, LsmixError, RecipeError
from lsmix.data.exports.format import EXPORT_FORMATS, Encoding, ExportFormat, ExportJob
from lsmix.data.mixing import nearest
from lsmix.data.pool import Pool
from lsmix.data.pool_spec import PLAN_NAME, read_provenance
from lsmix.data.sharing.descriptions import description_records

__all__ = ["EXPORT_STAGE", "SUMS_NAME", "check_sums", "write_export"]

EXPORT_STAGE: Final = "export"
SUMS_NAME: Final = "SHA256SUMS"
_VERSION: Final = 1
_FILE_BYTES = 500_000_000  # of a file, unless asked otherwise
_MOST_FILE_BYTES = 20_000_000_000  # the big hubs refuse longer ones
_MOST_HUB_FILES = 9_990  # … and folders of 10,000 files
_MOST_FILES = 250_000  # of an export, for its manifest
_MANY_FILES = 1000  # above which one flush of the file systems is quicker than one of each file


def write_export(
    pool: Pool,
    target: Path,
    *,
    form: str,
    shard_images: int = 0,
    encoding: Encoding = "png",
    describe: Callable[[Path, list[FileRecord]], None] = lambda folder, files: None,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Manifest:
    """Write a pool to a new folder in another format.

    Args:
        pool: the pool, which is read once.
        target: the folder to make; its parent exists.
        form: a name in ``EXPORT_FORMATS``.
        shard_images: images in a file (of "folder": in a sub-folder); 0 takes about 500 MB, or 5,000 images.
        encoding: of images in formats that hold image files: "png" or "webp", both without loss.
        describe: gets the folder and its files when they are complete, and may add descriptions to the folder.
        on_rows: gets the number of rows of each block once it is written.

    Returns:
        The manifest of the export.

    Raises:
        RecipeError: the format is unknown or cannot hold these images, the files would be too many or too long, or there
            is something at ``target`` already.
        MissingError: there is no folder to put it in.
        LockedError: another process is writing it.
        DiskSpaceError: it would not fit on the disk.
        CorruptError: the pool is damaged.
        LsmixError: a library that the format needs is not installed.
    """
    kind: ExportFormat = EXPORT_FORMATS.load(form)
    if encoding not in get_args(Encoding):
        raise RecipeError(f"unknown image encoding {encoding!r}.{nearest(encoding, list(get_args(Encoding)))}")
    if kind.encodes:
        _check_encoding(encoding, pool.image_shape[2])
    row_bytes = sum(column.row_bytes for column in pool.columns.values()) + kind.row_overhead_bytes
    shard_images = _shard_images(kind, shard_images, len(pool), row_bytes)
    origin = read_provenance(pool.columns.attributes, f"pool {pool.location!r}")
    with atomic_folder(target) as folder:
        check_room(folder, row_bytes * len(pool), f"the export of {pool.location!r}")
        read = 0

        def count(rows: int) -> None:
            nonlocal read
            read += rows
            on_rows(rows)

        job = ExportJob(
            pool=pool, origin=origin, folder=folder, shard_images=shard_images, encoding=encoding, on_rows=count
        )
        files = sorted(_written(kind, job), key=lambda file: file.path)
        if read != len(pool):
            raise LsmixError(f"the export format {form!r} read {read} rows of {len(pool)}. Report this bug.")
        describe(folder, files)
        (folder / SUMS_NAME).write_text(_sums(files), encoding="utf-8", newline="\n")
        files += [record_file(folder, SUMS_NAME, payload=False), *description_records(folder, EXPORT_STAGE)]
        config = {"format": form, "encoding": encoding if kind.encodes else "raw", "shard_images": shard_images}
        manifest = _manifest(job, config, files)
        if len(files) >= _MANY_FILES:
            os.sync()  # then the flush of each file has nothing left to write
        write_manifest(folder, manifest)
    return manifest


def _check_encoding(encoding: Encoding, channels: int) -> None:
    """Raise RecipeError if image files cannot keep images of so many channels exactly."""
    if channels not in (1, 3):
        raise RecipeError(f"PNG and WebP keep images of 1 or 3 channels, and this pool's have {channels}. Choose hdf5.")
    if encoding == "webp" and channels == 1:
        raise RecipeError("WebP has no grey images, and this pool's have one channel. Choose png.")


def _manifest(job: ExportJob, config: dict[str, Any], files: list[FileRecord]) -> Manifest:
    pool, digests = job.pool, {name: digest.hexdigest() for name, digest in job.digests.items()}
    return Manifest(
        stage=EXPORT_STAGE,
        stage_version=_VERSION,
        name=pool.manifest.name,
        cache_key="",
        content_digest=content_digest(files),
        config={**config, "pool": pool.manifest.config},
        inputs=[
            InputRecord(role="pool", cache_key=pool.manifest.cache_key, content_digest=pool.manifest.content_digest)
        ],
        files=sorted(files, key=lambda file: file.path),
        counts={
            "images": len(pool),
            "image_shape": list(pool.image_shape),
            "class_names": list(pool.class_names),
            "licence": job.origin.licence,
            "citation": job.origin.citation,
            "pixel_digest": digests["image"],
            "column_digests": digests,
        },
    )


def check_sums(folder: Path, manifest: Manifest) -> None:
    """Raise CorruptError unless SHA256SUMS of an export says the same as its manifest."""
    payload = [file for file in manifest.files if file.payload]
    if (folder / SUMS_NAME).read_bytes() != _sums(payload).encode():
        raise CorruptError(
            f"{str(folder / SUMS_NAME)!r} does not fit the manifest beside it. Do not use this export; make it again."
        )


def _sums(files: list[FileRecord]) -> str:
    return "".join(f"{file.sha256}  {file.path}\n" for file in sorted(files, key=lambda file: file.path))


def _written(kind: ExportFormat, job: ExportJob) -> Iterator[FileRecord]:
    for path in kind.write(job):
        record = record_file(job.folder, path.relative_to(job.folder).as_posix(), payload=True)
        if not is_expected_path(EXPORT_STAGE, record.path):
            raise LsmixError(f"the export format wrote {record.path!r}, a name that exports do not have.")
        yield record
    if job.pool.spec:
        shutil.copyfile(job.pool.artifact.file(PLAN_NAME), job.folder / PLAN_NAME)
        yield record_file(job.folder, PLAN_NAME, payload=True)


def _shard_images(kind: ExportFormat, asked: int, images: int, row_bytes: int) -> int:
    if kind.folder_images:
        if images > _MOST_FILES:
            raise RecipeError(
                f"this format has a file for each of {images:,} images, and an export has at most {_MOST_FILES:,} files. "
                "Choose webdataset, parquet or hdf5."
            )
        if asked > _MOST_HUB_FILES:
            raise RecipeError(
                f"sub-folders of {asked} images: the big hubs refuse 10,000 files and more. Ask for fewer."
            )
        return asked or kind.folder_images
    shard_images = asked or max(_FILE_BYTES // row_bytes, 1)
    if shard_images < images and -(-images // shard_images) > _MOST_HUB_FILES:
        raise RecipeError(
            f"{shard_images} images a file make {-(-images // shard_images)} files, and the big hubs refuse 10,000 and "
            f"more in a folder. Ask for {-(-images // _MOST_HUB_FILES)} images or more."
        )
    if min(shard_images, images) * row_bytes > _MOST_FILE_BYTES:
        raise RecipeError(
            f"{shard_images} images of {row_bytes} bytes make files of more than 20 GB, which the big hubs refuse. "
            f"Ask for {_MOST_FILE_BYTES // row_bytes} images or fewer."
        )
    return shard_images
