"""Copies of what lies at URLs, for whoever needs an artifact as a folder: complete, checked, and shared by all processes.

A copy is called by the very bytes of its manifest and nothing in it ever changes, so what changes at its URL
gets another copy. A process that was given one holds a lock on it as long as it lives, and what is locked is never removed.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from lsmix.data.artifact import is_description
from lsmix.data.atomic import is_file_at, sha256_file
from lsmix.data.cache import cache_folder, locked_file, private_folder, with_retries
from lsmix.data.errors import (
    CorruptError,
    DiskSpaceError,
    FormatError,
    LockedError,
    LsmixError,
    MissingError,
)
from lsmix.data.progress import Progress, lock_file, pause
from lsmix.data.remote import RemoteFS, local_folder, open_remote
from lsmix.data.sharing.transfer import Listing, artifact_listing, pull_listed

__all__ = [
    "as_told",
    "download_artifact",
    "download_file",
    "fresh_download",
    "naming_urls",
    "without_store",
]

_HOME = "artifacts"  # in the cache folder
_KEPT_BYTES = 20 << 30  # of all copies together; one that is larger is fetched all the same, and goes with the next
_FRESH = ".fresh-"  # begins the name of a copy that belongs to one call of one process; others begin with no dot
_LOCK = ".lock"  # ends the name of a copy's lock, whose time says when the copy was last asked for
_PART = ".part"  # … of a copy that is being fetched
_DIGITS = 12
_MOST_JSON_BYTES = 1 << 20
_TRIES = 40  # at a copy that others hold, though it is not whole
_PAUSE_SECONDS = 0.05


class _Copy(NamedTuple):
    url: str
    lock: IO[bytes] | None  # held as long as this process lives; None where the call that made the copy holds it


_copies: dict[Path, _Copy] = {}  # of this process; locks are a process's own, and so is what it was told


def download_artifact(place: Path | str, progress: Progress) -> Path:
    """Return the folder of an artifact: its own where it is on this machine, else that of a complete and checked copy.

    A copy that is there already is taken if the manifest at the URL is still the same. One that was begun goes on. Never
    write to it: other processes read it.

    Args:
        place: a path, or a URL of a web server or an object store.
        progress: is told how many bytes are there.

    Raises:
        MissingError: there is no complete artifact at the URL; of a path nothing is asked.
        FormatError: it is of a version that this lsmix does not read.
        CorruptError: it is damaged, or its manifest would write to where it must not.
        RecipeError: lsmix reads no URLs of this kind.
        DiskSpaceError: it does not fit on the disk.
        DownloadError: the place cannot be reached; what came is kept.
        LockedError: the copy is damaged, and another process uses it.
    """
    folder = local_folder(place)
    if folder is not None:
        return folder
    there = open_remote(place)
    return _copy_of(there, with_retries(repr(there.url), lambda: artifact_listing(there)), progress)


def download_file(url: str, path: str, progress: Progress) -> Path:
    """Return a copy of one small JSON file of the artifact at a URL, with the manifest beside it where there is one.

    Args:
        url: of the artifact, or of a file that ends in ".json".
        path: the file in the artifact, where the URL names no file.
        progress: is told how many bytes are there.

    Raises:
        LsmixError: as ``download_artifact``.
    """
    home, _, name = url.rstrip("/").rpartition("/")
    there = open_remote(home if name.endswith(".json") else url)
    path = name if name.endswith(".json") else path
    try:
        whole = with_retries(repr(there.url), lambda: artifact_listing(there))
    except MissingError:
        whole = None
    wanted = [record for record in whole.files if record.path == path] if whole else []
    if whole and wanted:
        if wanted[0].bytes > _MOST_JSON_BYTES:
            raise FormatError(
                f"{there.url + '/' + path!r} has {wanted[0].bytes} bytes, too many for what it should be."
            )
        return _copy_of(there, whole._replace(files=wanted), progress, f"{path}-of-") / path
    content = with_retries(repr(there.url), lambda: there.read(path, _MOST_JSON_BYTES))
    return _copy_of(there, Listing(path, [], path, content), progress) / path


@contextmanager
def fresh_download(url: str, progress: Progress) -> Iterator[Path]:
    """Yield the folder of a new copy of what is stored at a URL now; the copy is removed at the end.

    Args:
        url: of an artifact.
        progress: optional progress reporter.

    Raises:
        LsmixError: as ``download_artifact``.
    """
    there = open_remote(url)
    with _own_folder(there.url) as folder:
        listing = with_retries(repr(there.url), lambda: artifact_listing(there))
        _make_room(folder.parent, listing.bytes, folder.name)
        _pull(there, listing, folder, progress)
        yield folder


def as_told(text: str) -> str:
    """Return a text with every copy that this process was given called by its URL."""
    for folder, copy in list(_copies.items()):  # other threads may be given more meanwhile
        text = text.replace(str(folder), copy.url)
    return text


@contextmanager
def naming_urls() -> Iterator[None]:
    """Let errors that speak of a copy speak of its URL; a decorator, too."""
    try:
        yield
    except LsmixError as error:
        told = as_told(str(error))
        if told == str(error):
            raise
        damaged = [str(folder) for folder in list(_copies) if str(folder) in str(error) and not _is_fresh(folder.name)]
        if isinstance(error, CorruptError) and damaged:
            told += f" Its copy here is {damaged[0]!r}; if that was damaged since, remove it, and it is fetched anew."
        raise type(error)(told) from error


def without_store(place: Path | str, store: str) -> Path | str:
    """Return an artifact's URL without the file or folder in it that a URL may end in, such as "pool.zarr"; paths stay."""
    return place if local_folder(place) is not None else str(place).rstrip("/").removesuffix(f"/{store}")


def _copy_of(there: RemoteFS, listing: Listing, progress: Progress, kind: str = "") -> Path:
    home = _home()
    last = re.sub(r"[^A-Za-z0-9._-]+", "_", there.url.rpartition("/")[2]).strip(".")[:64]
    name = f"{kind}{last or 'artifact'}-{hashlib.sha256(listing.content).hexdigest()[:_DIGITS]}"
    folder = home / name

    def wait() -> None:
        progress.info(f"another process is fetching {there.url}; waiting for it")

    fetched = False
    for _ in range(_TRIES):
        shared = _shared(home / f"{name}{_LOCK}", wait)
        if _is_whole(folder, listing, checked=fetched or folder in _copies):
            return _given(folder, there.url, shared)
        shared.close()
        if folder in _copies and (held := _copies.pop(folder).lock):
            held.close()  # what was damaged since is fetched anew by whoever asks for it
        try:
            with locked_file(home / f"{name}{_LOCK}", wait=False):
                _make_room(home, listing.bytes, name)
                _drop(folder)
                _pull(there, listing, folder, progress)
                fetched = True
        except LockedError:  # somebody else was quicker to fetch it, or uses it
            pause(_PAUSE_SECONDS)
    raise LockedError(
        f"the copy {str(folder)!r} of {there.url!r} is damaged, and another process uses it. End that, and try again."
    )


def _given(folder: Path, url: str, shared: IO[bytes]) -> Path:
    os.utime(shared.fileno())
    before = _copies.get(folder)
    _copies[folder] = _Copy(url, before.lock if before else shared)
    if before:
        shared.close()
    return folder


def _home() -> Path:
    return private_folder(cache_folder().absolute(), _HOME)


@contextmanager
def _own_folder(url: str) -> Iterator[Path]:
    """Give the path of a folder for this call alone; what killed processes left of theirs is removed first."""
    home = _home()
    for lock in home.glob(f"{_FRESH}*{_LOCK}"):
        _remove(home, lock.name.removesuffix(_LOCK))
    folder = home / f"{_FRESH}{secrets.token_hex(8)}"
    lock = home / f"{folder.name}{_LOCK}"
    with locked_file(lock, wait=False):
        _copies[folder] = _Copy(url, None)
        try:
            with naming_urls():
                yield folder
        finally:
            del _copies[folder]
            _drop(folder)
            _drop(home / f"{folder.name}{_PART}")
            lock.unlink()


def _is_fresh(name: str) -> bool:
    return name.startswith(_FRESH)


def _shared(path: Path, wait: Callable[[], None]) -> IO[bytes]:
    """Return a copy's lock file, locked so that others may read the copy too, and nobody may change it."""
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        stream = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
        try:
            try:
                fcntl.flock(stream.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                wait()
                lock_file(stream, fcntl.LOCK_SH)
            mine = is_file_at(path, stream)  # else it was removed between opening and locking
        except BaseException:
            stream.close()
            raise
        if mine:
            return stream
        stream.close()


def _is_whole(folder: Path, listing: Listing, *, checked: bool) -> bool:
    """Tell whether a copy is there; by the bytes of its files, unless this process has ``checked`` them already."""
    try:
        if (folder / listing.last).read_bytes() != listing.content:
            return False
        files = [file for file in listing.files if not is_description(file)]
        facts = [os.lstat(f"{folder}/{file.path}") for file in files]
    except OSError:
        return False
    return all(
        stat.S_ISREG(fact.st_mode)
        and fact.st_size == file.bytes
        and (checked or sha256_file(folder / file.path) == file.sha256)
        for fact, file in zip(facts, files, strict=True)
    )


def _pull(there: RemoteFS, listing: Listing, folder: Path, progress: Progress) -> None:
    try:
        pull_listed(there, listing, folder, progress)
    except DiskSpaceError as error:
        raise DiskSpaceError(
            f"{there.url!r} needs a copy on this machine. {error} LSMIX_CACHE says where copies lie."
        ) from error


def _make_room(home: Path, needed: int, own: str) -> None:
    """Remove the copies used longest ago, of those that nobody uses, until there is room for one more within the limit."""
    with locked_file(home / "room", wait=True):
        found = []
        for lock in home.glob(f"*{_LOCK}"):
            name = lock.name.removesuffix(_LOCK)
            with contextlib.suppress(FileNotFoundError):
                found.append((lock.stat().st_mtime_ns, name, _size(home / name) + _size(home / f"{name}{_PART}")))
        excess = sum(size for _, name, size in found if name != own) + needed - _KEPT_BYTES
        for _, name, size in sorted(found):
            if excess > 0 and name != own and _remove(home, name):
                excess -= size


def _size(folder: Path) -> int:
    size = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # others fetch meanwhile
                size += os.lstat(f"{root}/{name}").st_size
    return size


def _remove(home: Path, name: str) -> bool:
    lock = home / f"{name}{_LOCK}"
    try:
        with locked_file(lock, wait=False):
            _drop(home / name)
            _drop(home / f"{name}{_PART}")
            lock.unlink()
    except (LockedError, OSError):  # somebody uses or fetches it, or it is another user's
        return False
    return True


def _drop(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)
