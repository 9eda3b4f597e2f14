"""Reading a published data set, whatever its format.

The one rule: ``_FORMATS`` is all there is to know about a format here; the next one is a module and a line.
"""

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from lsmix.data.errors import MissingError, RecipeError, SourceError
from lsmix.data.readers.digits import DIGITS, DIGITS_SHA256
from lsmix.data.readers.hdf5 import HDF5
from lsmix.data.readers.image_folder import IMAGE_FOLDER
from lsmix.data.readers.npz import NPZ
from lsmix.data.readers.published.cifar import (
    CIFAR10_BINARY,
    CIFAR10_PYTHON,
    CIFAR100_BINARY,
    CIFAR100_PYTHON,
)
from lsmix.data.readers.published.sources import ARCHIVE_ENDINGS, check_download
from lsmix.data.readers.published.svhn import SVHN
from lsmix.data.readers.published.tiny_imagenet import TINY_IMAGENET
from lsmix.data.readers.source_images import PublishedData, SourceFormat

__all__ = ["FormatName", "SourceConfig", "read_source", "source_files", "source_version"]

FormatName = Literal[
    "auto", "digits", "cifar10-python", "cifar10-binary", "cifar100-python", "cifar100-binary", "svhn", "tiny-imagenet",
    "npz", "hdf5", "image-folder",
]  # fmt: skip

_FORMATS = {
    kind.name: kind
    for kind in (
        DIGITS, CIFAR10_PYTHON, CIFAR10_BINARY, CIFAR100_PYTHON, CIFAR100_BINARY, SVHN, TINY_IMAGENET, NPZ, HDF5, IMAGE_FOLDER,
    )
}  # fmt: skip


class SourceConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a published data set lies, in which format, and which of its readings is wanted.

    Raises:
        RecipeError: ``download`` names nothing that can be fetched.
    """

    path: Annotated[str, msgspec.Meta(max_length=4096)] = ""  # file or folder; "" for digits
    format: FormatName = "auto"  # "auto" looks at what is there
    labels: Literal["fine", "coarse"] = "fine"  # of CIFAR-100: 100 classes, or 20 superclasses
    extra: bool = False  # of SVHN: whether the 531,131 images of extra_32x32.mat join the training split
    download: Annotated[str, msgspec.Meta(max_length=4096)] = (
        ""  # what to fetch where nothing is at path; "" for nothing
    )

    def __post_init__(self) -> None:
        """Refuse a download that is not known."""
        check_download(self.download)


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
    """Return where the data lie; a folder that holds nothing but one archive stands for the archive."""
    path = Path(config.path).expanduser()
    if path.is_dir():
        inside = _visible(path)
        if len(inside) == 1 and inside[0].is_file() and inside[0].name.endswith(ARCHIVE_ENDINGS):
            return inside[0]
    return path


def _visible(folder: Path) -> list[Path]:
    """Return what is in a folder but for hidden files and what an interrupted download left."""
    return [entry for entry in folder.iterdir() if not entry.name.startswith(".") and entry.suffix != ".part"]


def _resolve(config: SourceConfig) -> SourceFormat:
    kind = _detect(config)
    for wanted, word, field in (
        (config.labels == "coarse", "coarse", 'labels = "coarse"'),
        (config.extra, "extra", "extra = true"),
    ):
        if not wanted:
            continue
        if word not in kind.variants:
            having = " and ".join(name for name, known in _FORMATS.items() if word in known.variants)
            raise RecipeError(f"{field} is for {having}, but this data set is {kind.name}. Remove it.")
        kind = kind.variants[word]
    return kind


def _detect(config: SourceConfig) -> SourceFormat:
    if config.format == DIGITS.name:
        if config.path or config.download:
            raise RecipeError(
                f"digits come with scikit-learn and have no path; got {config.path or config.download!r}. Remove the path."
            )
        return DIGITS
    if not config.path:
        raise RecipeError(
            'no path given for the data set; say path = "...", or format = "digits" for the built-in one.'
        )
    path = _path(config)
    if not path.exists() or (config.download and path.is_dir() and not _visible(path)):
        fetch = ", or let 'lsmix ingest --download' fetch it" if config.download else ""
        raise MissingError(f"no data set at {config.path!r}: there is no such file or folder. Check the path{fetch}.")
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
