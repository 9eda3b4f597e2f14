"""A bounded cache of downloaded files, named by SHA-256 and shared by all processes of a user.

A file gets its final name only after its checksum matched, and each process checks a file again before its first use.
The least recently used files are evicted first. Open or mapped files stay readable after their eviction.
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
from lsmix.data.errors import CorruptError, DownloadError, LockedError, LsmixError, MissingError, RecipeError
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
_PART = ".part"  # suffix of a file that is being downloaded, SHA256.SIZE.part
_JOBS = 4  # parallel downloads
_LEAST_PROGRESS_BYTES = 1 << 16  # an attempt that downloads at least this much resets the count of failures


def cache_folder() -> Path:
    """Return the folder of the cache: LSMIX_CACHE, or "lsmix" in XDG_CACHE_HOME, or "~/.cache/lsmix".

    Raises:
        MissingError: The user has no home folder, and neither variable is set.
    """
    if named := os.environ.get("LSMIX_CACHE"):
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lsmix"
    except RuntimeError as error:
        raise MissingError("the cache needs a folder, and this user has no home folder. Set LSMIX_CACHE.") from error


def private_folder(cache: Path, name: str) -> Path:
    """Create the folder ``name`` in a cache if necessary, check that only this user can write to it, and return it.

    Raises:
        LsmixError: The folder cannot be created, or another user owns it or can write to it.
    """
    for folder in (cache, cache / name):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = folder.stat()
        except OSError as error:
            raise LsmixError(
                f"the cache {str(folder)!r} cannot be created: {error.strerror}. {_ANOTHER_FOLDER}"
            ) from error
        if found.st_uid != os.geteuid():
            raise LsmixError(
                f"the cache {str(folder)!r} belongs to another user, who could change its files. {_ANOTHER_FOLDER}"
            )
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise LsmixError(
                f"the cache {str(folder)!r} cannot be trusted: other users can write to it (mode "
                f"{stat.S_IMODE(found.st_mode):o}). Run 'chmod go-w' on it if only you have used it, or remove it. "
                f"{_ANOTHER_FOLDER}"
            )
    return cache / name


class RemoteArtifact(Artifact):
    """An artifact at a URL whose files are downloaded to a cache on first use; safe to share among threads and processes.

    Args:
        manifest: The manifest.
        remote: Source of the files.
        folder: The cache, shared with all other artifacts.
        limit_bytes: Maximum size of the cache.
    """

    def __init__(self, manifest: Manifest, remote: RemoteFS, folder: Path, limit_bytes: int) -> None:
        self.manifest = manifest
        self.url = remote.url
        self._folder = None
        self._remote = remote
        self._cache = folder
        self._limit_bytes = limit_bytes
        self._files = private_folder(folder, "files")
        self._checked: set[tuple[str, int, int]] = set()  # files that this process has checked

    def prefetch(self, paths: Sequence[str]) -> None:
        """Download missing files, several in parallel, until half of the cache is used for them."""
        missing = []
        free = self._limit_bytes // 2
        for record in map(self.record, paths):
            if record.bytes <= free and not (self._files / record.sha256).exists():
                free -= record.bytes
                missing.append(record.path)
        if len(missing) > 1:
            with ThreadPoolExecutor(_JOBS, thread_name_prefix="lsmix-fetch") as pool:
                list(pool.map(self.file, missing))

    def file(self, path: str) -> Path:
        """Download a listed file if necessary and return its path; open it immediately, before the cache evicts it."""
        self.open(path).close()
        return self._files / self.record(path).sha256

    def adopt(self, record: FileRecord, source: Path) -> None:
        """Move a complete local file into the cache, which saves its download."""
        if record.bytes <= self._limit_bytes:
            part = self._files / f"{record.sha256}.{record.bytes}{_PART}"
            with locked_file(part, wait=True):
                self._evict(part)
                source.replace(self._files / record.sha256)
                part.unlink()

    def open(self, path: str) -> IO[bytes]:
        """Open a listed file for reading, and download it if necessary.

        Raises:
            MissingError: The file is not listed.
            RecipeError: The file is larger than the limit of the cache.
            CorruptError: The remote file is not the listed one.
            DownloadError: The URL cannot be reached.
            DiskSpaceError: The file does not fit on the disk.
        """
        record = self.record(path)
        cached = self._files / record.sha256
        while True:
            try:
                stream = cached.open("rb")
            except FileNotFoundError:
                downloaded = self._download(record)
                if downloaded is not None:
                    return downloaded
                continue
            if self._is_intact(stream, record):
                with contextlib.suppress(OSError):  # another process may have evicted it
                    os.utime(cached)
                stream.seek(0)
                return stream
            stream.close()
            cached.unlink(missing_ok=True)

    def _is_intact(self, stream: IO[bytes], record: FileRecord) -> bool:
        identity = _identity(stream, record)
        if os.fstat(stream.fileno()).st_size != record.bytes:
            return False
        if identity not in self._checked and _digest_of(stream) != record.sha256:
            return False
        self._checked.add(identity)
        return True

    def _download(self, record: FileRecord) -> IO[bytes] | None:
        """Download a file and return it opened, or None if another process has just downloaded it."""
        if record.bytes > self._limit_bytes:
            raise RecipeError(
                f"{self.where(record.path)!r} has {record.bytes:,} bytes, more than the cache limit of "
                f"{self._limit_bytes:,}. Raise cache_bytes, or download the artifact with 'lsmix pull'."
            )
        path = self._files / record.sha256
        part = self._files / f"{record.sha256}.{record.bytes}{_PART}"
        with locked_file(part, wait=True) as stream:
            if path.exists():
                part.unlink()
                return None
            self._evict(part)
            needed = record.bytes - part.stat().st_size
            check_room(self._files, needed, repr(record.path), "name another folder with cache= or LSMIX_CACHE")
            fetch_file(self._remote, record.path, record.bytes, record.sha256, stream, lambda _: None)
            self._checked.add(_identity(stream, record))
            opened = part.open("rb")
            part.replace(path)
        return opened

    def _evict(self, part: Path) -> None:
        """Remove the least recently used files until the cache stays within its limit once ``part`` is complete."""
        with locked_file(self._cache / "lock", wait=True):
            found = []
            for path in self._files.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    found.append((status.st_mtime_ns, _final_size(path, status.st_size), path))
            excess = sum(size for _, size, _ in found) - self._limit_bytes  # includes the final size of the part
            for _, size, path in sorted(found):
                if excess <= 0:
                    break
                if path != part and _remove(path):
                    excess -= size


def _identity(stream: IO[bytes], record: FileRecord) -> tuple[str, int, int]:
    status = os.fstat(stream.fileno())
    return record.sha256, status.st_dev, status.st_ino


def _final_size(path: Path, size: int) -> int:
    """Return the size of a file in the cache; for a partial download, the size of the complete file."""
    if path.name.endswith(_PART):
        final_size = path.name.removesuffix(_PART).rpartition(".")[2]
        return int(final_size) if final_size.isdecimal() else size
    return size


def _remove(path: Path) -> bool:
    try:
        with locked_file(path):
            path.unlink(missing_ok=True)
    except (LockedError, OSError):  # another process is downloading it
        return False
    return True


def fetch_manifest(remote: RemoteFS) -> tuple[Manifest, bytes]:
    """Download the manifest of a remote artifact, and return it decoded and as bytes.

    Raises:
        MissingError: There is no complete artifact.
        FormatError: This version of lsmix does not support the manifest's version.
        CorruptError: The manifest is damaged or invalid.
    """
    try:
        content = remote.read(MANIFEST_NAME, MOST_MANIFEST_BYTES)
    except MissingError as error:
        raise MissingError(
            f"no artifact at {remote.url!r}: {MANIFEST_NAME} does not exist. "
            "Check the URL, or run 'lsmix push' again if a push was interrupted."
        ) from error
    manifest = parse_manifest(content, remote.url)
    if manifest.content_digest != content_digest(manifest.files):
        raise CorruptError(
            f"the manifest at {remote.url!r} was altered: its content digest does not match its list of files."
        )
    return manifest, content


def fetch_file(
    remote: RemoteFS,
    path: str,
    size: int,
    checksum: str,
    stream: IO[bytes],
    advance: Callable[[int], None],
    *,
    algorithm: str = "sha256",
) -> int:
    """Download a file, resuming a partial download, and verify its checksum.

    Args:
        remote: The remote.
        path: Path of the file on the remote; "" if the URL of the remote is the file itself.
        size: Size in bytes.
        checksum: Expected checksum, in hex.
        stream: Opened unbuffered for reading and appending; its content is taken as the beginning of the file.
        advance: Called with the number of bytes received; negative if they are discarded.
        algorithm: Hash algorithm of the checksum.

    Returns:
        The number of bytes downloaded.

    Raises:
        CorruptError: The remote file is missing or a different one.
        DownloadError: The remote cannot be reached; the stream keeps the downloaded part.
        OSError: The file cannot be written.
    """
    downloaded, got = 0, ""
    for _ in range(2):
        downloaded += _complete(remote, path, size, stream, advance)
        got = _digest_of(stream, algorithm)
        if got == checksum:
            os.fsync(stream.fileno())
            return downloaded
        stream.truncate(0)
        advance(-size)
    raise CorruptError(
        f"{remote.where(path)!r} is damaged: expected {algorithm} {checksum}, got {got} in two attempts. Check the URL, "
        "ask the owner to upload the file again, or download it elsewhere."
    )


def _complete(remote: RemoteFS, path: str, size: int, stream: IO[bytes], advance: Callable[[int], None]) -> int:
    """Append the missing part of a file to ``stream``, with retries, and return the number of bytes downloaded."""
    downloaded = failures = 0
    while True:
        have = os.fstat(stream.fileno()).st_size
        if have > size:  # the rest of a different file
            stream.truncate(0)
            have = 0
        if have == size:
            return downloaded
        before = have
        try:
            for block in remote.stream(path, have, size):
                stop_point()
                _append(stream, block[: size - have])
                have += len(block)
                downloaded += len(block)
                advance(len(block))
            reason: TransientError | str = f"the connection ended after {have:,} of {size:,} bytes"
        except TransientError as error:
            reason = error
        if have < size:
            failures = 1 if have >= before + _LEAST_PROGRESS_BYTES else failures + 1
            if failures > len(PAUSES_SECONDS):
                raise DownloadError(
                    f"{remote.where(path)!r} cannot be downloaded: {reason}. Run again to resume the download."
                )
            wait_to_retry(remote.where(path), reason, PAUSES_SECONDS[failures - 1])


def _append(stream: IO[bytes], block: bytes) -> None:
    """Write an entire block to an unbuffered stream, whose ``write`` may write only a part of it."""
    rest = memoryview(block)
    while rest:
        rest = rest[stream.write(rest) :]


def _digest_of(stream: IO[bytes], algorithm: str = "sha256") -> str:
    """Return the checksum of an open file in hex; this leaves the stream at its end."""
    stream.seek(0)
    # Published checksums may be MD5, which detects damage but not forgery.
    digest = functools.partial(hashlib.new, algorithm, usedforsecurity=False)
    return hashlib.file_digest(stream, digest).hexdigest()  # type: ignore[arg-type]  # files have readinto, unlike IO
