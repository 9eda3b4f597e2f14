"""Exports at a place: which files they consist of, by their record and their checksums.

A place is not asked what lies there; what the record and SHA256SUMS don't list is none of the export.
"""

import contextlib
import hashlib
import io
from concurrent.futures import ThreadPoolExecutor

import msgspec

from lsmix.data.artifact import FileRecord, check_listing
from lsmix.data.errors import CorruptError, MissingError
from lsmix.data.exports.record import (
    MOST_RECORD_BYTES,
    RECORD_NAME,
    SUMS_NAME,
    ExportRecord,
    parse_record,
    parse_sums,
)
from lsmix.data.remote import RemoteFS
from lsmix.data.sharing.transfer import Listing, artifact_listing

__all__ = ["artifact_or_export_listing", "export_listing"]

_JOBS = 4  # sizes that are asked for at a time
_MOST_SUMS_BYTES = 1 << 26  # some 600,000 files


def export_listing(place: RemoteFS) -> Listing:
    """Return what the export at a place consists of.

    Raises:
        MissingError: there is none.
        FormatError: it is of a version that this lsmix does not read.
        CorruptError: its checksums are altered, or list what cannot be.
        DownloadError: the place cannot be reached.
    """
    try:
        content = place.read(RECORD_NAME, MOST_RECORD_BYTES)
    except MissingError as error:
        raise MissingError(
            f"no export at {place.url!r}: {RECORD_NAME} is not there. Name the folder that 'lsmix export' made."
        ) from error
    record = parse_record(content, place.url)
    sums = place.read(SUMS_NAME, _MOST_SUMS_BYTES)
    if hashlib.sha256(sums).hexdigest() != record.sums_sha256:
        raise CorruptError(f"{place.url + '/' + SUMS_NAME!r} is altered. Fetch it elsewhere, or export the pool again.")
    files = _sized(place, record, sums)
    name = record.facts.artifact.name
    own = FileRecord(path=SUMS_NAME, bytes=len(sums), sha256=record.sums_sha256, payload=False)
    return Listing(name, [*files, own], RECORD_NAME, content)


def artifact_or_export_listing(place: RemoteFS) -> Listing:
    """Return what the artifact at a place consists of, or if there is none, the export.

    Raises:
        MissingError: there is neither.
        LsmixError: as ``artifact_listing`` and ``export_listing``.
    """
    try:
        return artifact_listing(place)
    except MissingError:
        with contextlib.suppress(MissingError):
            return export_listing(place)
        raise


def _sized(place: RemoteFS, record: ExportRecord, sums: bytes) -> list[FileRecord]:
    """Return the listed files with the sizes that the place tells; together they must be those of the record."""
    lines = io.TextIOWrapper(io.BytesIO(sums), encoding="utf-8", errors="replace", newline="\n")
    listed = [
        FileRecord(path=path, bytes=0, sha256=digest, payload=True)
        for digest, path in parse_sums(lines, place.url, record.format)
    ]
    check_listing(f"{place.url}/{SUMS_NAME}", listed)  # before anything is asked for by a path in it
    with ThreadPoolExecutor(_JOBS, thread_name_prefix="lsmix-sizes") as pool:
        sizes = pool.map(lambda file: _size(place, file.path), listed)
        files = [msgspec.structs.replace(file, bytes=size) for file, size in zip(listed, sizes, strict=True)]
    if (len(files), sum(file.bytes for file in files)) != (record.files, record.bytes):
        raise CorruptError(
            f"the export at {place.url!r} has {len(files)} files with {sum(file.bytes for file in files)} bytes; expected "
            f"{record.files} with {record.bytes}. Send or export it again."
        )
    return files


def _size(place: RemoteFS, path: str) -> int:
    where = f"{place.url}/{path}"
    size = place.size(path)
    if size is None:
        raise CorruptError(f"{where!r} is missing; {SUMS_NAME} lists it. Send or export it again.")
    return size
