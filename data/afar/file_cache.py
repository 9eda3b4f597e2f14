"""A bounded folder of files that were fetched from afar, called by their SHA-256 and shared by all processes of a user.

The one rule: a file gets its name only when its bytes have that checksum, and a process checks each file once more before
it first uses it. The files used longest ago go when room is needed; who has one open or mapped keeps it.
"""

import contextlib
import os
import shutil
import stat
import threading
from pathlib import Path
from typing import IO

from lsmix.data.afar.fetch import digest_of, fetch_file, locked_file
from lsmix.data.afar.remote import Place
from lsmix.data.errors import DiskSpaceError, LockedError, LsmixError, MissingError, RecipeError
from lsmix.data.manifest import FileRecord

__all__ = ["FileCache", "cache_folder", "private_folder"]

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

    def check(self, place: Place, record: FileRecord) -> None:
        """Raise RecipeError if a file is larger than the whole cache may be."""
        if record.bytes > self.limit_bytes:
            raise RecipeError(
                f"{place.url + '/' + record.path!r} has {record.bytes} bytes, more than the cache of {self.limit_bytes} may hold. "
                "Raise cache_bytes, or fetch the whole artifact with 'lsmix pull'."
            )

    def open(self, place: Place, record: FileRecord) -> IO[bytes]:
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

    def _fetch(self, place: Place, record: FileRecord) -> IO[bytes] | None:
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
