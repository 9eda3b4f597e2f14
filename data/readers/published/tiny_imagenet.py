"""TinyImageNet-200 as published: a folder, the folder above it, or the zip it comes in, which is not extracted.

The labelled ``val/`` is the test split; ``test/`` has no labels and is never read. Classes are those of
``wnids.txt``, in its order, that have a folder in ``train/``. Each is called by its first word in ``words.txt``, with its
WNID behind it where two would be called the same. Every listed image counts or is named in an error; grey ones become RGB.
"""

import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lsmix.data.errors import SourceError
from lsmix.data.readers.decode import IMAGE_ENDINGS, ImageDecoder
from lsmix.data.readers.source_images import PublishedData, SourceFormat, Split, check_file
from lsmix.data.readers.zip_members import ZIP_ERRORS, ZipMembers

__all__ = ["TINY_IMAGENET"]

_FOLDER = "tiny-imagenet-200"
_WNIDS, _WORDS, _ANNOTATIONS = "wnids.txt", "words.txt", "val/val_annotations.txt"
_TEXTS = (_WNIDS, _WORDS, _ANNOTATIONS)
_MAX_TEXT_BYTES = 16 << 20  # words.txt, the largest, has 2.6 MB
_MAX_IMAGE_BYTES = 1 << 20  # of a file; a JPEG of 64×64 pixels has some 2 kB


class _Tree(Protocol):
    """Files below ``tiny-imagenet-200``, wherever they lie, by their names with slashes."""

    def names(self) -> list[str]: ...

    def read(self, name: str, max_bytes: int) -> bytes: ...

    def label(self, name: str) -> str: ...


class _Folder:
    """The files of an unpacked data set that may count."""

    def __init__(self, base: Path) -> None:
        self._base = base

    def names(self) -> list[str]:
        texts = [self._base / name for name in _TEXTS]
        # Pipes and links to nothing count, so that they are refused by name.
        images = [*self._base.glob("train/*/images/*"), *self._base.glob("val/images/*")]
        files = [file for file in texts if file.is_file()] + [file for file in images if not file.is_dir()]
        return [file.relative_to(self._base).as_posix() for file in files]

    def read(self, name: str, max_bytes: int) -> bytes:
        file = self._base / name
        check_file(file)
        if file.stat().st_size > max_bytes:
            raise SourceError(f"{self.label(name)} has {file.stat().st_size} bytes; at most {max_bytes} are read.")
        return file.read_bytes()

    def label(self, name: str) -> str:
        return repr(str(self._base / name))


class _Zip:
    """The files of the archive, without the folder that all of them lie in."""

    def __init__(self, members: ZipMembers) -> None:
        self._members = members

    def names(self) -> list[str]:
        start = f"{_FOLDER}/"
        return [name.removeprefix(start) for name in self._members.names() if name.startswith(start)]

    def read(self, name: str, max_bytes: int) -> bytes:
        return self._members.read(f"{_FOLDER}/{name}", max_bytes)

    def label(self, name: str) -> str:
        return self._members.label(f"{_FOLDER}/{name}")


@dataclass(frozen=True, slots=True)
class _Listed:
    """What there is to read: (name, label) of every image, in published order."""

    class_names: tuple[str, ...]
    train: list[tuple[str, int]]
    test: list[tuple[str, int]]


def _base(path: Path) -> Path:
    return path / _FOLDER if (path / _FOLDER).is_dir() else path


def _recognise(path: Path) -> bool:
    if path.is_dir():
        base = _base(path)
        return (base / _WNIDS).is_file() and next(base.glob("train/*/images"), None) is not None
    if path.suffix != ".zip":
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return f"{_FOLDER}/{_WNIDS}" in archive.NameToInfo
    except ZIP_ERRORS:
        return path.name.startswith("tiny-imagenet")  # so that a damaged one is said to be damaged


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    listed = _list(_Folder(_base(path)), repr(str(path)))
    return [_base(path) / name for name in (*_TEXTS, *(name for name, _ in (*listed.train, *listed.test)))]


@contextmanager
def _open(path: Path) -> Iterator[_Tree]:
    if path.is_dir():
        yield _Folder(_base(path))
        return
    with ZipMembers(path) as members:
        yield _Zip(members)


def _read(path: Path) -> PublishedData:
    with _open(path) as tree:
        listed = _list(tree, repr(str(path)))
        decoder = ImageDecoder()
        splits = {
            "train": _read_images(tree, decoder, listed.train),
            "test": _read_images(tree, decoder, listed.test),
        }
    return PublishedData(
        splits=splits,
        class_names=listed.class_names,
        licence="terms of ImageNet: for non-commercial research and education only",
        citation="O. Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, 2015, of which "
        "TinyImageNet-200 (Stanford CS231n) is a subset",
    )


def _read_images(tree: _Tree, decoder: ImageDecoder, listed: Sequence[tuple[str, int]]) -> Split:
    images: npt.NDArray[np.uint8] | None = None
    for row, (name, _) in enumerate(listed):
        image = decoder.decode(tree.read(name, _MAX_IMAGE_BYTES), tree.label(name))
        if images is None:
            images = np.empty((len(listed), *image.shape[:2], 3), np.uint8)
        images[row] = image[..., None] if image.ndim == 2 else image
    if images is None:
        raise SourceError(f"{tree.label(_ANNOTATIONS)} names no images. Fetch the data set again.")
    return Split(images, np.array([label for _, label in listed], np.int64))


# Which images there are, and of which class.


def _list(tree: _Tree, where: str) -> _Listed:
    names = tree.names()
    there = set(names)
    missing = [name for name in _TEXTS if name not in there]
    if missing:
        raise SourceError(
            f"{where} is not a whole {_FOLDER}: {', '.join(map(repr, missing))} missing. Fetch the data set again."
        )
    by_class = _images_by_class(names)
    wnids = _lines(tree, _WNIDS)
    strange = sorted(set(by_class) - set(wnids))
    if strange or not by_class:
        raise SourceError(
            f"{where}: train/ has {f'the classes {strange[:10]}, which' if strange else 'no images of any class that'} "
            f"{_WNIDS} names{' not' if strange else ''}. Fetch the data set again."
        )
    order = [wnid for wnid in dict.fromkeys(wnids) if wnid in by_class]
    train = [(name, label) for label, wnid in enumerate(order) for name in sorted(by_class[wnid])]
    return _Listed(_class_names(tree, order), train, _list_val(tree, order, there))


def _images_by_class(names: Sequence[str]) -> dict[str, list[str]]:
    by_class: dict[str, list[str]] = {}
    for name in names:
        parts = name.split("/")
        if len(parts) == 4 and (parts[0], parts[2]) == ("train", "images") and _is_image(parts[3]):
            by_class.setdefault(parts[1], []).append(name)
    return by_class


def _list_val(tree: _Tree, order: Sequence[str], there: set[str]) -> list[tuple[str, int]]:
    """Return the images of val/ in the order in which its annotations name them."""
    labels = {wnid: label for label, wnid in enumerate(order)}
    listed: dict[str, int] = {}
    for line in _lines(tree, _ANNOTATIONS):
        file, _, rest = line.partition("\t")
        name, wnid = f"val/images/{file}", rest.partition("\t")[0]
        if wnid not in labels or name not in there or name in listed:
            raise SourceError(
                f"{tree.label(_ANNOTATIONS)} names {ascii(file)[:100]} of the class {ascii(wnid)[:100]}: expected an image of "
                "val/images, once, and a class that train/ has. Fetch the data set again."
            )
        listed[name] = labels[wnid]
    strange = sorted(
        name for name in there if name.startswith("val/images/") and _is_image(name) and name not in listed
    )
    if strange:
        raise SourceError(f"{tree.label(strange[0])} has no class in {_ANNOTATIONS}. Fetch the data set again.")
    return list(listed.items())


def _class_names(tree: _Tree, order: Sequence[str]) -> tuple[str, ...]:
    words = dict(line.split("\t", 1) for line in _lines(tree, _WORDS) if "\t" in line)
    first = {wnid: words.get(wnid, wnid).split(",")[0].strip() for wnid in order}
    count = Counter(first.values())
    return tuple(name if count[name] == 1 else f"{name} ({wnid})" for wnid, name in first.items())


def _lines(tree: _Tree, name: str) -> list[str]:
    text = tree.read(name, _MAX_TEXT_BYTES).decode("utf-8", "replace")
    return [line.strip() for line in text.splitlines() if line.strip()]


def _is_image(name: str) -> bool:
    file = name.rpartition("/")[2]
    return not file.startswith(".") and Path(file).suffix.lower() in IMAGE_ENDINGS


TINY_IMAGENET = SourceFormat(
    name="tiny-imagenet",
    looks_for=f"{_WNIDS!r} and train/…/images in the folder or in its {_FOLDER!r}, or their zip",
    recognise=_recognise,
    files=_files,
    read=_read,
)
