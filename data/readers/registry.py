"""The registry of data set formats, and functions that read a data set in any of them.

Formats are registered as "module:object" and imported on first use, so checking a recipe does not import any reader.
Other packages can add formats with the entry point group ``lsmix.data_formats``.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Final, Literal, cast

import msgspec

from lsmix.data.errors import MissingError, RecipeError, SourceError
from lsmix.data.mixing import Registry, import_object
from lsmix.data.progress import NullProgress, Progress
from lsmix.data.readers.hub import hub_folder, is_hub
from lsmix.data.readers.published_sets import ARCHIVE_ENDINGS, check_download
from lsmix.data.readers.source_images import (
    ImageConfig,
    ImageListing,
    PublishedData,
    SourceFormat,
    SourceSummary,
    SplitCheck,
    check_file,
    has_ending,
)
from lsmix.data.readers.trees import walk

__all__ = [
    "DATA_FORMATS",
    "SourceConfig",
    "expand_home",
    "is_listed",
    "read_source",
    "source_files",
    "source_version",
    "summarise_source",
]

_IMAGE_LOADER = "lsmix.data.readers.images.load"  # imported on use, because it needs Pillow
_DIGITS = "digits"  # the built-in data set, which has no path
DATA_FORMATS: Final = Registry(
    "format",
    "lsmix.data_formats",
    {
        _DIGITS: "lsmix.data.readers.digits:DIGITS",
        "cifar10-python": "lsmix.data.readers.published.cifar:CIFAR10_PYTHON",
        "cifar10-binary": "lsmix.data.readers.published.cifar:CIFAR10_BINARY",
        "cifar100-python": "lsmix.data.readers.published.cifar:CIFAR100_PYTHON",
        "cifar100-binary": "lsmix.data.readers.published.cifar:CIFAR100_BINARY",
        "svhn": "lsmix.data.readers.published.svhn:SVHN",
        "tiny-imagenet": "lsmix.data.readers.published.tiny_imagenet:TINY_IMAGENET",
        "idx": "lsmix.data.readers.published.idx:IDX",
        "npz": "lsmix.data.readers.npz:NPZ",
        "hdf5": "lsmix.data.readers.hdf5:HDF5",
        "webdataset": "lsmix.data.readers.images.webdataset:WEBDATASET",
        "parquet": "lsmix.data.readers.images.parquet:PARQUET",
        "image-folder": "lsmix.data.readers.images.folder:IMAGE_FOLDER",
    },
)


class SourceConfig(ImageConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The location of a published data set, its format, and the labels and files to use.

    Raises:
        RecipeError: The format or the download is unknown.
    """

    path: Annotated[str, msgspec.Meta(max_length=4096)] = (
        ""  # file or folder, relative to the recipe's folder; or hf://datasets/OWNER/NAME
    )
    format: str = "auto"  # auto recognises the data set; see below
    labels: Literal["fine", "coarse"] = "fine"  # for CIFAR-100: its 100 classes, or its 20 superclasses
    extra: bool = False  # for SVHN: whether to add extra_32x32.mat to the training images
    # what --download downloads if path does not exist: a name from the table below, or a URL with its checksum
    download: Annotated[str, msgspec.Meta(max_length=4096)] = ""

    def __post_init__(self) -> None:
        """Reject unknown formats and downloads."""
        super().__post_init__()
        if self.format != "auto":
            DATA_FORMATS.check(self.format)
        check_download(self.download)


def read_source(
    config: SourceConfig,
    progress: Progress | None = None,
    *,
    label: str = "",
    folder: Path | None = None,
    check: SplitCheck | None = None,
) -> PublishedData:
    """Read a data set.

    Args:
        config: The data set.
        progress: Optional progress reporter; it counts image files.
        label: Label for progress reports.
        folder: Folder for a temporary file with the decoded images; None for the system's temporary folder.
        check: Called with the labels of each split and the class names before image files are decoded.

    Raises:
        RecipeError: No path is given, or a path is given for the built-in data set.
        MissingError: The path does not exist.
        SourceError: The path is not a data set in the given format.

    Example:
        >>> len(read_source(SourceConfig(format="digits")).splits["test"])
        297
    """
    kind, path = _resolve(config), _path(config)
    if kind.read:
        published = kind.read(path)
        if config.target:
            resize_arrays = import_object(f"{_IMAGE_LOADER}:resize_arrays", "data.size")
            return cast(PublishedData, resize_arrays(published, config))
        return published
    load_images = import_object(f"{_IMAGE_LOADER}:load_images", "image files")
    with _listing(kind, path, config) as listing:
        return cast(
            PublishedData,
            load_images(listing, config, progress or NullProgress(), label=label, folder=folder, check=check),
        )


def summarise_source(config: SourceConfig) -> SourceSummary:
    """Return a summary of a data set. Image files are only listed, and the headers of a sample of them are read.

    Raises:
        RecipeError, MissingError, SourceError: As for ``read_source``.
    """
    kind, path = _resolve(config), _path(config)
    if not kind.read:
        summarise_images = import_object(f"{_IMAGE_LOADER}:summarise_images", "image files")
        with _listing(kind, path, config) as listing:
            return cast(SourceSummary, summarise_images(listing, kind.name))
    published = kind.read(path)
    height, width, channels = published.splits["train"].images.shape[1:]
    return SourceSummary(
        format=kind.name,
        labels={name: split.labels for name, split in published.splits.items()},
        class_names=published.class_names,
        sizes=Counter({(height, width): sum(map(len, published.splits.values()))}),
        channels=channels,
        licence=published.licence,
        citation=published.citation,
    )


def is_listed(config: SourceConfig) -> bool:
    """Return whether a data set consists of image files, which can be summarised without reading all of them.

    Raises:
        RecipeError, MissingError, SourceError: As for ``read_source``.
    """
    return _resolve(config).images is not None


def _listing(kind: SourceFormat, path: Path, config: SourceConfig) -> AbstractContextManager[ImageListing]:
    if not kind.images:
        raise RecipeError(f"format {kind.name!r} has neither 'read' nor 'images'. Fix the package that provides it.")
    return kind.images(path, config)


def source_files(config: SourceConfig) -> Sequence[str | Path]:
    """Return the files that determine the content of a data set, in a fixed order; none for digits.

    Raises:
        RecipeError, MissingError, SourceError: As for ``read_source``.
    """
    return _resolve(config).files(_path(config))


def source_version(config: SourceConfig) -> str:
    """Return the SHA-256, in hex, of the content of the built-in data set; "" for data sets with files."""
    if config.format != _DIGITS:
        return ""
    from lsmix.data.readers.digits import DIGITS_SHA256

    return DIGITS_SHA256


def _format(name: str) -> SourceFormat:
    return cast(SourceFormat, DATA_FORMATS.load(name))


def _formats() -> list[SourceFormat]:
    return [_format(name) for name in DATA_FORMATS.names()]


def _path(config: SourceConfig) -> Path:
    """Return the path of the data set; for a folder that contains nothing but an archive, the path of the archive."""
    if is_hub(config.path):
        return hub_folder(config.path)
    path = expand_home(config.path)
    if path.is_dir():
        entries = _visible(path)
        if len(entries) == 1 and entries[0].is_file() and has_ending(entries[0], ARCHIVE_ENDINGS):
            return entries[0]
    return path


def expand_home(path: str) -> Path:
    """Return a path with a leading "~" or "~user" replaced by the home folder.

    Raises:
        MissingError: The user does not exist or has no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise MissingError(
            f"no home folder is known for {Path(path).parts[0]!r} in {path!r}. Write the full path instead."
        ) from error


def _visible(folder: Path) -> list[Path]:
    """Return the entries of a folder without hidden files and partial downloads."""
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
            supported = " and ".join(other.name for other in _formats() if word in other.variants)
            raise RecipeError(f"{field} is for {supported}, but this data set is {kind.name}. Remove it.")
        kind = kind.variants[word]
    return kind


def _detect(config: SourceConfig) -> SourceFormat:
    if config.format == _DIGITS:
        if config.path or config.download:
            raise RecipeError(
                f"digits are included in lsmix and have no path; got {config.path or config.download!r}. Remove it."
            )
        return _format(_DIGITS)
    if not config.path:
        raise RecipeError(
            'no path given for the data set. Set path = "...", or format = "digits" for the built-in data set. '
            "To use data in memory, call lsmix.run(recipe, data=...) in Python."
        )
    path = _path(config)
    check_file(path)
    if not path.exists() or (config.download and path.is_dir() and not _visible(path)):
        problem = "the folder contains no complete files" if path.exists() else "the path does not exist"
        advice = ", or run 'lsmix ingest --download' to download it" if config.download else ""
        raise MissingError(f"no data set at {config.path!r}: {problem}. Check it{advice}.")
    if config.format != "auto":
        return _format(config.format)
    formats = _formats()
    special = [kind for kind in formats if not kind.general and kind.recognise(path)]
    fitting = special or [kind for kind in formats if kind.general and kind.recognise(path)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise SourceError(
            f"{config.path!r} matches several formats: {', '.join(kind.name for kind in fitting)}. "
            f'Choose one, for example format = "{fitting[0].name}".'
        )
    names = ", ".join(kind.name for kind in formats if kind.name != _DIGITS)
    raise SourceError(
        f"{config.path!r} matches no known format{_contents(path)}. If it has one of the formats {names}, set "
        "data.format to see what is missing."
    )


def _contents(path: Path) -> str:
    """Return the most frequent types of files below a folder, for a message."""
    if not path.is_dir():
        return ""
    kinds = Counter(Path(name).suffix.lower() or "no extension" for name in walk(path) if not name.endswith("/"))
    return f"; it contains {', '.join(f'{kind} ({n:,})' for kind, n in kinds.most_common(5)) or 'no files'}"
