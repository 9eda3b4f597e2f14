"""The record of an export, ``lsmix-export.json``, and the checksums of its files in ``SHA256SUMS``.

An export with very many files needs no more memory than one with few, so checksums are lines of a file of
their own, which ``sha256sum -c`` reads too; the record has that file's checksum.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Final, Literal

import msgspec

from lsmix.data.atomic import (
    DECODE_ERRORS,
    dump_checksummed,
    load_checksummed,
    sha256_file,
    write_atomic,
)
from lsmix.data.errors import CorruptError, FormatError, MissingError
from lsmix.data.exports.format import EXPORT_FORMATS, ExportFormat
from lsmix.data.exports.metadata import ExportFacts

__all__ = [
    "MOST_RECORD_BYTES",
    "RECORD_NAME",
    "SUMS_NAME",
    "ExportRecord",
    "is_export",
    "parse_record",
    "parse_sums",
    "read_record",
    "verify_export",
    "write_record",
]

RECORD_NAME: Final = "lsmix-export.json"
SUMS_NAME: Final = "SHA256SUMS"
_VERSION: Final = 1
MOST_RECORD_BYTES: Final = 1 << 26  # a pool's rows that failed to decode, some 14 bytes each
_HEX_DIGITS = 64
_MAX_LINE = 4096  # of a checksum and a path


class ExportRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What lies in an export's folder."""

    kind: Literal["lsmix-export"]
    format_version: int = _VERSION
    format: str  # a name in EXPORT_FORMATS
    encoding: str  # of the images: png, webp, or raw
    shard_images: int  # rows in a file; of a folder, in a sub-folder
    files: int  # listed in SHA256SUMS
    bytes: int  # of those files
    sums_sha256: str  # SHA-256 of SHA256SUMS
    facts: ExportFacts  # of the pool

    @property
    def pixel_digest(self) -> str:
        """SHA-256 over the bytes of all images, row by row."""
        return self.facts.digests["image"]


def write_record(folder: Path, files: Iterable[Path], facts: ExportFacts, **layout: Any) -> ExportRecord:
    """Write the checksums of files as they become whole, then the record.

    Args:
        folder: of the export.
        files: paths in it, each yielded when it is whole.
        facts: of the pool.
        layout: the record's ``format``, ``encoding`` and ``shard_images``.
    """
    count, size = 0, 0
    with (folder / SUMS_NAME).open("w", encoding="utf-8", newline="\n") as sums:
        for path in files:
            sums.write(f"{sha256_file(path)}  {path.relative_to(folder).as_posix()}\n")
            count, size = count + 1, size + path.stat().st_size
    digest = sha256_file(folder / SUMS_NAME)
    record = ExportRecord(kind="lsmix-export", facts=facts, files=count, bytes=size, sums_sha256=digest, **layout)
    write_atomic(folder / RECORD_NAME, dump_checksummed(record))
    return record


def is_export(folder: Path) -> bool:
    """Tell whether a folder claims to be an export."""
    return (folder / RECORD_NAME).is_file()


def read_record(folder: Path) -> ExportRecord:
    """Return the record of the export in a folder.

    Raises:
        MissingError: there is none.
        FormatError: it is of a version that this lsmix does not read.
        CorruptError: it is damaged.
    """
    path = folder / RECORD_NAME
    if not path.is_file():
        raise MissingError(f"{str(folder)!r} has no {RECORD_NAME}: it is no export of a pool, or not whole.")
    if path.stat().st_size > MOST_RECORD_BYTES:
        raise CorruptError(
            f"{str(path)!r} has {path.stat().st_size} bytes, and lsmix reads at most {MOST_RECORD_BYTES}. Do not use it."
        )
    return parse_record(path.read_bytes(), str(folder))


def parse_record(content: bytes, where: str) -> ExportRecord:
    """Return the record that ``content`` holds; ``where`` is the export's folder or URL, for messages.

    Raises:
        FormatError, CorruptError: as ``read_record``.
    """
    path = f"{where}/{RECORD_NAME}"
    try:
        remedy = "Use a newer lsmix, or export the pool again."
        return load_checksummed(content, ExportRecord, _VERSION, what=f"export {where!r} has", remedy=remedy)
    except DECODE_ERRORS as error:
        raise CorruptError(f"{path!r} is damaged: {error}. Fetch or export it again.") from error


def verify_export(folder: Path) -> dict[str, Any]:
    """Check every byte of an export against its checksums, and return the facts.

    Raises:
        MissingError, FormatError: as ``read_record``.
        CorruptError: on the first file that is missing, altered or not listed.
    """
    record = read_record(folder)
    if link := _first_link(folder):
        raise CorruptError(f"{str(link)!r} is a link; exports hold their own files. Fetch or export it again.")
    if not (folder / SUMS_NAME).is_file() or sha256_file(folder / SUMS_NAME) != record.sums_sha256:
        raise CorruptError(f"{str(folder / SUMS_NAME)!r} is missing or altered. Fetch or export it again.")
    count, size = 0, 0
    for digest, name in _listed(folder, record.format):
        path = folder / name
        if not path.is_file():
            raise CorruptError(f"{str(path)!r} is missing, or no plain file. Fetch or export it again.")
        if sha256_file(path) != digest:
            raise CorruptError(f"{str(path)!r} is damaged: its sha256 is not {digest[:12]}…. Fetch or export it again.")
        count, size = count + 1, size + path.stat().st_size
    found = sum(len(names) for _, _, names in os.walk(folder)) - 2
    if (count, size, found) != (record.files, record.bytes, record.files):
        raise CorruptError(
            f"{str(folder)!r} has {found} files, of which {count} are listed, with {size} bytes; expected {record.files} "
            f"with {record.bytes}. Remove what was put there later, or fetch it again."
        )
    return {
        "folder": str(folder),
        "stage": "export",
        "name": record.facts.artifact.name,
        "key": record.facts.artifact.key,
        "root": record.facts.root,
        "files": count,
        "bytes": size,
        "counts": {"images": record.facts.images, "format": record.format, "pixel_digest": record.pixel_digest},
    }


def _first_link(folder: Path) -> Path | None:
    """Return a link anywhere in a folder, which could lead out of it."""
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            if Path(place, name).is_symlink():
                return Path(place, name)
    return None


def _listed(folder: Path, form: str) -> Iterator[tuple[str, str]]:
    with (folder / SUMS_NAME).open(encoding="utf-8", errors="replace") as lines:
        yield from parse_sums(lines, str(folder), form)


def parse_sums(lines: IO[str], where: str, form: str) -> Iterator[tuple[str, str]]:
    """Go through (SHA-256, path) of SHA256SUMS.

    Args:
        lines: the file's text.
        where: the export's folder or URL, for messages.
        form: the export's format.

    Raises:
        FormatError: there is no such format.
        CorruptError: at a line that is no checksum, or a path that could lead out of the folder or that no export in this
            format has.
    """
    if form not in EXPORT_FORMATS:
        raise FormatError(
            f"{where!r} is an export in the unknown format {form!r}. Install the package that adds it, or use a newer lsmix."
        )
    kind: ExportFormat = EXPORT_FORMATS.load(form)
    for line in iter(lambda: lines.readline(_MAX_LINE), ""):
        digest, name = line[:_HEX_DIGITS], line[_HEX_DIGITS + 2 :].removesuffix("\n")
        parts = name.split("/")
        odd = len(line) >= _MAX_LINE or not name.isprintable() or any(len(part.encode()) > 255 for part in parts)
        if odd or line[_HEX_DIGITS : _HEX_DIGITS + 2] != "  " or {"", ".", ".."} & set(parts) or "\\" in name:
            path = f"{where}/{SUMS_NAME}"
            raise CorruptError(f"{path!r} has the line {line[:200]!r}, which is no checksum.")
        if not kind.may_hold(name):
            path = f"{where}/{SUMS_NAME}"
            raise CorruptError(f"{path!r} lists {name!r}, which no export as {form!r} has. Do not use this export.")
        yield digest, name
