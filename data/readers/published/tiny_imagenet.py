"""Reader for TinyImageNet-200 as published, in a folder, its parent folder, or a zip.

The labelled ``val/`` is the test split; ``test/`` has no labels and is never read. The classes are the entries of
``wnids.txt``, in that order, that have a folder in ``train/``. The name of a class is its first name in ``words.txt``,
followed by its WNID if several classes have the same name. Grey images are converted to RGB.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lsmix.data.errors import SourceError
from lsmix.data.readers.images.pixels import is_image_name
from lsmix.data.readers.source_images import (
    ImageConfig,
    ImageEntry,
    ImageListing,
    SourceFormat,
    SourceReport,
    check_complete,
    has_ending,
)
from lsmix.data.readers.trees import FileTree, open_published, peek_names, published_base

__all__ = ["TINY_IMAGENET"]

_FOLDER = "tiny-imagenet-200"
_WNIDS, _WORDS, _ANNOTATIONS = "wnids.txt", "words.txt", "val/val_annotations.txt"
_TEXTS = (_WNIDS, _WORDS, _ANNOTATIONS)
_MAX_TEXT_BYTES = 16 << 20  # the largest text file, words.txt, has 2.6 MB
_MAX_IMAGE_BYTES = 1 << 20  # a JPEG file of 64×64 pixels has about 2 kB


def _recognise(path: Path) -> bool:
    if path.is_dir():
        base = published_base(path, _FOLDER)
        return (base / _WNIDS).is_file() and next(base.glob("train/*/images"), None) is not None
    # A damaged archive is recognised by its name, so that it is reported as damaged.
    return has_ending(path, ".zip") and (
        f"{_FOLDER}/{_WNIDS}" in peek_names(path) or path.name.startswith("tiny-imagenet")
    )


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    with open_published(path, _FOLDER) as tree:
        names = [entry.name for entry in _list(tree, path)[1]]
    return [published_base(path, _FOLDER) / name for name in (*_TEXTS, *names)]


@contextmanager
def _images(path: Path, config: ImageConfig) -> Iterator[ImageListing]:
    with open_published(path, _FOLDER) as tree:
        class_names, entries = _list(tree, path)
        used = {entry.name for entry in entries}
        files = [name for name in tree.names() if not name.endswith("/")]
        report = SourceReport(found=len(files))
        for name in files:
            if name not in used:
                report.leave_out("without a label" if _is_image(name) else "not an image", name)
        yield ImageListing(
            entries=entries,
            class_names=class_names,
            read=lambda name: tree.read(name, _MAX_IMAGE_BYTES),
            label=tree.label,
            report=report,
            licence="terms of ImageNet: for non-commercial research and education only",
            citation="O. Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, 2015, of which "
            "TinyImageNet-200 (Stanford CS231n) is a subset",
        )


# Listing the images and their classes.


def _list(tree: FileTree, path: Path) -> tuple[tuple[str, ...], list[ImageEntry]]:
    """Return the class names, and the images in published order."""
    names = tree.names()
    known = set(names)
    check_complete(path, _FOLDER, [name for name in _TEXTS if name not in known])
    by_class = _images_by_class(names)
    wnids = _lines(tree, _WNIDS)
    unknown = sorted(set(by_class) - set(wnids))
    if unknown or not by_class:
        problem = f"the classes {unknown[:10]}, which are missing in {_WNIDS}" if unknown else "no images"
        raise SourceError(f"{str(path)!r}: train/ contains {problem}. Download the data set again.")
    order = [wnid for wnid in dict.fromkeys(wnids) if wnid in by_class]
    train = [ImageEntry("train", label, name) for label, wnid in enumerate(order) for name in sorted(by_class[wnid])]
    return _class_names(tree, order), train + _list_val(tree, order, known)


def _images_by_class(names: Sequence[str]) -> dict[str, list[str]]:
    by_class: dict[str, list[str]] = {}
    for name in names:
        parts = name.split("/")
        if len(parts) == 4 and (parts[0], parts[2]) == ("train", "images") and _is_image(parts[3]):
            by_class.setdefault(parts[1], []).append(name)
    return by_class


def _list_val(tree: FileTree, order: Sequence[str], known: set[str]) -> list[ImageEntry]:
    """Return the images of val/ in the order of its annotations."""
    labels = {wnid: label for label, wnid in enumerate(order)}
    listed: dict[str, int] = {}
    for line in _lines(tree, _ANNOTATIONS):
        file, _, rest = line.partition("\t")
        name, wnid = f"val/images/{file}", rest.partition("\t")[0]
        if wnid not in labels or name not in known or name in listed:
            raise SourceError(
                f"{tree.label(_ANNOTATIONS)} lists {ascii(file)[:100]} with the class {ascii(wnid)[:100]}; expected "
                "each image of val/images once, with a class that exists in train/. Download the data set again."
            )
        listed[name] = labels[wnid]
    unlisted = sorted(
        name for name in known if name.startswith("val/images/") and _is_image(name) and name not in listed
    )
    if unlisted:
        raise SourceError(f"{tree.label(unlisted[0])} has no class in {_ANNOTATIONS}. Download the data set again.")
    return [ImageEntry("test", label, name) for name, label in listed.items()]


def _class_names(tree: FileTree, order: Sequence[str]) -> tuple[str, ...]:
    words = dict(line.split("\t", 1) for line in _lines(tree, _WORDS) if "\t" in line)
    first = {wnid: words.get(wnid, wnid).split(",")[0].strip() for wnid in order}
    count = Counter(first.values())
    return tuple(name if count[name] == 1 else f"{name} ({wnid})" for wnid, name in first.items())


def _lines(tree: FileTree, name: str) -> list[str]:
    text = tree.read(name, _MAX_TEXT_BYTES).decode("utf-8", "replace")
    return [line.strip() for line in text.splitlines() if line.strip()]


def _is_image(name: str) -> bool:
    return not name.rpartition("/")[2].startswith(".") and is_image_name(name)


TINY_IMAGENET = SourceFormat(
    name="tiny-imagenet",
    recognise=_recognise,
    files=_files,
    images=_images,
)
