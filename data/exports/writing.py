"""Write a pool in another format, as an artifact of the stage "export" that appears under its name once complete."""

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
from lsmix.data.errors import CorruptError, LsmixError, RecipeError, format_bytes
from lsmix.data.exports.format import EXPORT_FORMATS, Encoding, ExportFormat, ExportJob
from lsmix.data.mixing import nearest
from lsmix.data.pool import Pool
from lsmix.data.pool_spec import PLAN_NAME, read_provenance
from lsmix.data.sharing.descriptions import description_records

__all__ = ["EXPORT_STAGE", "SUMS_NAME", "check_sums", "write_export"]

EXPORT_STAGE: Final = "export"
SUMS_NAME: Final = "SHA256SUMS"
_VERSION: Final = 1
_FILE_BYTES = 500_000_000  # default size of a file
_MAX_FILE_BYTES = 20_000_000_000  # the large hubs reject larger files
_MAX_HUB_FILES = 9_990  # the large hubs reject folders with 10,000 files or more
_MAX_FILES = 250_000  # per export, because the manifest lists all files
_MANY_FILES = 1000  # from this number on, one sync of all file systems is faster than flushing each file


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
        pool: The pool; it is read once.
        target: The folder to create; its parent must exist.
        form: A name in ``EXPORT_FORMATS``.
        shard_images: Images per file, or per sub-folder for "folder"; 0 chooses files of about 500 MB, or 5,000 images
            per sub-folder.
        encoding: "png" or "webp", both lossless, for formats that contain image files.
        describe: Called with the folder and its files when they are complete; may add descriptions to the folder.
        on_rows: Called with the number of rows of each block after it was written.

    Returns:
        The manifest of the export.

    Raises:
        RecipeError: The format is unknown or cannot store these images, there would be too many or too large files, or
            ``target`` already exists.
        MissingError: The parent folder of ``target`` does not exist.
        LockedError: Another process is writing to ``target``.
        DiskSpaceError: The disk has too little free space.
        CorruptError: The pool is damaged.
        LsmixError: A library that the format needs is not installed.
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
        files = sorted(_file_records(kind, job), key=lambda file: file.path)
        if read != len(pool):
            raise LsmixError(f"the export format {form!r} read {read} rows of {len(pool)}. Report this bug.")
        describe(folder, files)
        (folder / SUMS_NAME).write_text(_sha256sums(files), encoding="utf-8", newline="\n")
        files += [record_file(folder, SUMS_NAME, payload=False), *description_records(folder, EXPORT_STAGE)]
        config = {"format": form, "encoding": encoding if kind.encodes else "raw", "shard_images": shard_images}
        manifest = _manifest(job, config, files)
        if len(files) >= _MANY_FILES:
            os.sync()  # leaves nothing to do for the flush of each file in write_manifest
        write_manifest(folder, manifest)
    return manifest


def _check_encoding(encoding: Encoding, channels: int) -> None:
    """Raise RecipeError if the encoding cannot store images with this number of channels exactly."""
    if channels not in (1, 3):
        raise RecipeError(f"PNG and WebP store 1 or 3 channels, but this pool's images have {channels}. Choose hdf5.")
    if encoding == "webp" and channels == 1:
        raise RecipeError("WebP cannot store greyscale images, but this pool's images have one channel. Choose png.")


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
    """Raise CorruptError unless the SHA256SUMS file of an export agrees with its manifest."""
    payload = [file for file in manifest.files if file.payload]
    if (folder / SUMS_NAME).read_bytes() != _sha256sums(payload).encode():
        path = str(folder / SUMS_NAME)
        raise CorruptError(f"{path!r} does not match the manifest next to it. Export the pool again.")


def _sha256sums(files: list[FileRecord]) -> str:
    return "".join(f"{file.sha256}  {file.path}\n" for file in sorted(files, key=lambda file: file.path))


def _file_records(kind: ExportFormat, job: ExportJob) -> Iterator[FileRecord]:
    for path in kind.write(job):
        record = record_file(job.folder, path.relative_to(job.folder).as_posix(), payload=True)
        if not is_expected_path(EXPORT_STAGE, record.path):
            raise LsmixError(f"the export format wrote {record.path!r}, which is not a valid file name in an export.")
        yield record
    if job.pool.spec:
        shutil.copyfile(job.pool.artifact.file(PLAN_NAME), job.folder / PLAN_NAME)
        yield record_file(job.folder, PLAN_NAME, payload=True)


def _shard_images(kind: ExportFormat, requested: int, images: int, row_bytes: int) -> int:
    if kind.folder_images:
        if images > _MAX_FILES:
            raise RecipeError(
                f"this format writes one file for each of {images:,} images, but an export may contain at most "
                f"{_MAX_FILES:,} files. Choose webdataset, parquet or hdf5."
            )
        if requested > _MAX_HUB_FILES:
            raise RecipeError(
                f"sub-folders of {requested:,} images are too large: the large hubs reject folders with 10,000 files "
                f"or more. Choose at most {_MAX_HUB_FILES:,} images."
            )
        return requested or kind.folder_images
    shard_images = requested or max(_FILE_BYTES // row_bytes, 1)
    if shard_images < images and -(-images // shard_images) > _MAX_HUB_FILES:
        raise RecipeError(
            f"{shard_images:,} images per file give {-(-images // shard_images):,} files, but the large hubs reject "
            f"folders with 10,000 files or more. Choose at least {-(-images // _MAX_HUB_FILES):,} images per file."
        )
    if min(shard_images, images) * row_bytes > _MAX_FILE_BYTES:
        raise RecipeError(
            f"{shard_images:,} images of {format_bytes(row_bytes)} give files of more than 20 GB, which the large hubs "
            f"reject. Choose at most {_MAX_FILE_BYTES // row_bytes:,} images per file."
        )
    return shard_images
