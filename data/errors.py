"""Exceptions of lsmix with their exit codes, and functions that format sizes, durations and escapes for messages."""

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
    """A path or an artifact does not exist."""


class SourceError(LsmixError, ValueError):
    """A published data set does not have the expected format."""


class DownloadError(LsmixError, OSError):
    """A file cannot be downloaded, or the downloaded file is not the expected one."""


class FormatError(LsmixError, ValueError):
    """This version of lsmix does not support an artifact's kind or format version."""


class DiskSpaceError(LsmixError, OSError):
    """The disk does not have enough free space for the result."""


class SystemLimitError(LsmixError, OSError):
    """The system refuses to read a file: too many open files, not enough memory, or no permission."""


class DeviceMemoryError(MemoryError, LsmixError):  # in another order it cannot be unpickled from a Dask worker
    """The device does not have enough memory for the work."""


class DivergedError(LsmixError, ArithmeticError):
    """Training diverged to values that are not finite."""


class StaleError(LsmixError):
    """Something that must be up to date is not."""

    exit_code = 3


class LockedError(LsmixError):
    """Another run is working on the same artifact."""

    exit_code = 4


class CorruptError(LsmixError, ValueError):
    """Bytes are missing or differ from their checksum."""

    exit_code = 5


class PartialError(LsmixError):
    """Some shards failed; the others are complete and kept."""

    exit_code = 6


_ADVICE: Final = {
    errno.EMFILE: "Raise the limit on open files ('ulimit -n 4096'), or use fewer worker processes.",
    errno.ENFILE: "Close other programs, or raise the system's limit on open files (fs.file-max).",
    errno.ENOMEM: "Use fewer worker processes, or raise the limits on memory ('ulimit -v') and maps (vm.max_map_count).",
    errno.EACCES: "Ask its owner for read access, or change its permissions ('chmod -R u+rX').",
    errno.EPERM: "Ask its owner for permission to use it.",
    errno.ENOSPC: "Free some space on this disk.",
    errno.EDQUOT: "Free some space within your quota.",
    errno.EROFS: "Choose a folder on another disk.",
    errno.EIO: "The disk reported an error: check it, or restore the files from another copy.",
    errno.ESTALE: "The network file system lost the file: try again, or remount it.",
}


def system_error(error: OSError, where: str = "") -> str:
    """Return a message with the system's reason and what to do; ``where`` names the file if the error does not."""
    path = where or error.filename
    reason = f"{error.strerror or error}{f': {path!r}' if path else ''}."
    return f"{reason} {_ADVICE[error.errno]}" if error.errno in _ADVICE else reason


def unreadable(where: str, error: OSError) -> LsmixError:
    """Return the error to raise if a listed file cannot be opened or mapped: SystemLimitError or CorruptError."""
    if error.errno in _ADVICE:
        return SystemLimitError(system_error(error, where))
    return CorruptError(f"{where!r} cannot be read: {error.strerror or error}. Download or rebuild the artifact.")


def escape_terminal(text: str) -> str:
    r"""Return text with every character that is not printable, including line breaks, replaced by its escape.

    Example:
        >>> print(escape_terminal("a cat\x1b[2J\n\u202e"))
        a cat\x1b[2J\n\u202e
    """
    return text if text.isprintable() else "".join(map(_escape_character, text))


def printable_lines(text: str) -> str:
    r"""Return text with every character that is not printable, except newlines, replaced by its escape.

    Example:
        >>> print(printable_lines("one\ntwo\x1b"))
        one
        two\x1b
    """
    return "\n".join(map(escape_terminal, text.split("\n")))


def printable_words(text: str) -> str:
    r"""Return text on one line: whitespace becomes single spaces, and characters that are not printable are escaped.

    Example:
        >>> print(printable_words(" a\n cat\x1b[2J "))
        a cat\x1b[2J
    """
    return escape_terminal(" ".join(text.split()))


def escape_json(text: str, *, ascii_only: bool = False) -> str:
    r"""Return the same JSON with characters that are not printable escaped; line breaks between values are kept.

    ``ascii_only`` escapes all characters outside ASCII, for terminals that cannot show them.

    Example:
        >>> print(escape_json('"a \x9b"'))
        "a \u009b"
    """

    def escape(match: re.Match[str]) -> str:
        return match[0] if match[0].isprintable() and not ascii_only else _json_escape(match[0])

    return re.sub(r"[^\n -~]", escape, text)


def _escape_character(character: str) -> str:
    return character if character.isprintable() else ascii(character)[1:-1]


def _json_escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[start : start + 2].hex()}" for start in range(0, len(units), 2))


def format_bytes(count: int) -> str:
    """Return a number of bytes with a decimal unit, for people.

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
    """Return a number with its noun, for people.

    Example:
        >>> format_count(1, "file"), format_count(35_000, "image")
        ('1 file', '35,000 images')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def format_duration(seconds: float) -> str:
    """Return a duration with its units, for people.

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
