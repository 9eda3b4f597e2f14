"""Files below a data set's folder, or in its zip or tar, by their names with slashes; archives are never extracted.

All members of an archive are checked before the first is read: names, kinds, sizes, and how far they unpack.
"""

import gzip
import os
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from lsmix.data.errors import SourceError
from lsmix.data.readers.source_images import ImageError, check_file
from lsmix.data.readers.zip_members import ZipMembers

__all__ = [
    "MAX_IMAGE_BYTES",
    "TREE_ENDINGS",
    "FileTree",
    "Subtree",
    "TarTree",
    "open_tree",
    "part_order",
    "peek_tar",
    "walk",
]

MAX_IMAGE_BYTES = 64 << 20  # of an image file
TREE_ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz")
_MOST_DEPTH = 32
_MOST_FILES = 10_000_000  # ImageNet-21k has 14 million; in a tar as in a folder each takes memory
_MOST_TAR_MEMBERS = 1_000_000
_MOST_TAR_BYTES = 64 << 30
_RATIO = 100  # a tar.gz that unpacks to more than this many times its size …
_RATIO_BYTES = 64 << 20  # … and to more than this is a bomb
_PIECE_BYTES = 1 << 20
_PEEK_BYTES = 16 << 20  # of members' contents that are passed over to see more names
_PEEK_MEMBERS = 64
_TAR_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError, LookupError, RecursionError, zlib.error)


class FileTree(Protocol):
    """Files by their names with slashes; all methods may be called from several threads."""

    def names(self) -> list[str]:
        """Return the names of all files, sorted part by part; a folder without files ends with a slash."""

    def read(self, name: str, max_bytes: int = MAX_IMAGE_BYTES) -> bytes:
        """Return the content of a file; SourceError if it is too big or no file, OSError if it cannot be opened."""

    def label(self, name: str) -> str:
        """Return what to call a file in messages."""


@contextmanager
def open_tree(path: Path) -> Iterator[FileTree]:
    """Open a folder, a zip or a tar.

    Raises:
        SourceError: it is none, or an archive is damaged or holds what no data set does.
    """
    with ExitStack() as stack:
        if path.is_dir():
            yield _Folder(path)
        elif path.suffix == ".zip":
            yield _Zip(stack.enter_context(ZipMembers(path)))
        elif path.name.endswith(TREE_ENDINGS):
            yield TarTree(path, stack)
        else:
            raise SourceError(f"{str(path)!r} is no folder, zip or tar of images. Check the path.")


def walk(base: Path, *, dangling: bool = True) -> Iterator[str]:
    """Yield the names of all files below a folder, in no order; empty and hidden folders end with a slash.

    Links to missing files are left out unless ``dangling``. Links to folders are followed, but never into a folder that they are in.
    """
    pending: list[tuple[str, str, frozenset[tuple[int, int]]]] = [(str(base), "", frozenset())]
    count = 0
    while pending:
        folder, prefix, above = pending.pop()
        empty = True
        with os.scandir(folder) as entries:
            for entry in entries:
                empty = False
                count += 1
                name = prefix + entry.name
                if not _is_dir(entry):
                    if dangling or not entry.is_symlink() or Path(entry.path).exists():
                        yield name
                elif entry.name.startswith("."):
                    yield f"{name}/"
                else:
                    inside = above
                    if entry.is_symlink():
                        found = entry.stat()
                        inside = above | {(found.st_dev, found.st_ino)}
                        if len(inside) == len(above) or base.resolve().is_relative_to(Path(entry.path).resolve()):
                            raise SourceError(f"{entry.path!r} is a link to a folder that it is in. Remove it.")
                    if name.count("/") >= _MOST_DEPTH:
                        raise SourceError(f"{entry.path!r} is more than {_MOST_DEPTH} folders deep. Check the path.")
                    pending.append((entry.path, f"{name}/", inside))
        if empty and prefix:
            yield prefix
        if count > _MOST_FILES:
            raise SourceError(f"{str(base)!r} holds more than {_MOST_FILES:,} files. Check the path.")


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # such as a link to itself, which is refused by name when it is read
        return False


class _Folder:
    def __init__(self, base: Path) -> None:
        self._base = base

    def names(self) -> list[str]:
        return _sorted(walk(self._base))

    def read(self, name: str, max_bytes: int = MAX_IMAGE_BYTES) -> bytes:
        file = self._base / name
        check_file(file)
        with file.open("rb") as stream:
            return _bounded(stream.read(max_bytes + 1), self.label(name), max_bytes)

    def label(self, name: str) -> str:
        return repr(str(self._base / name))


class Subtree:
    """The files of a tree below a folder, by their names from there."""

    def __init__(self, tree: FileTree, folder: str) -> None:
        self._tree = tree
        self._prefix = f"{folder}/"

    def names(self) -> list[str]:
        """Return the names of all files below the folder."""
        return [name.removeprefix(self._prefix) for name in self._tree.names() if name.startswith(self._prefix)]

    def read(self, name: str, max_bytes: int = MAX_IMAGE_BYTES) -> bytes:
        """Return the content of a file."""
        return self._tree.read(self._prefix + name, max_bytes)

    def label(self, name: str) -> str:
        """Return what to call a file in messages."""
        return self._tree.label(self._prefix + name)


class _Zip:
    def __init__(self, members: ZipMembers) -> None:
        self._members = members
        self.label = members.label

    def names(self) -> list[str]:
        return _sorted(self._members.names())

    def read(self, name: str, max_bytes: int = MAX_IMAGE_BYTES) -> bytes:
        return self._members.read(name, max_bytes)


class TarTree:
    """Members by their places in the tar; one that is compressed is unpacked to an unnamed temporary file."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._path = path
        self._members: dict[str, tuple[int, int]] = {}  # offset and size by name
        try:
            self._file: IO[bytes] = stack.enter_context(path.open("rb"))
            packed = self._file.read(2) == b"\x1f\x8b"
            self._file.seek(0)
            if packed:
                self._file = _unpacked(path, self._file, stack)
            self._index(self._file)
        except SourceError:
            raise
        except _TAR_ERRORS as error:
            raise SourceError(f"{str(path)!r} is damaged, cut short or no tar ({error}). Fetch it again.") from error

    def names(self) -> list[str]:
        """Return the names of all files, sorted part by part."""
        return _sorted(self._members)

    def in_order(self) -> list[str]:
        """Return the names in the order of the archive."""
        return list(self._members)

    def read(self, name: str, max_bytes: int = MAX_IMAGE_BYTES) -> bytes:
        """Return the content of a file."""
        offset, size = self._members[name]
        return _bounded(os.pread(self._file.fileno(), min(size, max_bytes + 1), offset), self.label(name), max_bytes)

    def label(self, name: str) -> str:
        """Return what to call a file in messages."""
        return f"{name!r} in {str(self._path)!r}"

    def _index(self, file: IO[bytes]) -> None:
        end = os.fstat(file.fileno()).st_size
        with tarfile.open(fileobj=file, mode="r:", errorlevel=0) as archive:
            for count, member in enumerate(archive):
                name = member.name.removeprefix("./")
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise self._refusal(name, "a link, a device or a file with holes, no plain file")
                if name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts or not name:
                    raise self._refusal(name, "a name that leads out of the archive")
                if name in self._members:
                    raise self._refusal(name, "there twice")
                if not 0 <= member.size <= end - member.offset_data or count >= _MOST_TAR_MEMBERS:
                    raise self._refusal(name, "longer than the archive, or one of too many")
                self._members[name] = (member.offset_data, member.size)
                archive.members = []  # type: ignore[attr-defined]  # undocumented; or each would be kept

    def _refusal(self, name: str, what: str) -> SourceError:
        return SourceError(f"{ascii(name)[:200]} in {str(self._path)!r} is {what}. Do not use it, fetch the original.")


def peek_tar(path: Path) -> list[str]:
    """Return the names of the first members of a tar, as far as that is quick; none of a file that is no tar."""
    names: list[str] = []
    with suppress(*_TAR_ERRORS), tarfile.open(path, "r|*") as archive:
        left = _PEEK_BYTES
        for member in archive:
            left -= member.size
            names.append(member.name)
            if left < 0 or len(names) >= _PEEK_MEMBERS:
                break
    return names


def _unpacked(path: Path, packed: IO[bytes], stack: ExitStack) -> IO[bytes]:
    most = min(_MOST_TAR_BYTES, max(_RATIO_BYTES, _RATIO * path.stat().st_size))
    file = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  # closed by the stack
    with gzip.GzipFile(fileobj=packed) as stream:
        while piece := stream.read(_PIECE_BYTES):
            if file.tell() + len(piece) > most:
                raise SourceError(
                    f"{str(path)!r} unpacks to more than {most} bytes, as no data set does. Do not use it."
                )
            file.write(piece)
    file.flush()
    file.seek(0)
    return file


def part_order(name: str) -> str:
    """Return the key by which names are sorted part by part, as in a walk through sorted folders."""
    return name.replace("/", "\0")


def _sorted(names: "Iterator[str] | list[str] | dict[str, tuple[int, int]]") -> list[str]:
    return sorted(names, key=part_order)


def _bounded(content: bytes, label: str, max_bytes: int) -> bytes:
    if len(content) > max_bytes:
        raise ImageError(f"has more than {max_bytes} bytes, as no image of a data set has", "Remove it.", label)
    return content
