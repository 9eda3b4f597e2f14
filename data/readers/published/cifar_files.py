"""The files of CIFAR as published: in a folder, in the folder above it, or in the tar.gz they come in.

Nothing is extracted. The few members that count are read by exact name, into memory, and all of them must
be there. The archive's headers are walked here, since tarfile reads long names and PAX headers as a whole, whatever size
they claim. They only matter for names of more than 100 characters, so they are passed over.
"""

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lsmix.data.errors import LsmixError, SourceError

__all__ = ["CifarFiles"]

_MAX_FILE_BYTES = 256 << 20  # the largest published one, train of CIFAR-100, has 156 MB
_MAX_ARCHIVE_BYTES = 1 << 30  # unpacked; the published ones have 186 MB
_MAX_MEMBERS = 10_000  # with headers of long names; the published ones have 9
_RATIO = 100  # an archive that unpacks to more than this many times its size …
_RATIO_BYTES = 64 << 20  # … and to more than this is a bomb: the published ones hardly shrink
_BLOCK_BYTES = 512  # of tar: a header, and what contents are filled up to
_PIECE_BYTES = 1 << 20
# What follows a header of one of these is a name or such, not a file; of types that are not known, it is a file's content.
_EXTENSIONS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


@dataclass(frozen=True, slots=True)
class CifarFiles:
    """Names of the files of one published form."""

    folder: str  # what the archive unpacks to
    archive: str  # its published name without ending, so that a damaged one is still known, and said to be damaged
    names: tuple[str, ...]
    telling: int = 1  # so many of the names tell that a folder is of this form: "train" and "test" alone tell little

    def recognise(self, path: Path) -> bool:
        """Tell whether a path looks like this form, whole or not."""
        if path.is_dir():
            return any(
                sum((base / name).is_file() for name in self.names) >= self.telling
                for base in (path, path / self.folder)
            )
        if not path.name.endswith((".tar.gz", ".tgz", ".tar")):
            return False
        try:
            with _open_archive(path) as stream:
                return any(_plain(member.name).split("/")[0] == self.folder for member in _members(stream))
        except SourceError:
            return self.folder in path.name or path.name.startswith(self.archive)

    def files(self, path: Path) -> list[Path]:
        """Return the files that count: the archive itself, or one for each of the names.

        Raises:
            SourceError: some are missing from the folder.
        """
        if path.is_file():
            return [path]
        base = path / self.folder if (path / self.folder).is_dir() else path
        missing = [name for name in self.names if not (base / name).is_file()]
        if missing:
            raise SourceError(
                f"{str(base)!r} is not a whole {self.folder}: {', '.join(map(repr, missing))} missing, expected "
                f"{', '.join(self.names)}. Fetch the data set again, or check the path."
            )
        return [base / name for name in self.names]

    def contents(self, path: Path) -> Iterator[tuple[str, str, bytes]]:
        """Yield (name, what to call it in messages, content) of every file, in no particular order.

        Raises:
            SourceError: some are missing, too big, damaged, or no plain files.
        """
        return self._from_archive(path) if path.is_file() else self._from_folder(path)

    def _from_folder(self, path: Path) -> Iterator[tuple[str, str, bytes]]:
        for file in self.files(path):
            _check_size(repr(str(file)), file.stat().st_size)
            yield file.name, repr(str(file)), file.read_bytes()

    def _from_archive(self, path: Path) -> Iterator[tuple[str, str, bytes]]:
        seen = set()
        with _open_archive(path) as stream:
            for member in _members(stream):
                folder, _, name = _plain(member.name).partition("/")
                if folder != self.folder or name not in self.names:
                    continue
                label = f"{name!r} in {str(path)!r}"
                if not member.isreg() or name in seen:
                    raise SourceError(
                        f"{label} is no plain file, or is there twice. Do not use it, fetch the original."
                    )
                seen.add(name)
                _check_size(label, member.size)
                yield name, label, stream.read(member.size)
        missing = [name for name in self.names if name not in seen]
        if missing:
            raise SourceError(
                f"{str(path)!r} is not a whole {self.folder}: {', '.join(map(repr, missing))} missing. "
                "Fetch the data set again, or check the path."
            )


def _check_size(label: str, size: int) -> None:
    if size > _MAX_FILE_BYTES:
        raise SourceError(f"{label} has {size} bytes; a batch of CIFAR has at most {_MAX_FILE_BYTES}. Wrong file?")


class _Stream:
    """Reads an archive from front to back, and refuses to yield more than a data set's worth, whatever its headers claim."""

    def __init__(self, stream: IO[bytes] | gzip.GzipFile, path: Path) -> None:
        self._stream = stream
        self._path = path
        self._most = min(_MAX_ARCHIVE_BYTES, max(_RATIO_BYTES, _RATIO * path.stat().st_size))
        self.position = 0

    def read(self, size: int) -> bytes:
        """Return exactly ``size`` bytes."""
        self._count(size)
        content = self._stream.read(size)
        if len(content) < size:
            raise EOFError(f"it ends {size - len(content)} bytes too early")
        return content

    def skip_to(self, position: int) -> None:
        """Read on to a position, without keeping what is read."""
        left = position - self.position
        self._count(left)
        while left:
            piece = self._stream.read(min(left, _PIECE_BYTES))
            if not piece:
                raise EOFError(f"it ends {left} bytes too early")
            left -= len(piece)

    def _count(self, size: int) -> None:
        self.position += size
        if self.position > self._most:
            raise SourceError(
                f"{str(self._path)!r} unpacks to more than {self._most} bytes; CIFAR does not. Fetch the original."
            )


def _members(stream: _Stream) -> Iterator[tarfile.TarInfo]:
    """Go through the headers of a tar; the content of a member may be read from the stream until the next is asked for."""
    for _ in range(_MAX_MEMBERS):
        block = stream.read(_BLOCK_BYTES)
        if not block.strip(b"\0"):
            return
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if member.size < 0 or member.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.HeaderError(f"{ascii(member.name)[:100]} has a size below 0, or holes")
        begin = stream.position
        if member.type not in _EXTENSIONS:
            yield member
        if member.isreg() or member.type in _EXTENSIONS or member.type not in tarfile.SUPPORTED_TYPES:
            stream.skip_to(begin + -(-member.size // _BLOCK_BYTES) * _BLOCK_BYTES)
    raise tarfile.HeaderError(f"it has more than {_MAX_MEMBERS} members")


@contextmanager
def _open_archive(path: Path) -> Iterator[_Stream]:
    """Open a tar or tar.gz; whatever is wrong with it becomes a SourceError."""
    with ExitStack() as stack:
        try:
            raw = stack.enter_context(path.open("rb"))
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream = stack.enter_context(gzip.GzipFile(fileobj=raw)) if packed else raw
            yield _Stream(stream, path)
        except LsmixError:
            raise
        except (tarfile.TarError, OSError, EOFError, ValueError, LookupError, zlib.error) as error:
            raise SourceError(f"{str(path)!r} is damaged, cut short or no tar.gz ({error}). Fetch it again.") from error


def _plain(member_name: str) -> str:
    return member_name.removeprefix("./")
