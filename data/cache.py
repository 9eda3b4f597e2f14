"""The bounded cache of downloaded files, named by SHA-256 and shared by all processes of a user.

A file gets its name only once its bytes have that checksum, and each process checks a file once more before its first
use. The files used longest ago are removed when room is needed; an open or mapped file is kept.
"""

import contextlib
import functools
import hashlib
import os
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from lsmix.data.artifact import (
    MANIFEST_NAME,
    MOST_MANIFEST_BYTES,
    Artifact,
    FileRecord,
    Manifest,
    content_digest,
    parse_manifest,
)
from lsmix.data.atomic import check_room, locked_file
from lsmix.data.errors import (
    CorruptError,
    DownloadError,
    LockedError,
    LsmixError,
    MissingError,
    RecipeError,
)
from lsmix.data.progress import stop_point
from lsmix.data.remote import PAUSES_SECONDS, RemoteFS, wait_to_retry
from lsmix.data.web import TransientError

__all__ = [
    "RemoteArtifact",
    "cache_folder",
    "fetch_file",
    "fetch_manifest",
    "private_folder",
]

_ANOTHER_FOLDER = "Name another folder with LSMIX_CACHE, or with cache= where a pool is opened."
_PART = ".part"  # ends the name of a file that is being fetched: SHA-256, size, ".part"
_JOBS = 4  # files on their way at a time
_LEAST_PROGRESS_BYTES = 1 << 16  # of an attempt that gets on


def cache_folder() -> Path:
    """Return the folder of the cache: LSMIX_CACHE, or "lsmix" in XDG_CACHE_HOME, or "~/.cache/lsmix".

    Raises:
        MissingError: the user has no home folder, and neither variable is set.
    """
    if named := os.environ.get("LSMIX_CACHE"):
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lsmix"
    except RuntimeError as error:
        raise MissingError("this user has no home folder to keep files in. Name a folder with LSMIX_CACHE.") from error


def private_folder(cache: Path, name: str) -> Path:
    """Return the folder ``name`` in a cache, both made if need be, which no other user may write to.

    Raises:
        LsmixError: it cannot be made, or another user owns it or may write to it.
    """
    for folder in (cache, cache / name):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            facts = folder.stat()
        except OSError as error:
            raise LsmixError(
                f"the cache {str(folder)!r} cannot be made: {error.strerror}. {_ANOTHER_FOLDER}"
            ) from error
        if facts.st_uid != os.geteuid():
            raise LsmixError(
                f"the cache {str(folder)!r} belongs to another user, who could change what is in it. {_ANOTHER_FOLDER}"
            )
        if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise LsmixError(
                f"other users may write to the cache {str(folder)!r} (mode {stat.S_IMODE(facts.st_mode):o}), so nothing in it "
                f"can be trusted. Run 'chmod go-w' on it if only you have used it, or remove it. {_ANOTHER_FOLDER}"
            )
    return cache / name


class RemoteArtifact(Artifact):
    """An artifact at a URL, whose files are kept by checksum in a cache; safe to share among threads and processes.

    Args:
        manifest: what it holds.
        place: where files are downloaded from.
        folder: the cache, shared with all other artifacts.
        limit_bytes: how much it may hold.
    """

    def __init__(self, manifest: Manifest, place: RemoteFS, folder: Path, limit_bytes: int) -> None:
        self.manifest = manifest
        self.url = place.url
        self._folder = None
        self._place = place
        self._cache = folder
        self._limit_bytes = limit_bytes
        self._files = private_folder(folder, "files")
        self._checked: set[tuple[str, int, int]] = set()  # files that this process has checked

    def prefetch(self, paths: Sequence[str]) -> None:
        """Download the files that are missing, several at a time, as far as half of the cache holds them."""
        missing = []
        room = self._limit_bytes // 2
        for record in map(self.record, paths):
            if record.bytes <= room and not (self._files / record.sha256).exists():
                room -= record.bytes
                missing.append(record.path)
        if len(missing) > 1:
            with ThreadPoolExecutor(_JOBS, thread_name_prefix="lsmix-fetch") as pool:
                list(pool.map(self.file, missing))

    def file(self, path: str) -> Path:
        """Return the path of a listed file, to be opened at once: the cache keeps only what was used last."""
        self.open(path).close()
        return self._files / self.record(path).sha256

    def adopt(self, record: FileRecord, source: Path) -> None:
        """Move a whole file that was made here into the cache, so that it need not be downloaded."""
        if record.bytes <= self._limit_bytes:
            part = self._files / f"{record.sha256}.{record.bytes}{_PART}"
            with locked_file(part, wait=True):
                self._make_room(part)
                source.replace(self._files / record.sha256)
                part.unlink()

    def open(self, path: str) -> IO[bytes]:
        """Return a listed file, opened to read; it is downloaded if need be.

        Raises:
            MissingError: it is not listed.
            RecipeError: it is larger than the whole cache may be.
            CorruptError: what is at the place is not the listed file.
            DownloadError: the place cannot be reached.
            DiskSpaceError: it does not fit on the disk.
        """
        record = self.record(path)
        cached = self._files / record.sha256
        while True:
            try:
                stream = cached.open("rb")
            except FileNotFoundError:
                fetched = self._fetch(record)
                if fetched is not None:
                    return fetched
                continue
            if self._is_right(stream, record):
                with contextlib.suppress(OSError):  # removed meanwhile
                    os.utime(cached)
                stream.seek(0)
                return stream
            stream.close()
            cached.unlink(missing_ok=True)

    def _is_right(self, stream: IO[bytes], record: FileRecord) -> bool:
        known = _identity(stream, record)
        if os.fstat(stream.fileno()).st_size != record.bytes:
            return False
        if known not in self._checked and _digest_of(stream) != record.sha256:
            return False
        self._checked.add(known)
        return True

    def _fetch(self, record: FileRecord) -> IO[bytes] | None:
        """Download a file and return it opened; None if another process did so in between."""
        if record.bytes > self._limit_bytes:
            raise RecipeError(
                f"{self.where(record.path)!r} has {record.bytes} bytes, more than the cache of {self._limit_bytes} "
                "may hold. Raise cache_bytes, or fetch the whole artifact with 'lsmix pull'."
            )
        path = self._files / record.sha256
        part = self._files / f"{record.sha256}.{record.bytes}{_PART}"
        with locked_file(part, wait=True) as stream:
            if path.exists():
                part.unlink()
                return None
            self._make_room(part)
            needed = record.bytes - part.stat().st_size
            check_room(self._files, needed, repr(record.path), "name another folder with cache= or LSMIX_CACHE")
            fetch_file(self._place, record.path, record.bytes, record.sha256, stream, lambda _: None)
            self._checked.add(_identity(stream, record))
            opened = part.open("rb")
            part.replace(path)
        return opened

    def _make_room(self, part: Path) -> None:
        """Remove what was used longest ago, until the cache is within its limit when ``part`` is whole."""
        with locked_file(self._cache / "lock", wait=True):
            found = []
            for path in self._files.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    facts = path.stat()
                    found.append((facts.st_mtime_ns, _room(path, facts.st_size), path))
            excess = sum(size for _, size, _ in found) - self._limit_bytes  # the part counts in full already
            for _, size, path in sorted(found):
                if excess <= 0:
                    break
                if path != part and _remove(path):
                    excess -= size


def _identity(stream: IO[bytes], record: FileRecord) -> tuple[str, int, int]:
    facts = os.fstat(stream.fileno())
    return record.sha256, facts.st_dev, facts.st_ino


def _room(path: Path, size: int) -> int:
    """Return what a file takes, or will take when it is whole."""
    if path.name.endswith(_PART):
        size_of_whole = path.name.removesuffix(_PART).rpartition(".")[2]
        return int(size_of_whole) if size_of_whole.isdecimal() else size
    return size


def _remove(path: Path) -> bool:
    try:
        with locked_file(path):
            path.unlink(missing_ok=True)
    except (LockedError, OSError):  # another process is downloading it
        return False
    return True


def fetch_manifest(place: RemoteFS) -> tuple[Manifest, bytes]:
    """Return the manifest of the artifact at a place, and its bytes.

    Raises:
        MissingError: there is no complete artifact.
        FormatError: the manifest is of a version that this lsmix does not read.
        CorruptError: it is not what a manifest must be.
    """
    try:
        content = place.read(MANIFEST_NAME, MOST_MANIFEST_BYTES)
    except MissingError as error:
        raise MissingError(
            f"no artifact at {place.url!r}: {MANIFEST_NAME} is not there, so it is unfinished, or another place. "
            "Check the URL, or run 'lsmix push' again."
        ) from error
    manifest = parse_manifest(content, place.url)
    if manifest.content_digest != content_digest(manifest.files):
        raise CorruptError(
            f"the manifest at {place.url!r} was altered: its content digest does not fit its list of files."
        )
    return manifest, content


def fetch_file(
    place: RemoteFS,
    path: str,
    size: int,
    checksum: str,
    stream: IO[bytes],
    advance: Callable[[int], None],
    *,
    algorithm: str = "sha256",
) -> int:
    """Complete a file that was fetched in part, or not at all, and check it.

    Args:
        place: where it is stored.
        path: its path there; "" where the place is a file itself.
        size: its bytes.
        checksum: in hex.
        stream: opened unbuffered to read and append; what is in it is taken for the beginning of the file.
        advance: gets the number of bytes that came; a negative one when they are thrown away.
        algorithm: of the checksum.

    Returns:
        The number of bytes that were fetched.

    Raises:
        CorruptError: the place has another file, or none.
        DownloadError: it cannot be reached; what came so far is in the stream.
        OSError: it cannot be written here.
    """
    fetched, got = 0, ""
    for _ in range(2):
        fetched += _complete(place, path, size, stream, advance)
        got = _digest_of(stream, algorithm)
        if got == checksum:
            os.fsync(stream.fileno())
            return fetched
        stream.truncate(0)
        advance(-size)
    raise CorruptError(
        f"{place.where(path)!r} is damaged: expected {algorithm} {checksum}, got {got}, twice. Check its address, ask its "
        "owner to send it again, or fetch it elsewhere."
    )


def _complete(place: RemoteFS, path: str, size: int, stream: IO[bytes], advance: Callable[[int], None]) -> int:
    fetched = failures = 0
    while True:
        have = os.fstat(stream.fileno()).st_size
        if have > size:  # of another file
            stream.truncate(0)
            have = 0
        if have == size:
            return fetched
        before = have
        try:
            for block in place.stream(path, have, size):
                stop_point()
                _append(stream, block[: size - have])
                have += len(block)
                fetched += len(block)
                advance(len(block))
            reason: TransientError | str = f"the connection ended after {have} of {size} bytes"
        except TransientError as error:
            reason = error
        if have < size:
            failures = 1 if have >= before + _LEAST_PROGRESS_BYTES else failures + 1
            if failures > len(PAUSES_SECONDS):
                raise DownloadError(
                    f"{place.where(path)!r} cannot be fetched: {reason}. What came is kept; run again to go on."
                )
            wait_to_retry(place.where(path), reason, PAUSES_SECONDS[failures - 1])


def _append(stream: IO[bytes], block: bytes) -> None:
    """Write a block whole to an unbuffered stream."""
    rest = memoryview(block)
    while rest:
        rest = rest[stream.write(rest) :]


def _digest_of(stream: IO[bytes], algorithm: str = "sha256") -> str:
    """Return the checksum of all bytes of an open file, in hex; the file is left at its end."""
    stream.seek(0)
    # Authors publish md5; it finds damage, not forgery.
    digest = functools.partial(hashlib.new, algorithm, usedforsecurity=False)
    return hashlib.file_digest(stream, digest).hexdigest()  # type: ignore[arg-type]  # files have readinto, unlike IO
