"""Reading a published data set, whatever its format.

The one rule: ``_FORMATS`` is all there is to know about a format here; the next one is a module and a line.
"""

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from lsmix.data.cifar import CIFAR10_BINARY, CIFAR10_PYTHON
from lsmix.data.digits import DIGITS, DIGITS_SHA256
from lsmix.data.errors import MissingError, RecipeError, SourceError
from lsmix.data.image_folder import IMAGE_FOLDER
from lsmix.data.npz import NPZ
from lsmix.data.source_images import PublishedData, SourceFormat

__all__ = ["FormatName", "SourceConfig", "read_source", "source_files", "source_version"]

FormatName = Literal["auto", "digits", "cifar10-python", "cifar10-binary", "npz", "image-folder"]

_FORMATS = {kind.name: kind for kind in (DIGITS, CIFAR10_PYTHON, CIFAR10_BINARY, NPZ, IMAGE_FOLDER)}


class SourceConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a published data set lies, and in which format."""

    path: Annotated[str, msgspec.Meta(max_length=4096)] = ""  # file or folder; "" for digits
    format: FormatName = "auto"  # "auto" looks at what is there


def read_source(config: SourceConfig) -> PublishedData:
    """Read the data set that ``config`` names.

    Raises:
        RecipeError: the configuration names a path where there is none to name, or none where there must be one.
        MissingError: there is nothing at the path.
        SourceError: what is there cannot be read as a data set of the format.

    Example:
        >>> len(read_source(SourceConfig(format="digits")).splits["test"])
        297
    """
    return _resolve(config).read(_path(config))


def source_files(config: SourceConfig) -> list[Path]:
    """Return the files whose content counts, in a fixed order; none for digits.

    Raises:
        RecipeError, MissingError, SourceError: as ``read_source``.
    """
    return _resolve(config).files(_path(config))


def source_version(config: SourceConfig) -> str:
    """Return what stands for the content of a data set that has no files, a SHA-256 in hex; "" where files count."""
    return DIGITS_SHA256 if config.format == DIGITS.name else ""


def _path(config: SourceConfig) -> Path:
    return Path(config.path).expanduser()


def _resolve(config: SourceConfig) -> SourceFormat:
    if config.format == DIGITS.name:
        if config.path:
            raise RecipeError(f"digits come with scikit-learn and have no path; got {config.path!r}. Remove the path.")
        return DIGITS
    if not config.path:
        raise RecipeError(
            'no path given for the data set; say path = "...", or format = "digits" for the built-in one.'
        )
    path = _path(config)
    if not path.exists():
        raise MissingError(f"no data set at {config.path!r}: there is no such file or folder. Check the path.")
    if config.format != "auto":
        return _FORMATS[config.format]
    fitting = [kind for kind in _FORMATS.values() if kind.recognise(path)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise SourceError(
            f"{config.path!r} fits several formats: {', '.join(kind.name for kind in fitting)}. "
            f'Say which, for example format = "{fitting[0].name}".'
        )
    looked_for = "; ".join(f"{kind.name}: {kind.looks_for}" for kind in _FORMATS.values() if kind is not DIGITS)
    raise SourceError(f"{config.path!r} fits no known format. Looked for {looked_for}.")
