"""Every error that lsmix raises on purpose.

    LsmixError                      exit code 1
    ├── RecipeError                 1   a recipe, an option or an argument is wrong        (ValueError)
    ├── MissingError                1   a path or an artifact is not there                 (FileNotFoundError)
    ├── SourceError                 1   a published data set cannot be read as such        (ValueError)
    ├── DownloadError               1   a file cannot be fetched, or is not the wanted one (OSError)
    ├── FormatError                 1   an artifact is of a kind or version we don't read  (ValueError)
    ├── DiskSpaceError              1   the result would not fit on the disk               (OSError)
    ├── DeviceMemoryError           1   the work does not fit into a device's memory       (MemoryError)
    ├── DivergedError               1   training left the finite numbers                   (ArithmeticError)
    ├── StaleError                  3   something is not up to date
    ├── LockedError                 4   another run works on the same artifact
    ├── CorruptError                5   bytes differ from their checksum, or are gone      (ValueError)
    └── PartialError                6   some shards failed, the rest is done

The one rule: a message says what, where, expected, got, and what to do, in one sentence or two.
Exit code 2 is a usage error of the command line, 130 an interruption.
"""

from typing import ClassVar

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
