"""The files of CIFAR as published: in a folder, in the folder above it, or in the tar.gz they come in.

The one rule: nothing is extracted. The few members that count are read by exact name, into memory, and all of them must
be there.
"""

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsmix.data.errors import LsmixError, SourceError

__all__ = ["CifarFiles"]

_MAX_FILE_BYTES = 256 << 20  # the largest published one, train of CIFAR-100, has 156 MB
_MAX_ARCHIVE_BYTES = 1 << 30  # unpacked; the published ones have 186 MB


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
            with _open_archive(path) as archive:
                return any(_plain(member.name).split("/")[0] == self.folder for member in archive)
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
        with _open_archive(path) as archive:
            for member in archive:
                folder, _, name = _plain(member.name).partition("/")
                if folder != self.folder or name not in self.names:
                    continue
                label = f"{name!r} in {str(path)!r}"
                if not member.isreg() or member.issparse() or name in seen:
                    raise SourceError(
                        f"{label} is no plain file, or is there twice. Do not use it, fetch the original."
                    )
                seen.add(name)
                _check_size(label, member.size)
                file = archive.extractfile(member)
                yield name, label, file.read() if file else b""
        missing = [name for name in self.names if name not in seen]
        if missing:
            raise SourceError(
                f"{str(path)!r} is not a whole {self.folder}: {', '.join(map(repr, missing))} missing. "
                "Fetch the data set again, or check the path."
            )


def _check_size(label: str, size: int) -> None:
    if size > _MAX_FILE_BYTES:
        raise SourceError(f"{label} has {size} bytes; a batch of CIFAR has at most {_MAX_FILE_BYTES}. Wrong file?")


class _Bounded(io.RawIOBase):
    """A stream that refuses to yield more than a data set's worth, whatever an archive's headers claim."""

    def __init__(self, stream: Any, name: str) -> None:
        self._stream = stream
        self._name = name
        self._left = _MAX_ARCHIVE_BYTES

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        block: bytes = self._stream.read(min(size, self._left + 1) if size >= 0 else self._left + 1)
        self._left -= len(block)
        if self._left < 0:
            raise SourceError(
                f"{self._name} unpacks to more than {_MAX_ARCHIVE_BYTES} bytes; CIFAR does not. Fetch the original."
            )
        return block


@contextmanager
def _open_archive(path: Path) -> Iterator[tarfile.TarFile]:
    """Open a tar or tar.gz as a stream; whatever is wrong with it becomes a SourceError."""
    with ExitStack() as stack:
        try:
            raw = stack.enter_context(path.open("rb"))
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream = stack.enter_context(gzip.GzipFile(fileobj=raw)) if packed else raw
            bounded = _Bounded(stream, repr(str(path)))
            yield stack.enter_context(tarfile.open(fileobj=bounded, mode="r|"))
        except LsmixError:
            raise
        # RecursionError: of long names without end, which tarfile reads by calling itself.
        except (tarfile.TarError, OSError, EOFError, ValueError, LookupError, RecursionError, zlib.error) as error:
            raise SourceError(f"{str(path)!r} is damaged, cut short or no tar.gz ({error}). Fetch it again.") from error


def _plain(member_name: str) -> str:
    return member_name.removeprefix("./")
