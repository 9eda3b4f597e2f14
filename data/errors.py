"""The errors of lsmix with their exit codes, and text for messages: sizes, durations, escapes."""

import errno
import re
from typing import ClassVar, Final

__all__ = [
    "CorruptError",
    "DeviceMemoryError",
    "DiskSpaceError",
    "DivergedError",
    "DownloadError",
    "FormatError",
    "LockedError",
    "LsmixError",
    "MissingError",
    "PartialError",
    "RecipeError",
    "SourceError",
    "StaleError",
    "SystemLimitError",
    "escape_json",
    "escape_terminal",
    "format_bytes",
    "format_count",
    "format_duration",
    "printable_lines",
    "printable_words",
    "system_error",
    "unreadable",
]


class LsmixError(Exception):
    """Base of all errors that lsmix raises on purpose."""

    exit_code: ClassVar[int] = 1


class RecipeError(LsmixError, ValueError):
    """A recipe, an option or an argument is wrong."""


class MissingError(LsmixError, FileNotFoundError):
    """A path or an artifact is not there."""


class SourceError(LsmixError, ValueError):
    """A published data set cannot be read as what it claims to be."""


class DownloadError(LsmixError, OSError):
    """A file cannot be fetched, or what came is not the file that was wanted."""


class FormatError(LsmixError, ValueError):
    """An artifact is of a kind or a format version that this version does not read."""


class DiskSpaceError(LsmixError, OSError):
    """The result would not fit on the disk."""


class SystemLimitError(LsmixError, OSError):
    """The system refuses to read a file: too many are open, memory is short, or permission is missing."""


class DeviceMemoryError(MemoryError, LsmixError):  # in this order, or it does not come back from a Dask worker
    """The work does not fit into the memory of the device that it is done on."""


class DivergedError(LsmixError, ArithmeticError):
    """Training left the finite numbers."""


class StaleError(LsmixError):
    """Something that had to be up to date is not."""

    exit_code = 3


class LockedError(LsmixError):
    """Another run works on the same artifact."""

    exit_code = 4


class CorruptError(LsmixError, ValueError):
    """Bytes differ from their checksum, or are gone."""

    exit_code = 5


class PartialError(LsmixError):
    """Some shards failed; the rest is done and kept."""

    exit_code = 6


_ADVICE: Final = {
    errno.EMFILE: "Raise the limit of open files ('ulimit -n 4096'), or use fewer worker processes.",
    errno.ENFILE: "Close other programs, or raise the system's limit of open files (fs.file-max).",
    errno.ENOMEM: "Use fewer worker processes, or raise the limits of memory ('ulimit -v') and of maps (vm.max_map_count).",
    errno.EACCES: "Ask its owner to let you read it, or change its permissions ('chmod -R u+rX').",
    errno.EPERM: "Ask its owner to let you use it.",
    errno.ENOSPC: "Free some space on this disk.",
    errno.EDQUOT: "Free some space within your quota.",
    errno.EROFS: "Choose a folder on another disk.",
    errno.EIO: "The disk failed: check it, or copy the files from elsewhere.",
    errno.ESTALE: "The network file system lost the file: try again, or mount it again.",
}


def system_error(error: OSError, where: str = "") -> str:
    """Return what the system refused, and what to do about it; ``where`` names the file if the error does not."""
    place = where or error.filename
    said = f"{error.strerror or error}{f': {place!r}' if place else ''}."
    return f"{said} {_ADVICE[error.errno]}" if error.errno in _ADVICE else said


def unreadable(where: str, error: OSError) -> LsmixError:
    """Return the error to raise because a listed file cannot be opened or mapped: damage only if it is not there."""
    if error.errno in _ADVICE:
        return SystemLimitError(system_error(error, where))
    return CorruptError(f"{where!r} cannot be read: {error.strerror or error}. Fetch or make the artifact again.")


def escape_terminal(text: str) -> str:
    r"""Return a line in which every letter that does not print, a line break included, is shown as its escape.

    Example:
        >>> print(escape_terminal("a cat\x1b[2J\n\u202e"))
        a cat\x1b[2J\n\u202e
    """
    return text if text.isprintable() else "".join(map(_shown, text))


def printable_lines(text: str) -> str:
    r"""Return a text in which every character that does not print, but for its newlines, is shown as its escape.

    Example:
        >>> print(printable_lines("one\ntwo\x1b"))
        one
        two\x1b
    """
    return "\n".join(map(escape_terminal, text.split("\n")))


def printable_words(text: str) -> str:
    r"""Return a text on one line: blanks and line breaks become single spaces, and what does not print its escape.

    Example:
        >>> print(printable_words(" a\n cat\x1b[2J "))
        a cat\x1b[2J
    """
    return escape_terminal(" ".join(text.split()))


def escape_json(text: str, *, ascii_only: bool = False) -> str:
    r"""Return the same JSON, with letters that do not print as their escapes; line breaks between values stay.

    ``ascii_only`` escapes all others beyond ASCII, too, for terminals that cannot show them.

    Example:
        >>> print(escape_json('"a \x9b"'))
        "a \u009b"
    """

    def shown(found: re.Match[str]) -> str:
        return found[0] if found[0].isprintable() and not ascii_only else _escaped(found[0])

    return re.sub(r"[^\n -~]", shown, text)


def _shown(letter: str) -> str:
    return letter if letter.isprintable() else ascii(letter)[1:-1]


def _escaped(letter: str) -> str:
    units = letter.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))


def format_bytes(count: int) -> str:
    """Return a number of bytes for reading.

    Example:
        >>> format_bytes(999), format_bytes(153_600_000)
        ('999 B', '153.6 MB')
    """
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.95:
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def format_count(count: int, noun: str) -> str:
    """Return a number of things for reading.

    Example:
        >>> format_count(1, "file"), format_count(35_000, "image")
        ('1 file', '35,000 images')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def format_duration(seconds: float) -> str:
    """Return a time span for reading.

    Example:
        >>> format_duration(0.42), format_duration(75), format_duration(7_260)
        ('0.4 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
