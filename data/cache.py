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
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, TypeVar

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
from lsmix.data.table import (
    ARRAY_BYTES,
    GROUP_BYTES,
    METADATA_NAME,
    MOST_COLUMNS,
    ColumnStore,
    open_store,
    shard_bytes,
)
from lsmix.data.table_reader import ColumnReader
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
_MOST_METADATA_BYTES = GROUP_BYTES + MOST_COLUMNS * ARRAY_BYTES
_MOST_OPEN = 128


class _RemoteShards:
    """The shards of a store afar, as files in the cache."""

    def __init__(self, place: RemoteFS, cache: FileCache, name: str, records: dict[str, FileRecord]) -> None:
        self._place = place
        self._url = f"{place.url}/{name}"
        self._cache = cache
        self._records = records
        largest = max((record.bytes for record in records.values()), default=1)
        # What is mapped stays on the disk although it went from the cache: so only half of the limit may be mapped.
        self.most_open = max(1, min(_MOST_OPEN, cache.limit_bytes // 2 // max(largest, 1)))

    def where(self, name: str) -> str:
        """Return what to call a shard in messages; the store itself for ""."""
        return f"{self._url}/{name}"

    def open(self, name: str) -> IO[bytes]:
        """Return a shard's file, fetched if need be."""
        return self._cache.open(self._place, self._records[name])

    def prefetch(self, names: Sequence[str]) -> None:
        """Fetch those of the shards that are not in the cache, several at a time, as far as half of it holds them."""
        missing = []
        room = self._cache.limit_bytes // 2
        for name in names:
            if not self._cache.has(self._records[name]) and self._records[name].bytes <= room:
                room -= self._records[name].bytes
                missing.append(name)
        if len(missing) > 1:
            with ThreadPoolExecutor(_JOBS, thread_name_prefix="lsmix-fetch") as pool:
                for stream in pool.map(self.open, missing):
                    stream.close()


def open_remote_columns(
    url: str, name: str, *, check_crc: bool, cache: Path | str | None, cache_bytes: int
) -> tuple[Manifest, ColumnReader]:
    """Return the manifest and the columns called ``name`` of the artifact at ``url``.

    Args:
        url: the artifact's folder at a place.
        name: of the Zarr group in it.
        check_crc: whether to compare each chunk's checksum when it is first touched.
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
    store, attributes = _open_metadata(place, kept, name, records)
    for column in store.columns:
        for shard in range(store.shards):
            _check_record(place, store, shard, column.name, records.get(column.shard_name(shard)))
    return manifest, ColumnReader(
        store, attributes, check_crc=check_crc, files=_RemoteShards(place, kept, name, records)
    )


def _open_metadata(
    place: RemoteFS, cache: FileCache, name: str, records: dict[str, FileRecord]
) -> tuple[ColumnStore, dict[str, Any]]:
    if METADATA_NAME not in records:
        raise MissingError(f"no columns {name!r} in the artifact at {place.url!r}: {METADATA_NAME} is not listed.")
    metadata = {path: record for path, record in records.items() if path.rpartition("/")[2] == METADATA_NAME}
    if (size := sum(record.bytes for record in metadata.values())) > _MOST_METADATA_BYTES:
        raise CorruptError(
            f"the metadata at {place.url!r} has {size} bytes, and lsmix reads at most {_MOST_METADATA_BYTES}. Do not use it."
        )
    with tempfile.TemporaryDirectory(prefix="lsmix-") as folder:
        with ThreadPoolExecutor(_JOBS, thread_name_prefix="lsmix-fetch") as pool:
            contents = pool.map(lambda record: _content(cache, place, record), metadata.values())
            for path, content in zip(metadata, contents, strict=True):
                target = Path(folder, path)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
        try:
            store, attributes = open_store(Path(folder))
        except LsmixError as error:  # which speaks of the copy
            raise type(error)(str(error).replace(folder, f"{place.url}/{name}")) from error
    return replace(store, folder=Path(f"{place.url}/{name}")), attributes


def _content(cache: FileCache, place: RemoteFS, record: FileRecord) -> bytes:
    with cache.open(place, record) as stream:
        return stream.read()


def _check_record(place: RemoteFS, store: ColumnStore, shard: int, column: str, record: FileRecord | None) -> None:
    # Before anything is allocated: metadata may claim any number of rows, but only listed files can back them.
    (own,) = (each for each in store.columns if each.name == column)
    where = f"{place.url}/{store.folder.name}/{own.shard_name(shard)}"
    if record is None:
        raise CorruptError(f"{where!r} is not in the manifest. Ask its owner to send the artifact again.")
    least = shard_bytes(
        len(store.shard_range(shard)), row_bytes=own.row_bytes, chunk_rows=own.chunk_rows, shard_rows=store.shard_rows
    )
    if record.bytes < least:
        raise CorruptError(f"{where!r} is damaged: expected {least} bytes or more, the manifest lists {record.bytes}.")


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
