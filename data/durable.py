"""Writing files so that a crash never leaves a half-written one: write beside, flush to disk, rename.

The one rule: what a reader may look at appears under its final name only when all of its bytes are on the disk.
"""

import contextlib
import fcntl
import glob
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lsmix.data.errors import RecipeError

__all__ = [
    "check_replaceable",
    "durable_path",
    "fsync_folder",
    "fsync_tree",
    "is_file_at",
    "sha256_file",
    "sweep_dead_parts",
    "sweep_parts",
    "write_durably",
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
def durable_path(path: Path) -> Iterator[Path]:
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


def write_durably(path: Path, *pieces: bytes | memoryview) -> None:
    """Write ``pieces``, one behind the other, to ``path`` at once: beside it, flushed, then renamed over it."""
    with durable_path(path) as beside, beside.open("wb") as file:
        file.writelines(pieces)


def sweep_parts(folder: Path) -> None:
    """Remove what writers that were killed left beside their files, anywhere below ``folder``."""
    for path in folder.rglob(f".*{_PART}"):
        path.unlink(missing_ok=True)


def sweep_dead_parts(path: Path) -> None:
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
