"""Atomic and durable file writes, file locks, checksums, and JSON with a format version and a checksum."""

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

from lsmix.data.errors import DiskSpaceError, FormatError, LockedError, MissingError, RecipeError, format_bytes
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

_PART = ".part"  # suffix of a file or folder that is being written
_MARK = ".lsmix-unfinished"  # file in such a folder: shows that lsmix created the folder, and serves as its lock
_CONTENT = "content"


def check_replaceable(path: Path) -> None:
    """Check that replacing ``path`` would destroy nothing but a regular file.

    Raises:
        RecipeError: ``path`` is a folder, a link, a device, a pipe or a socket.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a link" if stat.S_ISLNK(mode) else "a device, a pipe or a socket"
        raise RecipeError(
            f"cannot write {str(path)!r}: it is {kind}, and lsmix replaces only regular files. Choose another path."
        )


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield an empty temporary file next to ``path``; on success flush and rename it to ``path``, else remove it.

    Raises:
        RecipeError: ``path`` exists and is not a regular file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    check_replaceable(path)
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}{_PART}")
    # Not mkstemp: it ignores the umask and makes files that only their owner can read.
    os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_atomic(path: Path, *pieces: bytes | memoryview) -> None:
    """Write the concatenated ``pieces`` to ``path`` atomically and durably."""
    with atomic_path(path) as part, part.open("wb") as file:
        file.writelines(pieces)


def remove_stale(folder: Path) -> None:
    """Remove the temporary files of killed writers anywhere below ``folder``."""
    for path in folder.rglob(f".*{_PART}"):
        path.unlink(missing_ok=True)


def fsync_folder(folder: Path) -> None:
    """Flush a folder's directory entries to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    """Flush ``folder`` and every file and folder below it to disk."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            with (Path(root) / name).open("rb") as file:
                os.fsync(file.fileno())
        fsync_folder(Path(root))


def folder_bytes(folder: Path) -> int:
    """Return the total size of all files below a folder, or 0 if it does not exist."""
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # another process may remove files at the same time
                size += os.lstat(f"{parent}/{name}").st_size
    return size


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_UNSUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}
_warned: set[Path] = set()  # folders without lock support that were reported already
_LOCK_POLL_SECONDS = 0.01  # short, because parallel downloads contend for the lock of the cache


def lock_open_file(file: IO[bytes], path: Path, *, shared: bool = False, wait: bool = False) -> None:
    """Lock an open file; an interrupt ends the wait. If the file system has no locks, warn once per folder instead.

    Args:
        file: The open file; closing it releases the lock.
        path: Its path, for the warning.
        shared: Take a shared lock, which several files can hold together, instead of an exclusive one.
        wait: Wait until the lock is free.

    Raises:
        BlockingIOError: The lock is held elsewhere and ``wait`` is false.
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
                    f"{str(path.parent)!r} is on a file system without locks: start only one run there at a time.",
                    RuntimeWarning,
                    stacklevel=3,
                )
        return


@contextmanager
def locked_file(path: Path, *, wait: bool = False, shared: bool = False, message: str = "") -> Iterator[IO[bytes]]:
    """Open a file for reading and appending, creating it if necessary, lock it, and yield it unbuffered.

    Args:
        path: The file, in an existing folder.
        wait: Wait while another thread or process holds the lock.
        shared: Take a shared lock instead of an exclusive one.
        message: Error message; "" for a general one.

    Raises:
        LockedError: Another thread or process holds the lock and ``wait`` is false.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        with os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0) as stream:
            try:
                lock_open_file(stream, path, shared=shared, wait=wait)
            except BlockingIOError as error:
                message = message or f"{str(path.parent)!r} is being written by another run. Wait for it, or stop it."
                raise LockedError(message) from error
            # Another process may have renamed or removed the file between opening and locking.
            if _is_same_file(path, stream):
                yield stream
                return


def _is_same_file(path: Path, stream: IO[bytes]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False


@contextmanager
def atomic_folder(target: Path, *, resume: bool = False) -> Iterator[Path]:
    """Yield a temporary folder, and rename it to ``target`` on success or remove it on an error.

    The temporary folder is in ``NAME.part`` next to ``target``, which holds a marker file and a lock. Only a folder that
    a killed lsmix process left there is replaced.

    Args:
        target: A path that does not exist; with ``resume`` also an empty folder.
        resume: Start from the files that an interrupted call left, and keep the files on an error.

    Raises:
        RecipeError: ``target`` exists, or lsmix did not create the folder ``NAME.part``.
        MissingError: The parent folder does not exist.
        LockedError: Another process is writing ``target``.
    """
    if os.path.lexists(target) and not (resume and target.is_dir() and not any(target.iterdir())):
        raise RecipeError(f"{str(target)!r} already exists and is not overwritten. Remove it, or choose another path.")
    if not target.parent.is_dir():
        raise MissingError(
            f"cannot write {target.name!r}: the folder {str(target.parent)!r} does not exist. Create it."
        )
    part = target.with_name(target.name + _PART)
    if os.path.lexists(part) and not _is_unfinished(part):
        raise RecipeError(f"{str(part)!r} already exists and was not created by lsmix. Rename or remove it.")
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
        with suppress(OSError):  # another process is writing it
            part.rmdir()


def _is_unfinished(part: Path) -> bool:
    """Return whether lsmix created the folder: it has the marker file, or is empty (no marker yet, or no longer)."""
    return not part.is_symlink() and part.is_dir() and ((part / _MARK).is_file() or not any(part.iterdir()))


def _clear(part: Path) -> None:
    """Remove everything except the marker file, which identifies the folder even if clearing is interrupted."""
    for entry in part.iterdir():
        if entry.name != _MARK:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def check_room(folder: Path, needed: int, what: str, advice: str = "choose another folder") -> None:
    """Raise DiskSpaceError unless the disk of ``folder`` has ``needed`` bytes free; ``what`` begins the message."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskSpaceError(
            f"{what} needs {format_bytes(needed)} more in {str(folder)!r}, but only {format_bytes(free)} are free. "
            f"Free some space, or {advice}."
        )


_Record = TypeVar("_Record")

# Limits that are checked before decoding, because decoded lists, objects, keys and values take much more memory than
# their JSON: 64 MiB of "[]," took 3 GB. A pool has one number per failed decode, and a manifest four keys per file.
_MOST_PARTS: Final = {b"[": 200_000, b"{": 300_000, b":": 1_500_000, b'"': 4_000_000, b",": 6_000_000}

# Exceptions that decoding raises for damaged or malicious bytes.
DECODE_ERRORS: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_MOST_HEADER_BYTES = 4 << 20  # about 40,000 tensors
_MOST_BYTES = 16 << 20  # of a results file, which has a few hundred bytes per epoch or sample


def read_small(path: Path) -> bytes:
    """Return the content of a results file.

    Raises:
        msgspec.ValidationError: The file is larger than 16 MiB; this is one of DECODE_ERRORS.
    """
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise msgspec.ValidationError(f"it has {path.stat().st_size:,} bytes; lsmix reads at most {_MOST_BYTES:,}")
    return content


def check_tensor_header(path: Path) -> None:
    """Check the length of a safetensors file's header, which takes about 16 times its size in memory once parsed.

    Raises:
        OSError: The header is larger than 4 MiB, or the file cannot be read.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > _MOST_HEADER_BYTES:
        raise OSError(f"its header has {size:,} bytes; lsmix reads at most {_MOST_HEADER_BYTES:,}")


class _Version(msgspec.Struct):
    format_version: int


def decode_versioned(content: bytes, kind: type[_Record], version: int, *, what: str, remedy: str) -> _Record:
    """Decode versioned JSON and return the record.

    Args:
        content: JSON object with the field ``format_version``.
        kind: Struct type of the record.
        version: The supported version.
        what: Begins the message about another version, up to the word "format", such as "plan 'plan.json' has".
        remedy: Ends the message.

    Raises:
        FormatError: The record has another version.
        DECODE_ERRORS: The bytes are not such a record. Callers turn this into a message about their file.
    """
    for mark, most in _MOST_PARTS.items():
        if (count := content.count(mark)) > most:
            raise msgspec.ValidationError(
                f"it contains {mark.decode()!r} {count:,} times; lsmix reads at most {most:,}"
            )
    found = msgspec.json.decode(content, type=_Version).format_version
    if found != version:
        raise FormatError(f"{what} format {found}; this version of lsmix reads format {version}. {remedy}")
    return msgspec.json.decode(content, type=kind)


_OPENING = b"{\n"
_CHECKSUM_LINE = re.compile(rb'\{\n "checksum": "([0-9a-f]{64})",\n')


def dump_checksummed(record: msgspec.Struct) -> bytes:
    """Return a record as JSON with sorted fields, one per line, preceded by a checksum of these bytes."""
    return add_checksum(msgspec.json.format(msgspec.json.encode(record, order="sorted"), indent=1) + b"\n")


def add_checksum(content: bytes) -> bytes:
    """Insert the checksum line into JSON that begins with a brace and a line feed."""
    digest = hashlib.sha256(content).hexdigest().encode()
    return _OPENING + b' "checksum": "' + digest + b'",\n' + content.removeprefix(_OPENING)


def load_checksummed(content: bytes, kind: type[_Record], version: int, *, what: str, remedy: str) -> _Record:
    """Decode the output of ``dump_checksummed``; the arguments are those of ``decode_versioned``.

    Raises:
        FormatError: The bytes are intact, but the record has another version.
        DECODE_ERRORS: A byte was changed, or the bytes are not such a record.
    """
    found = _CHECKSUM_LINE.match(content)
    digest = hashlib.sha256(_OPENING)
    if found:
        digest.update(memoryview(content)[found.end() :])
    if not found or digest.hexdigest().encode() != found[1]:
        raise msgspec.ValidationError("its checksum does not match")
    return decode_versioned(content, kind, version, what=what, remedy=remedy)
