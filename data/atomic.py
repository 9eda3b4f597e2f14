"""Atomic and durable writes, checksums of files, and JSON that carries its version and checksum."""

import contextlib
import fcntl
import glob
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final, TypeVar

import msgspec

from lsmix.data.errors import FormatError, RecipeError

__all__ = [
    "DECODE_ERRORS",
    "atomic_path",
    "check_replaceable",
    "check_tensor_header",
    "checksummed_json",
    "decode_versioned",
    "fsync_folder",
    "fsync_tree",
    "is_as_written",
    "is_broken",
    "is_file_at",
    "read_small",
    "remove_stale",
    "remove_stale_parts",
    "seal",
    "sha256_file",
    "write_atomic",
]

_BLOCK_BYTES = 1 << 20
_PART = ".part"  # ends the name of a file being written
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISLNK, "a link"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
)


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
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "no regular file")
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


def remove_stale_parts(path: Path) -> None:
    """Remove what writers of the file at ``path`` left beside it that hold no lock on that, as killed ones do not."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*{_PART}"):
        with contextlib.suppress(BlockingIOError, FileNotFoundError), part.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink(missing_ok=True)


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


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def is_file_at(path: Path, stream: IO[bytes]) -> bool:
    """Tell whether ``path`` still names the open file ``stream``, which others may rename or remove at any time."""
    try:
        return os.path.samestat(path.stat(), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False


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
_SEAL = re.compile(rb'\{\n "checksum": "([0-9a-f]{64})",\n')


def checksummed_json(record: msgspec.Struct) -> bytes:
    """Return a record as JSON, its fields sorted and one a line, below a checksum of these bytes."""
    return seal(_plain_json(record))


def seal(content: bytes) -> bytes:
    """Put the checksum's line into JSON that begins with a brace and a line feed."""
    digest = hashlib.sha256(content).hexdigest().encode()
    return _OPENING + b' "checksum": "' + digest + b'",\n' + content.removeprefix(_OPENING)


def is_broken(content: bytes) -> bool:
    """Tell whether JSON has a checksum that does not fit; so it can be told from damage what another version wrote."""
    found = _SEAL.match(content)
    if not found:
        return False
    digest = hashlib.sha256(_OPENING)
    digest.update(memoryview(content)[found.end() :])
    return digest.hexdigest().encode() != found[1]


def is_as_written(content: bytes, record: msgspec.Struct) -> bool:
    """Tell whether JSON, decoded as ``record``, has every byte that it was written with."""
    return not is_broken(content) if _SEAL.match(content) else content == _plain_json(record)


def _plain_json(record: msgspec.Struct) -> bytes:
    return msgspec.json.format(msgspec.json.encode(record, order="sorted"), indent=1) + b"\n"
