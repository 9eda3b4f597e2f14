"""TinyImageNet-200 as published: a folder, the folder above it, or the zip it comes in, which is not extracted.

The labelled ``val/`` is the test split; ``test/`` has no labels and is never read. Classes are those of
``wnids.txt``, in its order, that have a folder in ``train/``. Each is called by its first word in ``words.txt``, with its
WNID behind it where two would be called the same. Grey images become RGB.
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
_MAX_TEXT_BYTES = 16 << 20  # words.txt, the largest, has 2.6 MB
_MAX_IMAGE_BYTES = 1 << 20  # of a file; a JPEG of 64×64 pixels has some 2 kB


def _recognise(path: Path) -> bool:
    if path.is_dir():
        base = published_base(path, _FOLDER)
        return (base / _WNIDS).is_file() and next(base.glob("train/*/images"), None) is not None
    # A damaged one is known by its name, and then said to be damaged.
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


# Which images there are, and of which class.


def _list(tree: FileTree, path: Path) -> tuple[tuple[str, ...], list[ImageEntry]]:
    """Return the class names, and the images in published order."""
    names = tree.names()
    there = set(names)
    check_complete(path, _FOLDER, [name for name in _TEXTS if name not in there])
    by_class = _images_by_class(names)
    wnids = _lines(tree, _WNIDS)
    strange = sorted(set(by_class) - set(wnids))
    if strange or not by_class:
        raise SourceError(
            f"{str(path)!r}: train/ has {f'the classes {strange[:10]}, which' if strange else 'no images of any class that'} "
            f"{_WNIDS} names{' not' if strange else ''}. Fetch the data set again."
        )
    order = [wnid for wnid in dict.fromkeys(wnids) if wnid in by_class]
    train = [ImageEntry("train", label, name) for label, wnid in enumerate(order) for name in sorted(by_class[wnid])]
    return _class_names(tree, order), train + _list_val(tree, order, there)


def _images_by_class(names: Sequence[str]) -> dict[str, list[str]]:
    by_class: dict[str, list[str]] = {}
    for name in names:
        parts = name.split("/")
        if len(parts) == 4 and (parts[0], parts[2]) == ("train", "images") and _is_image(parts[3]):
            by_class.setdefault(parts[1], []).append(name)
    return by_class


def _list_val(tree: FileTree, order: Sequence[str], there: set[str]) -> list[ImageEntry]:
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
