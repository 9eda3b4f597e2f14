"""Uniform access to the files in a folder, zip or tar, by their names with slashes. Archives are never extracted.

All members of an archive are checked before the first one is read: names, types, sizes, and compression ratios.
"""

import gzip
import os
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol

from lsmix.data.errors import SourceError, format_bytes
from lsmix.data.readers.source_images import ImageError, check_file, has_ending, most_unpacked, refused_if_damaged

__all__ = [
    "ARCHIVE_ERRORS",
    "MAX_IMAGE_BYTES",
    "TREE_ENDINGS",
    "FileTree",
    "TarTree",
    "check_packing",
    "is_hidden",
    "open_published",
    "open_tree",
    "part_order",
    "peek_names",
    "published_base",
    "walk",
]

MAX_IMAGE_BYTES = 64 << 20  # per image file
TREE_ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz")
_MAX_DEPTH = 32
_MAX_FILES = 10_000_000  # in a folder, because each needs memory; ImageNet-21k has 14 million
_MAX_MEMBERS = 1_000_000  # in an archive; TinyImageNet has 120,609
_MAX_TAR_BYTES = 64 << 30  # decompressed, in a temporary file
_MAX_ZIP_BYTES = 8 << 30  # of all members, decompressed
_SPARE_BYTES = 64 << 20  # any compression ratio is allowed up to this size; text reaches about 10:1, photographs less
_PIECE_BYTES = 1 << 20
_PEEK_BYTES = 16 << 20  # content of members that ``peek_names`` skips to find more names
_PEEK_MEMBERS = 64
_MAX_HEADER_BYTES = 1 << 16  # per member of a tar, including the headers for a long name
# Exceptions of zipfile, tarfile and zlib for damaged archives, encrypted members and unknown compression methods.
ARCHIVE_ERRORS = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError, RuntimeError, ValueError, LookupError, MemoryError,
    OverflowError
)  # fmt: skip


class FileTree(Protocol):
    """Files by their names with slashes. All methods may be called from several threads."""

    def names(self) -> list[str]:
        """Return the names of all files, sorted part by part; empty folders are included and end with a slash."""

    def read(self, name: str, max_bytes: int = MAX_IMAGE_BYTES) -> bytes:
        """Return a file's content; SourceError if it is too large or not regular, OSError if it cannot be opened."""

    def label(self, name: str) -> str:
        """Return how messages refer to a file."""


@contextmanager
def open_tree(path: Path) -> Iterator[FileTree]:
    """Open a folder, a zip or a tar.

    Raises:
        SourceError: The path is none of these, or an archive is damaged or contains invalid members.
    """
    with ExitStack() as stack:
        if path.is_dir():
            yield _Folder(path)
        elif has_ending(path, ".zip"):
            yield _ZipTree(path, stack)
        elif has_ending(path, TREE_ENDINGS):
            yield TarTree(path, stack)
        else:
            raise SourceError(f"{str(path)!r} is not a folder, zip or tar of images. Check the path.")


def is_hidden(name: str) -> bool:
    """Return whether a name from ``walk``, or a folder in it, is hidden or was created by macOS."""
    return name.startswith((".", "__MACOSX/")) or "/." in name


def walk(base: Path, *, dangling: bool = True) -> Iterator[str]:
    """Yield the names of all files below a folder, unsorted.

    Empty folders and hidden folders, whose content is skipped, are yielded with a trailing slash. Links to missing
    files are omitted if ``dangling`` is False. Links to folders are followed.

    Raises:
        SourceError: A link leads to a folder that contains it, or there are too many files or levels.
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
                            raise SourceError(f"{entry.path!r} is a link to a folder that contains it. Remove it.")
                    if name.count("/") >= _MAX_DEPTH:
                        raise SourceError(f"{entry.path!r} is more than {_MAX_DEPTH} folders deep. Check the path.")
                    pending.append((entry.path, f"{name}/", inside))
        if empty and prefix:
            yield prefix
        if count > _MAX_FILES:
            raise SourceError(f"{str(base)!r} contains more than {_MAX_FILES:,} files. Check the path.")


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # for example a link to itself, which causes an error with its name when it is read
        return False


class _Folder:
    def __init__(self, base: Path) -> None:
        self._base = base

    def names(self) -> list[str]:
        return sorted(walk(self._base), key=part_order)

    def read(self, name: str, max_bytes: int = MAX_IMAGE_BYTES) -> bytes:
        file = self._base / name
        check_file(file)
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size  # because Python allocates as many bytes as requested
            content = stream.read(min(size, max_bytes) + 1)
        if len(content) > max_bytes:
            raise _too_big(self.label(name), max_bytes)
        return content

    def label(self, name: str) -> str:
        return repr(str(self._base / name))


class _Subtree:
    """The files of a tree below a folder, by their names relative to it."""

    def __init__(self, tree: FileTree, folder: str) -> None:
        self._tree = tree
        self._prefix = f"{folder}/"

    def names(self) -> list[str]:
        return [name.removeprefix(self._prefix) for name in self._tree.names() if name.startswith(self._prefix)]

    def read(self, name: str, max_bytes: int = MAX_IMAGE_BYTES) -> bytes:
        return self._tree.read(self._prefix + name, max_bytes)

    def label(self, name: str) -> str:
        return self._tree.label(self._prefix + name)


def published_base(path: Path, folder: str) -> Path:
    """Return the folder with the files of a published data set: ``path/folder`` if it exists, else ``path``."""
    return path / folder if (path / folder).is_dir() else path


@contextmanager
def open_published(path: Path, folder: str) -> Iterator[FileTree]:
    """Open a published data set, given its folder, its parent folder, or its archive.

    Raises:
        SourceError: As for ``open_tree``.
    """
    with open_tree(published_base(path, folder)) as tree:
        yield _Subtree(tree, folder) if path.is_file() else tree


class _Archive:
    """The members of an archive by name, after they were checked."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._members: dict[str, Any] = {}

    def names(self) -> list[str]:
        return sorted(self._members, key=part_order)

    def label(self, name: str) -> str:
        return f"{name!r} in {str(self._path)!r}"

    def _add(self, name: str, member: object, *, plain: bool) -> None:
        problem = ""
        if not name:  # zipfile returns "" for names that begin with NUL
            problem = "has no name"
        elif name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts:
            problem = "has a path outside of the archive"
        elif not plain:
            problem = "is a link or device, not a regular file"
        elif name in self._members:
            problem = "occurs twice"
        if problem:
            raise SourceError(f"{ascii(name)[:200]} in {str(self._path)!r} {problem}. Download the original archive.")
        self._members[name] = member


class _ZipTree(_Archive):
    def __init__(self, path: Path, stack: ExitStack) -> None:
        super().__init__(path)
        with refused_if_damaged(repr(str(path)), "a zip archive", *ARCHIVE_ERRORS):
            self._archive = stack.enter_context(zipfile.ZipFile(path))
        listed, packed = self._archive.infolist(), path.stat().st_size
        unpacked = sum(member.file_size for member in listed)
        if len(listed) > _MAX_MEMBERS or unpacked > min(_MAX_ZIP_BYTES, most_unpacked(packed, _SPARE_BYTES)):
            raise SourceError(
                f"{str(path)!r} would unpack from {format_bytes(packed)} to {format_bytes(unpacked)} in "
                f"{len(listed):,} files, which is not plausible for a data set. Download the original archive."
            )
        for member in listed:
            kind = stat.S_IFMT(member.external_attr >> 16)  # 0 if the archive is from a system without file types
            if not member.filename.endswith("/") or kind not in (0, stat.S_IFDIR):
                self._add(member.filename, member, plain=kind in (0, stat.S_IFREG))

    def read(self, name: str, max_bytes: int = MAX_IMAGE_BYTES) -> bytes:
        member = self._members[name]
        check_packing(member, self.label(name))
        if member.file_size > max_bytes:
            raise _too_big(self.label(name), max_bytes)
        try:
            # With an explicit size: read() would decompress all data before it compares the sizes.
            with self._archive.open(member) as file:
                return file.read(member.file_size)
        except ARCHIVE_ERRORS as error:
            raise SourceError(f"{self.label(name)} is damaged ({error}). Download the archive again.") from error


def check_packing(member: zipfile.ZipInfo, where: str) -> None:
    """Check that a member of a zip is not encrypted, and is stored or compressed with deflate.

    Raises:
        SourceError: The check failed; the message begins with ``where``.
    """
    if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        how = "is encrypted" if member.flag_bits & 1 else f"uses compression method {member.compress_type}"
        raise SourceError(f"{where} {how}; only members that are stored or deflated are supported. Zip it again.")


class TarTree(_Archive):
    """The files of a tar, read at their offsets. A compressed tar is decompressed to an unnamed temporary file."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        super().__init__(path)
        with refused_if_damaged(repr(str(path)), "a tar archive", *ARCHIVE_ERRORS):
            self._file: IO[bytes] = stack.enter_context(path.open("rb"))
            if _is_gzip(self._file):
                self._file = _unpacked(path, self._file, stack)
            end = os.fstat(self._file.fileno()).st_size
            for member in _tar_members(self._file):
                if member.offset_data + member.size > end:
                    raise EOFError(f"{ascii(member.name)[:100]} extends beyond the end of the file")
                if not member.isdir():
                    self._add(member.name, (member.offset_data, member.size), plain=member.isreg())

    def in_order(self) -> list[str]:
        """Return the names in the order of the archive."""
        return list(self._members)

    def read(self, name: str, max_bytes: int = MAX_IMAGE_BYTES) -> bytes:
        """Return the content of a file."""
        begin, size = self._members[name]
        if size > max_bytes:
            raise _too_big(self.label(name), max_bytes)
        return os.pread(self._file.fileno(), size, begin)


class _Headers:
    """A file object for tarfile that limits how much the headers of each member may read, whatever size they claim."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell
        self.left = _MAX_HEADER_BYTES

    def read(self, size: int) -> bytes:
        self.left -= size
        if size < 0 or self.left < 0:
            raise tarfile.HeaderError(f"the headers of a member have more than {_MAX_HEADER_BYTES:,} bytes")
        return self._file.read(size)


def _tar_members(file: IO[bytes] | gzip.GzipFile) -> Iterator[tarfile.TarInfo]:
    """Yield each member of a tar."""
    headers: Any = _Headers(file)
    archive = tarfile.open(fileobj=headers, mode="r:", errors="surrogateescape")  # noqa: SIM115 - the caller closes it
    for _ in range(_MAX_MEMBERS):
        headers.left = _MAX_HEADER_BYTES
        if (member := archive.next()) is None:
            break
        archive.members = []  # type: ignore[attr-defined]  # not in typeshed; otherwise it keeps all headers in memory
        if member.size < 0 or member.issparse():
            raise tarfile.HeaderError(f"{ascii(member.name)[:100]} is sparse or has a negative size")
        member.name = member.name.removeprefix("./")
        yield member
    else:
        raise tarfile.HeaderError(f"it has more than {_MAX_MEMBERS:,} members")
    file.seek(archive.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile also stops silently at a damaged header
        raise tarfile.HeaderError("it is truncated or has a damaged header")


def peek_names(path: Path) -> list[str]:
    """Return the unchecked names of all members of a zip, or of the first members of a tar; none for other files."""
    names: list[str] = []
    with suppress(*ARCHIVE_ERRORS), path.open("rb") as raw:
        if has_ending(path, ".zip"):
            return zipfile.ZipFile(raw).namelist()
        left = _PEEK_BYTES
        for member in _tar_members(gzip.GzipFile(fileobj=raw) if _is_gzip(raw) else raw):
            left -= member.size
            names.append(member.name)
            if left < 0 or len(names) >= _PEEK_MEMBERS:
                break
    return names


def _is_gzip(file: IO[bytes]) -> bool:
    start = file.read(2)
    file.seek(0)
    return start == b"\x1f\x8b"


def _unpacked(path: Path, packed: IO[bytes], stack: ExitStack) -> IO[bytes]:
    most = min(_MAX_TAR_BYTES, most_unpacked(path.stat().st_size, _SPARE_BYTES))
    file = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  # closed by the stack
    with gzip.GzipFile(fileobj=packed) as stream:
        while piece := stream.read(_PIECE_BYTES):
            if file.tell() + len(piece) > most:
                raise SourceError(
                    f"{str(path)!r} unpacks to more than {format_bytes(most)}, which is not plausible for a data set. "
                    "Download the original archive."
                )
            file.write(piece)
    file.flush()
    file.seek(0)
    return file


def part_order(name: str) -> str:
    """Return the sort key of a name that sorts names part by part, like a walk through sorted folders."""
    return name.replace("/", "\0")


def _too_big(label: str, max_bytes: int) -> ImageError:
    return ImageError(f"is too large; at most {format_bytes(max_bytes)} are expected", "Remove it.", label)
