"""The bounded cache of downloaded files, named by SHA-256 and shared by all processes of a user.

A file gets its name only once its bytes have that checksum, and each process checks a file once more before its first
use. The files used longest ago are removed when room is needed; an open or mapped file is kept.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

from lsmix.data.artifact import FileRecord, Manifest
from lsmix.data.atomic import is_file_at
from lsmix.data.errors import (
    CorruptError,
    DiskSpaceError,
    DownloadError,
    LockedError,
    LsmixError,
    MissingError,
    RecipeError,
)
from lsmix.data.progress import lock_file, pause, stop_point
from lsmix.data.remote import RemoteFS, fetch_manifest, open_remote
from lsmix.data.table_reader import TableReader, open_table
from lsmix.data.web import LEAST_PROGRESS_BYTES, TransientError, append_block

__all__ = [
    "FileCache",
    "cache_folder",
    "digest_of",
    "fetch_file",
    "locked_file",
    "open_remote_columns",
    "private_folder",
    "with_retries",
]

_ANOTHER_FOLDER = "Name another folder with LSMIX_CACHE, or with cache= where a pool is opened."
_PART = ".part"  # ends the name of a file that is being fetched: SHA-256, size, ".part"


def cache_folder() -> Path:
    """Return where files from afar are kept: LSMIX_CACHE, or "lsmix" in XDG_CACHE_HOME, or "~/.cache/lsmix".

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


class FileCache:
    """Files by checksum in a folder, together at most ``limit_bytes``; safe to share among threads and processes."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._files = private_folder(folder, "files")
        self._checked: dict[str, tuple[int, int]] = {}  # device and inode of each file that this process has checked
        self._checking = threading.Lock()

    def has(self, record: FileRecord) -> bool:
        """Tell whether a file is there, checked or not."""
        return (self._files / record.sha256).exists()

    def check(self, place: RemoteFS, record: FileRecord) -> None:
        """Raise RecipeError if a file is larger than the whole cache may be."""
        if record.bytes > self.limit_bytes:
            raise RecipeError(
                f"{place.url + '/' + record.path!r} has {record.bytes} bytes, more than the cache of {self.limit_bytes} may hold. "
                "Raise cache_bytes, or fetch the whole artifact with 'lsmix pull'."
            )

    def open(self, place: RemoteFS, record: FileRecord) -> IO[bytes]:
        """Return a listed file, opened to read; it is fetched if need be.

        Raises:
            RecipeError: it is larger than the whole cache may be.
            CorruptError: what is at the place is not the listed file.
            DownloadError: the place cannot be reached.
            DiskSpaceError: it does not fit on the disk.
        """
        path = self._files / record.sha256
        while True:
            try:
                stream = path.open("rb")
            except FileNotFoundError:
                fetched = self._fetch(place, record)
                if fetched is not None:
                    return fetched
                continue
            if self._is_right(stream, record):
                with contextlib.suppress(OSError):  # another user's file, or gone in between
                    os.utime(path)
                stream.seek(0)
                return stream
            stream.close()
            path.unlink(missing_ok=True)

    def _is_right(self, stream: IO[bytes], record: FileRecord) -> bool:
        facts = os.fstat(stream.fileno())
        known = (facts.st_dev, facts.st_ino)
        with self._checking:
            if self._checked.get(record.sha256) == known:
                return facts.st_size == record.bytes
        if facts.st_size != record.bytes or digest_of(stream) != record.sha256:
            return False
        self._remember(record, stream)
        return True

    def _remember(self, record: FileRecord, stream: IO[bytes]) -> None:
        facts = os.fstat(stream.fileno())
        with self._checking:
            self._checked[record.sha256] = (facts.st_dev, facts.st_ino)

    def _fetch(self, place: RemoteFS, record: FileRecord) -> IO[bytes] | None:
        """Fetch a file and return it opened; None if somebody else did so in between."""
        self.check(place, record)
        path = self._files / record.sha256
        part = self._files / f"{record.sha256}.{record.bytes}{_PART}"
        with locked_file(part, wait=True) as stream:
            if path.exists():
                part.unlink()
                return None
            self._make_room(record, part)
            fetch_file(place, record, stream, _tell_nobody)
            self._remember(record, stream)
            opened = part.open("rb")
            part.replace(path)
        return opened

    def _make_room(self, record: FileRecord, part: Path) -> None:
        with locked_file(self.folder / "lock", wait=True):
            found = []
            for path in self._files.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    facts = path.stat()
                    found.append((facts.st_mtime_ns, _room(path, facts.st_size), path))
            excess = sum(size for _, size, _ in found) - self.limit_bytes  # the part counts in full already
            for _, size, path in sorted(found):
                if excess <= 0:
                    break
                if path != part and _remove(path):
                    excess -= size
        needed, free = record.bytes - part.stat().st_size, shutil.disk_usage(self.folder).free
        if needed > free:
            raise DiskSpaceError(
                f"{record.path!r} needs {needed} bytes in the cache {str(self.folder)!r}, where {free} are free. Free some, "
                "or name another folder with cache= or LSMIX_CACHE."
            )


def _room(path: Path, size: int) -> int:
    """Return what a file takes, or will take when it is whole."""
    if path.name.endswith(_PART):
        told = path.name.removesuffix(_PART).rpartition(".")[2]
        return int(told) if told.isdecimal() else size
    return size


def _remove(path: Path) -> bool:
    if path.name.endswith(_PART):
        try:
            with locked_file(path, wait=False):
                path.unlink(missing_ok=True)
        except (LockedError, OSError):  # somebody is fetching it
            return False
        return True
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
    return not path.exists()


def _tell_nobody(count: int) -> None:
    pass


_JOBS = 4  # shards on their way at a time


class _RemoteFiles:
    """The files of a table at a URL, kept in the cache."""

    def __init__(self, place: RemoteFS, cache: FileCache, name: str, records: dict[str, FileRecord]) -> None:
        self._place = place
        self._cache = cache
        self._records = records
        self.location = f"{place.url}/{name}"
        self.sizes = {path: record.bytes for path, record in records.items()}

    def open(self, path: str) -> IO[bytes]:
        """Return a file, downloaded if need be."""
        return self._cache.open(self._place, self._records[path])

    def prefetch(self, paths: Sequence[str]) -> None:
        """Download those files that are not in the cache, several at a time, as far as half of it holds them."""
        missing = []
        room = self._cache.limit_bytes // 2
        for name in paths:
            if not self._cache.has(self._records[name]) and self._records[name].bytes <= room:
                room -= self._records[name].bytes
                missing.append(name)
        if len(missing) > 1:
            with ThreadPoolExecutor(_JOBS, thread_name_prefix="lsmix-fetch") as pool:
                for stream in pool.map(self.open, missing):
                    stream.close()


def open_remote_columns(
    url: str, name: str, *, check_crc: bool, cache: Path | str | None, cache_bytes: int
) -> tuple[Manifest, TableReader]:
    """Return the manifest and the table called ``name`` of the artifact at ``url``.

    Args:
        url: the artifact's folder at a place.
        name: of the Zarr group in it.
        check_crc: whether to compare each chunk's checksum when it is first mapped.
        cache: folder that shards are kept in; None for ``cache_folder()``.
        cache_bytes: how much may be kept there, of all artifacts together.

    Raises:
        MissingError: there is no artifact, no such columns in it, or it is not finished.
        FormatError: the artifact or the columns are of a format that this version does not read.
        CorruptError: its manifest or metadata is damaged, or they do not fit together.
        DownloadError: the place cannot be reached.
    """
    place = open_remote(url)
    manifest, _ = with_retries(repr(place.url), lambda: fetch_manifest(place))
    kept = FileCache(Path(cache) if cache else cache_folder(), cache_bytes)
    records = {
        record.path.removeprefix(f"{name}/"): record for record in manifest.files if record.path.startswith(f"{name}/")
    }
    for record in records.values():
        kept.check(place, record)
    return manifest, open_table(_RemoteFiles(place, kept, name, records), check_crc=check_crc)


_BLOCK_BYTES = 1 << 20
_PAUSES_SECONDS = (0.5, 1.0, 2.0, 4.0)  # before each new attempt; one that gets on begins the row anew
_Answer = TypeVar("_Answer")


def with_retries(what: str, action: Callable[[], _Answer]) -> _Answer:
    """Return what ``action`` returns, trying again after each ``TransientError``, a few times.

    Raises:
        DownloadError: it was interrupted each time; ``what`` begins the message.
    """
    for seconds in (*_PAUSES_SECONDS, None):
        try:
            return action()
        except TransientError as reason:
            if seconds is None:
                raise DownloadError(f"{what} cannot be reached: {reason}. Try again later.") from reason
            pause(seconds)
    raise AssertionError  # unreachable: the last pause is None


def fetch_file(place: RemoteFS, record: FileRecord, stream: IO[bytes], tell: Callable[[int], None]) -> int:
    """Complete a file that was fetched in part, or not at all, and check it.

    Args:
        place: where it lies.
        record: its path, size and checksum.
        stream: opened unbuffered to read and append; what is in it is taken for the beginning of the file.
        tell: is told how many bytes came; a negative number when they are thrown away.

    Returns:
        The number of bytes that were fetched.

    Raises:
        CorruptError: what is there is not the listed file; the stream is empty then.
        DownloadError: it cannot be reached; what came so far is in the stream.
        DiskSpaceError: the disk is full.
    """
    fetched, got = 0, ""
    for _ in range(2):
        fetched += _complete(place, record, stream, tell)
        got = digest_of(stream)
        if got == record.sha256:
            os.fsync(stream.fileno())
            return fetched
        stream.truncate(0)
        tell(-record.bytes)
    raise CorruptError(
        f"{place.url + '/' + record.path!r} is damaged: expected sha256 {record.sha256[:12]}…, got {got[:12]}…, twice. "
        "Ask its owner to send it again, or fetch it elsewhere."
    )


def _complete(place: RemoteFS, record: FileRecord, stream: IO[bytes], tell: Callable[[int], None]) -> int:
    fetched = failures = 0
    while True:
        have = os.fstat(stream.fileno()).st_size
        if have > record.bytes:  # of another file
            stream.truncate(0)
            have = 0
        if have == record.bytes:
            return fetched
        before = have
        try:
            for block in place.stream(record.path, have, record.bytes):
                stop_point()
                append_block(stream, block[: record.bytes - have], repr(record.path))
                have += len(block)
                fetched += len(block)
                tell(len(block))
            reason: TransientError | str = f"the connection ended after {have} of {record.bytes} bytes"
        except TransientError as error:
            reason = error
        if have < record.bytes:
            failures = 1 if have >= before + LEAST_PROGRESS_BYTES else failures + 1
            if failures > len(_PAUSES_SECONDS):
                raise DownloadError(
                    f"{place.url + '/' + record.path!r} cannot be fetched: {reason}. What came is kept; run again to go on."
                )
            pause(_PAUSES_SECONDS[failures - 1])


def digest_of(stream: IO[bytes]) -> str:
    """Return the SHA-256 of all bytes of an open file, in hex; the file is left at its end."""
    digest = hashlib.sha256()
    stream.seek(0)
    while block := stream.read(_BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()


@contextmanager
def locked_file(path: Path, *, wait: bool) -> Iterator[IO[bytes]]:
    """Open a file to read and append, made if need be, for this thread of this process alone; yield it unbuffered.

    The lock goes with the process. Where another thread or process holds it, wait, or raise LockedError.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        stream = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
        try:
            if wait:
                lock_file(stream, fcntl.LOCK_EX)
            else:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between opening and locking, another may have given the file its final name or removed it.
            mine = is_file_at(path, stream)
        except BlockingIOError as error:
            stream.close()
            raise LockedError(
                f"{str(path.parent)!r} is being written by another run. Wait for it, or stop it."
            ) from error
        except BaseException:
            stream.close()
            raise
        if mine:
            break
        stream.close()
    try:
        yield stream
    finally:
        stream.close()
