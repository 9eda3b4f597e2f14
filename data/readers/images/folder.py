"""Reader for image files in class folders, or with a table of labels, in a folder, zip or tar.

Class folders may have sub-folders. Folders named ``train`` and ``val``, ``valid``, ``validation``, ``test`` or
``testing``, in any case, are splits; if ``test`` exists, ``val`` is the held-out split. Outer folders that contain
everything are skipped. Every file is either used, or counted in the listing's report with the reason why it is not.
"""

import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from lsmix.data.errors import SourceError
from lsmix.data.readers.images.labels_table import (
    METADATA_NAMES,
    TABLE_ENDINGS,
    read_table,
    suggested_fields,
)
from lsmix.data.readers.images.pixels import IMAGE_ENDINGS, is_image_name
from lsmix.data.readers.images.splits import SPLIT_ROLES, Labelled, make_listing
from lsmix.data.readers.source_images import (
    ImageConfig,
    ImageError,
    ImageListing,
    LabelsTableError,
    SourceFormat,
    SourceReport,
    has_ending,
)
from lsmix.data.readers.trees import TREE_ENDINGS, FileTree, is_hidden, open_tree, part_order, peek_names, walk

__all__ = ["IMAGE_FOLDER"]

_EXPECTED = (
    "a folder, zip or tar with one sub-folder of images per class, with such sub-folders in train/ (and test/ or "
    "val/), or with a table of labels (metadata.csv, or data.labels_file)"
)
_HIDDEN = "hidden, or created by macOS"
_UNLABELLED = "without a label, in a split folder without class folders"


def _recognise(path: Path) -> bool:
    if path.is_dir():
        return any(is_image_name(name) and not is_hidden(name) for name in walk(path))
    return has_ending(path, TREE_ENDINGS) and any(map(is_image_name, peek_names(path)))


def _files(path: Path) -> Sequence[str | Path]:
    """Return the images and tables; links to missing files are reported when the images are read."""
    if not path.is_dir():
        return [path]
    endings = tuple(IMAGE_ENDINGS.union(TABLE_ENDINGS))
    names = [name for name in walk(path, dangling=False) if name.lower().endswith(endings) and not is_hidden(name)]
    base = os.path.join(path, "")  # noqa: PTH118  # with many files, Path would need most of the time and memory
    return [base + name for name in sorted(names, key=part_order)]


@contextmanager
def _images(path: Path, config: ImageConfig) -> Iterator[ImageListing]:
    with open_tree(path) as tree:
        yield _list(tree, repr(str(path)), config)


def _list(tree: FileTree, where: str, config: ImageConfig) -> ImageListing:
    names = tree.names()
    hidden = [name for name in names if is_hidden(name)]
    visible = [name for name in names if not is_hidden(name)] if hidden else names
    report = SourceReport(found=len(hidden) + sum(not name.endswith("/") for name in visible))
    for name in hidden:
        report.leave_out(_HIDDEN, name)
    images = [name for name in visible if is_image_name(name)]
    known, tables = set(images), _tables(visible, config)
    labelled = _from_tables(tree, tables, images, config, report) if tables else None
    if labelled is None:
        tables = []
        labelled = _from_folders(tree, visible, known, where, report)
    report.found -= len(tables)
    for name in visible:
        if not name.endswith("/") and name not in known and name not in tables:
            report.leave_out(f"not a supported image type ({_ending(name) or 'no extension'})", name)

    def read(name: str) -> bytes:
        if name not in known:  # a table may list anything, including files outside of the data set
            raise ImageError("is listed but does not exist", "Correct the table.")
        return tree.read(name)

    return make_listing(labelled, where, report, read, tree.label)


def _ending(name: str) -> str:
    stem, dot, ending = name[name.rfind("/") + 1 :].rpartition(".")
    return f".{ending.lower()}" if stem and dot else ""


# Class folders.


def _from_folders(
    tree: FileTree, visible: Sequence[str], images: Collection[str], where: str, report: SourceReport
) -> list[Labelled]:
    wrapper, roles = _layout([name.split("/") for name in visible if name in images], where)
    labelled: list[Labelled] = []
    has_images: dict[str, bool] = {}  # by class folder of training images
    for name in visible:
        parts = name.split("/")
        role, inner = "train" if parts[: len(wrapper)] == wrapper else "", parts[len(wrapper) :]
        if role and roles:
            role, inner = roles.get(inner[0], ""), inner[1:]
        if role == "train" and len(inner) > 1:
            folder = "/".join(parts[: len(parts) - len(inner) + 1])
            has_images[folder] = has_images.get(folder, False) or name in images
        if name in images and role and len(inner) > 1:
            labelled.append(Labelled(name, inner[0], role))
        elif name in images and role in ("val", "test"):
            report.leave_out(_UNLABELLED, name)
        elif name in images:
            report.leave_out(f"outside of the {'class' if role or not roles else 'split'} folders", name)
    train = [folder.rpartition("/")[2] for folder, filled in has_images.items() if filled]
    if len(train) < 2:
        _check_tables(tree, visible, [name for name in visible if name in images], where)
    if not train:
        raise SourceError(f"{where} has no class folders with images; expected {_EXPECTED}. Check the path.")
    if len(train) == 1:
        report.notes.append(f"all images belong to one class, {train[0]!r}; use class folders or data.labels_file")
    if empty := [folder for folder, filled in has_images.items() if not filled]:
        one = len(empty) == 1
        raise SourceError(
            f"{where}: {len(empty)} class {'folder contains' if one else 'folders contain'} no images: "
            f"{', '.join(map(repr, empty[:20]))}. Add images, or remove {'it' if one else 'them'}."
        )
    return _without_unlabelled(labelled, set(train), where, report)


def _layout(images: Sequence[list[str]], where: str) -> tuple[list[str], dict[str, str]]:
    """Return the outer folders, and the role of each split folder: "train", "val" or "test"; {} without train."""
    folders = [parts[:-1] for parts in images if len(parts) > 1]
    wrapper: list[str] = []
    for first, last in zip(min(folders, default=[]), max(folders, default=[]), strict=False):
        if first != last or first.lower() in SPLIT_ROLES:
            break
        wrapper.append(first)
    deeper = [parts[len(wrapper)] for parts in folders if len(parts) > len(wrapper)]
    firsts = dict.fromkeys(deeper)
    roles = {first: SPLIT_ROLES[first.lower()] for first in firsts if first.lower() in SPLIT_ROLES}
    for role in set(roles.values()):
        same = [first for first in roles if roles[first] == role]
        if len(same) > 1:
            raise SourceError(f"{where} has the folders {' and '.join(map(repr, same))} for one split. Merge them.")
    if "train" in roles.values():
        return wrapper, roles
    if roles and len(roles) == len(firsts):
        raise SourceError(
            f"{where} has no training images, only the split folders {', '.join(map(repr, roles))}. Rename one to "
            "'train', or set data.path to one of them."
        )
    # Otherwise the outer folder may itself be a class folder, with sub-folders and images next to them.
    return (wrapper if len(firsts) > 1 and len(deeper) == len(images) else []), {}


def _without_unlabelled(labelled: list[Labelled], train: set[str], where: str, report: SourceReport) -> list[Labelled]:
    """Leave out a test folder whose only sub-folder is not a class, for example ``test/images``."""
    for role in ("val", "test"):
        classes = {str(item.label) for item in labelled if item.split == role}
        unknown = sorted(classes - train)
        if len(classes) > 1 and unknown:
            raise SourceError(
                f"{where}: the {role} folder has the classes {unknown[:10]}, which are missing in train/. "
                "Every class needs training images."
            )
        if unknown:
            for item in labelled:
                if item.split == role:
                    report.leave_out(_UNLABELLED, item.name)
            labelled = [item for item in labelled if item.split != role]
    return labelled


def _check_tables(tree: FileTree, visible: Sequence[str], images: Sequence[str], where: str) -> None:
    """Raise LabelsTableError if a table lists images, because its labels would be ignored."""
    for table in visible:
        if _ending(table) in TABLE_ENDINGS and (fields := suggested_fields(tree, table, images)):
            lines = ", ".join(f"{name} = {value!r}" for name, value in fields.items())
            raise LabelsTableError(
                f"{where} has fewer than two class folders, but the table {table!r} lists images. If it contains their "
                f"labels, add to [data]: {lines}. If not, remove it.",
                fields,
            )


# Tables of labels.


def _tables(visible: Sequence[str], config: ImageConfig) -> list[str]:
    if not config.labels_file:
        return [name for name in visible if PurePosixPath(name).name.lower() in METADATA_NAMES]
    wanted = config.labels_file.removeprefix("./")
    found = [name for name in visible if name == wanted] or [name for name in visible if name.endswith(f"/{wanted}")]
    if len(found) != 1:
        raise SourceError(f"expected one table {wanted!r} below data.path, found {len(found)}. Check data.labels_file.")
    return found


def _from_tables(
    tree: FileTree, tables: Sequence[str], images: Sequence[str], config: ImageConfig, report: SourceReport
) -> list[Labelled] | None:
    """Return the images with their labels in the order of the tables; None if the tables found have no labels."""
    labelled: list[Labelled] = []
    for table in tables:
        rows = read_table(tree, table, images, config, required=bool(config.labels_file), report=report)
        if rows is None:
            return None
        labelled += rows
    named = Counter(item.name for item in labelled)
    if len(named) < len(labelled):
        twice = tree.label(named.most_common(1)[0][0])
        raise SourceError(f"{twice} is listed more than once in {', '.join(tables)}. Remove the duplicates.")
    for name in images:
        if name not in named:
            report.leave_out(f"not listed in {', '.join(tables)[:100]}", name)
    roles = {item.name: _role_of(item.name) for item in labelled}
    in_folders = "train" in roles.values()
    return [item if item.split else item._replace(split=roles[item.name] if in_folders else "") for item in labelled]


def _role_of(name: str) -> str:
    """Return the role of the split folder that contains an image; "" without a split folder."""
    return next((SPLIT_ROLES[part.lower()] for part in name.split("/")[:-1] if part.lower() in SPLIT_ROLES), "")


IMAGE_FOLDER = SourceFormat(
    name="image-folder",
    recognise=_recognise,
    files=_files,
    images=_images,
    general=True,
)
