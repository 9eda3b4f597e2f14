"""Members of a zip archive that came from a stranger, read in memory.

The whole list of members is checked before the first is read (names, kinds, sizes, how far they unpack), and
nothing is extracted.
"""

import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from types import TracebackType

from lsmix.data.errors import SourceError
from lsmix.data.readers.source_images import ImageError

__all__ = ["ZIP_ERRORS", "ZipMembers", "check_packing"]

_MAX_MEMBERS = 1_000_000  # TinyImageNet has 120,609
_MAX_BYTES = 8 << 30  # of all members, unpacked
_RATIO = 100  # an archive that unpacks to more than this many times its size …
_RATIO_BYTES = 64 << 20  # … and to more than this is a bomb; photographs don't shrink, texts by ten times or so

# What zipfile raises on damaged archives, encrypted members, and methods and versions that it does not know.
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError, LookupError)


def check_packing(member: zipfile.ZipInfo, where: str) -> None:
    """Refuse a member that is encrypted or packed by another method than deflate, as no data set's is.

    Raises:
        SourceError: it is; ``where`` begins the message.
    """
    if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        how = "is encrypted" if member.flag_bits & 1 else f"is packed by method {member.compress_type}"
        raise SourceError(f"{where} {how}; only members that are stored or deflated are read. Pack it again.")


class ZipMembers:
    """The plain files of an archive by name; a context manager.

    Raises:
        SourceError: it is damaged, or holds what no published archive does.
    """

    def __init__(self, path: Path) -> None:
        self._name = repr(str(path))
        try:
            self._archive = zipfile.ZipFile(path)
        except ZIP_ERRORS as error:
            raise SourceError(f"{self._name} is damaged or no zip archive ({error}). Fetch it again.") from error
        try:
            self._members = self._checked(path.stat().st_size)
        except BaseException:
            self._archive.close()
            raise

    def __enter__(self) -> "ZipMembers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._archive.close()

    def names(self) -> list[str]:
        """Return the names of all plain files, in the archive's order."""
        return list(self._members)

    def read(self, name: str, max_bytes: int) -> bytes:
        """Return the content of one file.

        Raises:
            SourceError: it has more than ``max_bytes``, or is damaged.
        """
        member = self._members[name]
        check_packing(member, self.label(name))
        if member.file_size > max_bytes:
            raise ImageError(
                f"has more than {max_bytes} bytes, as no image of a data set has", "Remove it.", self.label(name)
            )
        try:
            # By its size: read to the end, zipfile would unpack all that is packed before it compares the sizes.
            with self._archive.open(member) as file:
                return file.read(member.file_size)
        except ZIP_ERRORS as error:
            raise SourceError(f"{self.label(name)} is damaged ({error}). Fetch the archive again.") from error

    def label(self, name: str) -> str:
        """Return what to call a file in messages."""
        return f"{name!r} in {self._name}"

    def _checked(self, size: int) -> dict[str, zipfile.ZipInfo]:
        members: dict[str, zipfile.ZipInfo] = {}
        listed = self._archive.infolist()
        unpacked = sum(member.file_size for member in listed)
        if len(listed) > _MAX_MEMBERS or unpacked > min(_MAX_BYTES, max(_RATIO_BYTES, _RATIO * size)):
            raise SourceError(
                f"{self._name} would unpack from {size} to {unpacked} bytes in {len(listed)} files, as no published data "
                "set does. Do not use it, fetch the original."
            )
        for member in listed:
            kind = stat.S_IFMT(member.external_attr >> 16)  # 0 where the archive comes from a system without kinds
            parts = PurePosixPath(member.filename).parts
            if member.filename.startswith("/") or "\\" in member.filename or ".." in parts:
                raise self._refusal(member, "a name that leads out of the archive")
            if not member.filename:  # as zipfile gives one that begins with NUL
                raise self._refusal(member, "a file without a name")
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise self._refusal(member, "a link or device, no plain file")
            if member.filename in members:
                raise self._refusal(member, "there twice")
            if not member.is_dir():
                members[member.filename] = member
        return members

    def _refusal(self, member: zipfile.ZipInfo, what: str) -> SourceError:
        return SourceError(
            f"{ascii(member.filename)[:200]} in {self._name} is {what}. Do not use it, fetch the original."
        )
