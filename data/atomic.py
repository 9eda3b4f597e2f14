"""Atomic and durable writes, locks and checksums of files, and JSON that carries its version and checksum."""

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Final, TypeVar

import msgspec

from lsmix.data.errors import DiskSpaceError, FormatError, LockedError, MissingError, RecipeError
from lsmix.data.progress import pause

__all__ = [
    "DECODE_ERRORS",
    "add_checksum",
    "atomic_folder",
    "atomic_path",
    "check_replaceable",
    "check_room",
    "check_tensor_header",
    "decode_versioned",
    "dump_checksummed",
    "folder_bytes",
    "fsync_folder",
    "fsync_tree",
    "load_checksummed",
    "lock_open_file",
    "locked_file",
    "read_small",
    "remove_stale",
    "sha256_file",
    "write_atomic",
]

_PART = ".part"  # ends the name of a file or folder being written
_MARK = ".lsmix-unfinished"  # in such a folder: says that it is ours, and is locked
_CONTENT = "content"


def check_replaceable(path: Path) -> None:
    """Refuse to write where a rename would destroy something that is not a regular file.

    Raises:
        RecipeError: there is a folder, a link, a device, a pipe or a socket at ``path``.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a link" if stat.S_ISLNK(mode) else "a device, a pipe or a socket"
        raise RecipeError(
            f"cannot write {str(path)!r}: it is {kind}, and only regular files are replaced. Choose another path."
        )


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield an empty file beside ``path`` to be written; then it is flushed and renamed over it, or removed on an error.

    Raises:
        RecipeError: what is at ``path`` is not a regular file, so it is not replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    check_replaceable(path)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}{_PART}")
    # Not mkstemp, whose files only their owner may read, whatever the umask says.
    os.close(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_atomic(path: Path, *pieces: bytes | memoryview) -> None:
    """Write ``pieces``, one behind the other, to ``path`` at once: beside it, flushed, then renamed over it."""
    with atomic_path(path) as beside, beside.open("wb") as file:
        file.writelines(pieces)


def remove_stale(folder: Path) -> None:
    """Remove what writers that were killed left beside their files, anywhere below ``folder``."""
    for path in folder.rglob(f".*{_PART}"):
        path.unlink(missing_ok=True)


def fsync_folder(folder: Path) -> None:
    """Flush a folder's list of names to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder below ``folder``, and itself, to disk."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            with (Path(root) / name).open("rb") as file:
                os.fsync(file.fileno())
        fsync_folder(Path(root))


def folder_bytes(folder: Path) -> int:
    """Return the size of all files below a folder, from which others may remove some meanwhile; 0 if it is not there."""
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                size += os.lstat(f"{place}/{name}").st_size
    return size


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_UNSUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}
_warned: set[Path] = set()  # folders
_LOCK_POLL_SECONDS = 0.01  # downloads in several threads take turns at the lock of the cache


def lock_open_file(file: IO[bytes], path: Path, *, shared: bool = False, wait: bool = False) -> None:
    """Lock an open file; a stop ends the wait. A file system without locks gets one warning, and the work goes on.

    Args:
        file: the open file, which holds the lock until it is closed.
        path: its path, for the warning.
        shared: whether others may hold the lock too, if they ask for it shared.
        wait: whether to wait for others.

    Raises:
        BlockingIOError: another open file holds the lock, and ``wait`` is unset.
    """
    while True:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise
            pause(_LOCK_POLL_SECONDS)
            continue
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            if path.parent not in _warned:
                _warned.add(path.parent)
                warnings.warn(
                    f"{str(path.parent)!r} is on a file system without locks: do not start two runs there at a time.",
                    RuntimeWarning,
                    stacklevel=3,
                )
        return


@contextmanager
def locked_file(path: Path, *, wait: bool = False, shared: bool = False, message: str = "") -> Iterator[IO[bytes]]:
    """Open a file to read and append, made if need be, and lock it; yield it unbuffered.

    Args:
        path: the file, in a folder that exists.
        wait: whether to wait while another thread or process holds the lock.
        shared: whether others may hold the lock too, if they ask for it shared.
        message: of the error; "" for a general one.

    Raises:
        LockedError: another thread or process holds the lock, and ``wait`` is unset.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        with os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0) as stream:
            try:
                lock_open_file(stream, path, shared=shared, wait=wait)
            except BlockingIOError as error:
                message = message or f"{str(path.parent)!r} is being written by another run. Wait for it, or stop it."
                raise LockedError(message) from error
            # Between opening and locking, another may have renamed or removed the file.
            if _is_at(path, stream):
                yield stream
                return


def _is_at(path: Path, stream: IO[bytes]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False


@contextmanager
def atomic_folder(target: Path, *, resume: bool = False) -> Iterator[Path]:
    """Yield a folder to write to, which becomes ``target`` at the end, or is removed if something is raised.

    The work is in ``NAME.part`` beside it, marked as ours to the end and locked by the kernel, so that only what a killed
    process left there is replaced.

    Args:
        target: where nothing is yet; with ``resume`` also an empty folder.
        resume: whether to begin with the files that an earlier call left, and to leave files if something is raised.

    Raises:
        RecipeError: there is something at ``target``, or something that is not ours in the way.
        MissingError: there is no folder to put it in.
        LockedError: another process is making it.
    """
    if os.path.lexists(target) and not (resume and target.is_dir() and not any(target.iterdir())):
        raise RecipeError(
            f"{str(target)!r} is there already, and nothing is overwritten. Remove it, or choose another."
        )
    if not target.parent.is_dir():
        raise MissingError(f"there is no folder {str(target.parent)!r} to write {target.name!r} to. Make it first.")
    part = target.with_name(target.name + _PART)
    if os.path.lexists(part) and not _is_ours(part):
        raise RecipeError(f"{str(part)!r} is in the way, and was not made by lsmix. Rename or remove it.")
    part.mkdir(exist_ok=True)
    content, done = part / _CONTENT, False
    try:
        with locked_file(part / _MARK):
            if not resume or content.is_symlink():
                _clear(part)
            try:
                content.mkdir(exist_ok=resume)
                yield content
                fsync_tree(content)
                content.replace(target)
                fsync_folder(target.absolute().parent)
                done = True
            finally:
                if done or not resume or not any(path.is_file() and path.name != _MARK for path in part.rglob("*")):
                    _clear(part)
                    (part / _MARK).unlink(missing_ok=True)
    finally:
        with suppress(OSError):  # another process is making it
            part.rmdir()


def _is_ours(part: Path) -> bool:
    """Tell whether it was made here: marked, or as empty as it is before it is marked and after the mark is gone."""
    return not part.is_symlink() and part.is_dir() and ((part / _MARK).is_file() or not any(part.iterdir()))


def _clear(part: Path) -> None:
    """Remove everything but the mark, which goes last, so that a folder that is cleared in part is still known as ours."""
    for entry in part.iterdir():
        if entry.name != _MARK:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def check_room(folder: Path, needed: int, what: str, advice: str = "choose another folder") -> None:
    """Raise DiskSpaceError unless ``needed`` more bytes fit on the disk of a folder; ``what`` begins the message."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskSpaceError(
            f"{what} needs {needed} more bytes in {str(folder)!r}, where {free} are free. Free some space, or {advice}."
        )


_Record = TypeVar("_Record")

# What is counted before decoding, since every list, object, key and value takes much more memory than its bytes in JSON:
# 64 MiB of "[]," took 3 GB. A pool has one number for each failed decode, and a manifest four keys for each file.
_MOST_PARTS: Final = {b"[": 200_000, b"{": 300_000, b":": 1_500_000, b'"': 4_000_000, b",": 6_000_000}

# What decoding raises on bytes that are damaged, or were made to do harm.
DECODE_ERRORS: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_MOST_HEADER_BYTES = 4 << 20  # some 40,000 tensors
_MOST_BYTES = 16 << 20  # of results, which have some hundred bytes for each epoch or sample


def read_small(path: Path) -> bytes:
    """Return the content of a file of results.

    Raises:
        One of DECODE_ERRORS: it is larger than any such file.
    """
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise msgspec.ValidationError(f"it has {path.stat().st_size} bytes, and lsmix reads at most {_MOST_BYTES}")
    return content


def check_tensor_header(path: Path) -> None:
    """Look at the length of a safetensors file's header, which takes some 16 times as much memory when it is read.

    Raises:
        OSError: it is longer than any of ours, or the file cannot be read.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > _MOST_HEADER_BYTES:
        raise OSError(f"its header has {size} bytes, and lsmix reads at most {_MOST_HEADER_BYTES}")


class _Version(msgspec.Struct):
    format_version: int


def decode_versioned(content: bytes, kind: type[_Record], version: int, *, what: str, remedy: str) -> _Record:
    """Return the record that JSON holds.

    Args:
        content: JSON, an object with ``format_version``.
        kind: struct of the record.
        version: the only one that is read.
        what: begins the message about another version, up to the word format.
        remedy: ends it.

    Raises:
        FormatError: it is of another version.
        One of DECODE_ERRORS: it is no such record; the caller knows what that means of its file.
    """
    for mark, most in _MOST_PARTS.items():
        if (count := content.count(mark)) > most:
            raise msgspec.ValidationError(f"it holds {count} times {mark.decode()!r}, and lsmix reads at most {most}")
    found = msgspec.json.decode(content, type=_Version).format_version
    if found != version:
        raise FormatError(f"{what} format {found}; this version of lsmix reads format {version}. {remedy}")
    return msgspec.json.decode(content, type=kind)


_OPENING = b"{\n"
_CHECKSUM_LINE = re.compile(rb'\{\n "checksum": "([0-9a-f]{64})",\n')


def dump_checksummed(record: msgspec.Struct) -> bytes:
    """Return a record as JSON, its fields sorted and one a line, below a checksum of these bytes."""
    return add_checksum(msgspec.json.format(msgspec.json.encode(record, order="sorted"), indent=1) + b"\n")


def add_checksum(content: bytes) -> bytes:
    """Put the checksum's line into JSON that begins with a brace and a line feed."""
    digest = hashlib.sha256(content).hexdigest().encode()
    return _OPENING + b' "checksum": "' + digest + b'",\n' + content.removeprefix(_OPENING)


def load_checksummed(content: bytes, kind: type[_Record], version: int, *, what: str, remedy: str) -> _Record:
    """Return the record that ``dump_checksummed`` wrote; the arguments are those of ``decode_versioned``.

    Raises:
        FormatError: it is of another version, and undamaged.
        One of DECODE_ERRORS: a byte was changed, or it is no such record.
    """
    found = _CHECKSUM_LINE.match(content)
    digest = hashlib.sha256(_OPENING)
    if found:
        digest.update(memoryview(content)[found.end() :])
    if not found or digest.hexdigest().encode() != found[1]:
        raise msgspec.ValidationError("its bytes are not those that were written")
    return decode_versioned(content, kind, version, what=what, remedy=remedy)
