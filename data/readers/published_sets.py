"""The values of ``data.download``: published data sets by name, or a URL with its checksum.

Only files whose checksum is known in advance are downloaded.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from lsmix.data.errors import RecipeError
from lsmix.data.web import checked_url, is_web

__all__ = ["ARCHIVE_ENDINGS", "PublishedFile", "check_download", "files_to_fetch"]

ARCHIVE_ENDINGS = (".tar.gz", ".tgz", ".tar", ".zip", ".npz", ".h5", ".hdf5")
_FILE_ENDINGS = (*ARCHIVE_ENDINGS, ".mat")


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """A file on the web with its checksum."""

    url: str  # http or https
    name: str  # the published file name
    algorithm: Literal["md5", "sha256"]
    checksum: str  # lower-case hex
    size: int = 0  # bytes; 0 if unknown


def _file(url: str, md5: str, size: int) -> PublishedFile:
    return PublishedFile(url, url.rpartition("/")[2], "md5", md5, size)


_CIFAR = "https://www.cs.toronto.edu/~kriz"
_SVHN = "http://ufldl.stanford.edu/housenumbers"
_STANFORD = "http://cs231n.stanford.edu"
# The checksums of CIFAR are from the authors' page; those of SVHN and TinyImageNet are the commonly used ones.
_SVHN_FILES = (
    _file(f"{_SVHN}/train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373", 182_040_794),
    _file(f"{_SVHN}/test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3", 64_275_384),
)
_SVHN_EXTRA = _file(f"{_SVHN}/extra_32x32.mat", "a93ce644f1a588dc4d68dda5feec44a7", 1_329_278_602)
_SETS: dict[str, tuple[PublishedFile, ...]] = {
    "cifar10": (_file(f"{_CIFAR}/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", 170_498_071),),
    "cifar10-binary": (_file(f"{_CIFAR}/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", 170_052_171),),
    "cifar100": (_file(f"{_CIFAR}/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", 169_001_437),),
    "cifar100-binary": (_file(f"{_CIFAR}/cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", 168_513_733),),
    "svhn": _SVHN_FILES,
    "svhn-extra": (*_SVHN_FILES, _SVHN_EXTRA),
    "tiny-imagenet": (_file(f"{_STANFORD}/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de", 248_100_043),),
}


def check_download(download: str) -> None:
    """Check ``data.download`` of a recipe; "" means no download.

    Raises:
        RecipeError: The value is neither a known name nor a URL with a checksum.
    """
    if download:
        _published_files(download)


def files_to_fetch(download: str, path: Path) -> list[tuple[PublishedFile, Path]]:
    """Return the files to download, each with its target path.

    If ``path`` has the extension of a data set file, it is the target of a single file. Otherwise ``path`` is the
    folder for files under their published names. Existing files are omitted. A single file is also omitted if its
    folder contains other files, because these may be the extracted data set.

    Raises:
        RecipeError: ``download`` is unknown, or ``path`` names one file for several downloads.
    """
    files = _published_files(download)
    if path.name.endswith(_FILE_ENDINGS) and not path.is_dir():
        if len(files) > 1:
            raise RecipeError(
                f"data.download = {download!r} consists of {len(files)} files, but data.path is the name of one file: "
                f"{str(path)!r}. Set data.path to a folder."
            )
        return [] if path.exists() else [(files[0], path)]
    if path.is_file():
        return []
    if not all(file.name.endswith(_FILE_ENDINGS) for file in files):
        raise RecipeError(
            f"data.download = {download!r} does not show the type of the file. Set data.path to a file name with an "
            "extension such as .npz."
        )
    if len(files) == 1 and path.is_dir():
        own = (files[0].name, f"{files[0].name}.part")
        if any(entry.name not in own and not entry.name.startswith(".") for entry in path.iterdir()):
            return []
    return [(file, path / file.name) for file in files if not (path / file.name).exists()]


def _published_files(download: str) -> tuple[PublishedFile, ...]:
    if download in _SETS:
        return _SETS[download]
    url, _, fragment = download.partition("#")
    try:
        url = checked_url(url)
        known, reason = is_web(url), ""
    except RecipeError as error:
        known, reason = False, f" {error}" if "://" in url else ""
    if not known:
        raise RecipeError(
            f"data.download: expected one of {', '.join(_SETS)}, or an http or https URL with its checksum, got "
            f"{download!r}.{reason}"
        )
    found = re.fullmatch(r"sha256=([0-9a-fA-F]{64})|md5=([0-9a-fA-F]{32})", fragment)
    if not found:
        raise RecipeError(
            "data.download: a URL must end in its checksum, '#sha256=' and 64 hex digits or '#md5=' and 32; "
            f"got {download!r}."
        )
    sha256, md5 = found.groups()
    name = re.sub(r"[^\w.+-]", "_", unquote(urlsplit(url).path).rpartition("/")[2].lstrip("."))
    return (PublishedFile(url, name, "sha256" if sha256 else "md5", (sha256 or md5).lower()),)
