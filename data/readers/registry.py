"""The formats of data sets by name, and reading a data set in whichever format it has.

Formats are named by "module:object" and imported on use, so that recipes are checked without any reader. Other packages
add formats with the entry point group ``lsmix.data_formats``.
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

_IMAGE_LOADER = "lsmix.data.readers.images.load"  # which needs Pillow
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
    """The location of a published data set, its format, and which of its labels and files to use.

    Raises:
        RecipeError: the format is unknown, or ``download`` names nothing that can be fetched.
    """

    path: Annotated[str, msgspec.Meta(max_length=4096)] = (
        ""  # file or folder, from the recipe's folder; or hf://datasets/OWNER/NAME
    )
    format: str = "auto"  # auto recognises the data set; see below
    labels: Literal["fine", "coarse"] = "fine"  # of CIFAR-100: its 100 classes, or its 20 superclasses
    extra: bool = False  # of SVHN: whether extra_32x32.mat joins the training split
    # what --download fetches if nothing is at path: a name from the table below, or a URL with its checksum
    download: Annotated[str, msgspec.Meta(max_length=4096)] = ""

    def __post_init__(self) -> None:
        """Refuse a format or a download that is not known."""
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
    """Read the data set that ``config`` names.

    Args:
        config: the data set.
        progress: optional progress reporter, which counts image files.
        label: what the work is called there.
        folder: where a temporary file with the decoded images may be; None for the system's folder.
        check: called with the labels of each split and the class names before image files are decoded.

    Raises:
        RecipeError: the path is missing, or given for the built-in data set.
        MissingError: there is nothing at the path.
        SourceError: the path is not a data set of the format.

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
    """Return what the data set that ``config`` names holds; image files are listed, and the headers of some are read.

    Raises:
        RecipeError, MissingError, SourceError: as ``read_source``.
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
    """Tell whether a data set is of image files, so that its summary is known without reading them all.

    Raises:
        RecipeError, MissingError, SourceError: as ``read_source``.
    """
    return _resolve(config).images is not None


def _listing(kind: SourceFormat, path: Path, config: SourceConfig) -> AbstractContextManager[ImageListing]:
    if not kind.images:
        raise RecipeError(f"format {kind.name!r} has neither 'read' nor 'images'. Correct the package that adds it.")
    return kind.images(path, config)


def source_files(config: SourceConfig) -> Sequence[str | Path]:
    """Return the files whose content counts, in a fixed order; none for digits.

    Raises:
        RecipeError, MissingError, SourceError: as ``read_source``.
    """
    return _resolve(config).files(_path(config))


def source_version(config: SourceConfig) -> str:
    """Return what stands for the content of a data set that has no files, a SHA-256 in hex; "" where files count."""
    if config.format != _DIGITS:
        return ""
    from lsmix.data.readers.digits import DIGITS_SHA256

    return DIGITS_SHA256


def _format(name: str) -> SourceFormat:
    return cast(SourceFormat, DATA_FORMATS.load(name))


def _formats() -> list[SourceFormat]:
    return [_format(name) for name in DATA_FORMATS.names()]


def _path(config: SourceConfig) -> Path:
    """Return the path of the data; of a folder that holds nothing but one archive, the archive's."""
    if is_hub(config.path):
        return hub_folder(config.path)
    path = expand_home(config.path)
    if path.is_dir():
        inside = _visible(path)
        if len(inside) == 1 and inside[0].is_file() and has_ending(inside[0], ARCHIVE_ENDINGS):
            return inside[0]
    return path


def expand_home(path: str) -> Path:
    """Return a path with a "~" or "~user" at its beginning replaced by the home folder.

    Raises:
        MissingError: there is no such user, or this one has no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise MissingError(
            f"no home folder is known for {Path(path).parts[0]!r} in {path!r}. Write the whole path instead."
        ) from error


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
            having = " and ".join(other.name for other in _formats() if word in other.variants)
            raise RecipeError(f"{field} is for {having}, but this data set is {kind.name}. Remove it.")
        kind = kind.variants[word]
    return kind


def _detect(config: SourceConfig) -> SourceFormat:
    if config.format == _DIGITS:
        if config.path or config.download:
            raise RecipeError(
                f"digits come with lsmix and have no path; got {config.path or config.download!r}. Remove the path."
            )
        return _format(_DIGITS)
    if not config.path:
        raise RecipeError(
            'no path given for the data set; say path = "...", or format = "digits" for the built-in one. '
            "Data in memory are passed in Python: lsmix.run(recipe, data=...)."
        )
    path = _path(config)
    check_file(path)
    if not path.exists() or (config.download and path.is_dir() and not _visible(path)):
        fetch = ", or let 'lsmix ingest --download' fetch it" if config.download else ""
        raise MissingError(f"no data set at {config.path!r}: there is no such file or folder. Check the path{fetch}.")
    if config.format != "auto":
        return _format(config.format)
    formats = _formats()
    special = [kind for kind in formats if not kind.general and kind.recognise(path)]
    fitting = special or [kind for kind in formats if kind.general and kind.recognise(path)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise SourceError(
            f"{config.path!r} fits several formats: {', '.join(kind.name for kind in fitting)}. "
            f'Say which, for example format = "{fitting[0].name}".'
        )
    names = ", ".join(kind.name for kind in formats if kind.name != _DIGITS)
    raise SourceError(
        f"{config.path!r} fits no known format{_contents(path)}. If it is one of {names}, set data.format, and the "
        "error says what is missing."
    )


def _contents(path: Path) -> str:
    """Return the most frequent kinds of files below a folder, for a message."""
    if not path.is_dir():
        return ""
    kinds = Counter(Path(name).suffix.lower() or "without an ending" for name in walk(path) if not name.endswith("/"))
    return f"; it holds {', '.join(f'{kind} ({n:,})' for kind, n in kinds.most_common(5)) or 'no files'}"
