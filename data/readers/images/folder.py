"""Image files in class folders, or with a table of their labels; in a folder, a zip or a tar.

Class folders may have sub-folders. ``train`` beside ``val``, ``valid``, ``validation``, ``test`` or ``testing`` in any
case are splits; ``val`` beside ``test`` is the held-out split. Folders around everything are passed through. Every
file is used, or counted in the listing's report with the reason why it is not.
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

_LOOKS_FOR = "a folder, zip or tar with one sub-folder of images a class, with such a train/ (and test/ or val/), or with a table of labels (metadata.csv, or data.labels_file)"
_HIDDEN = "hidden, or made by macOS"
_UNLABELLED = "in a split folder without class folders, so without labels"


def _recognise(path: Path) -> bool:
    if path.is_dir():
        return any(is_image_name(name) and not is_hidden(name) for name in walk(path))
    return has_ending(path, TREE_ENDINGS) and any(map(is_image_name, peek_names(path)))


def _files(path: Path) -> Sequence[str | Path]:
    """Return the images and tables; links to missing files are reported when the images are read."""
    if not path.is_dir():
        return [path]
    counting = tuple(IMAGE_ENDINGS.union(TABLE_ENDINGS))
    names = [name for name in walk(path, dangling=False) if name.lower().endswith(counting) and not is_hidden(name)]
    base = os.path.join(path, "")  # noqa: PTH118  # of many files, Path would take most of the time and memory
    return [base + name for name in sorted(names, key=part_order)]


@contextmanager
def _images(path: Path, config: ImageConfig) -> Iterator[ImageListing]:
    with open_tree(path) as tree:
        yield _list(tree, repr(str(path)), config)


def _list(tree: FileTree, where: str, config: ImageConfig) -> ImageListing:
    names = tree.names()
    hidden = [name for name in names if is_hidden(name)]
    shown = [name for name in names if not is_hidden(name)] if hidden else names
    report = SourceReport(found=len(hidden) + sum(not name.endswith("/") for name in shown))
    for name in hidden:
        report.leave_out(_HIDDEN, name)
    images = [name for name in shown if is_image_name(name)]
    known, tables = set(images), _tables(shown, config)
    labelled = _from_tables(tree, tables, images, config, report) if tables else None
    if labelled is None:
        tables = []
        labelled = _from_folders(tree, shown, known, where, report)
    report.found -= len(tables)
    for name in shown:
        if not name.endswith("/") and name not in known and name not in tables:
            report.leave_out(f"not a supported image type ({_ending(name) or 'no ending'})", name)

    def read(name: str) -> bytes:
        if name not in known:  # a table may name anything, also what is outside of the data set
            raise ImageError("is listed, but is not there", "Correct the table.")
        return tree.read(name)

    return make_listing(labelled, where, report, read, tree.label)


def _ending(name: str) -> str:
    stem, dot, ending = name[name.rfind("/") + 1 :].rpartition(".")
    return f".{ending.lower()}" if stem and dot else ""


# Class folders.


def _from_folders(
    tree: FileTree, shown: Sequence[str], images: Collection[str], where: str, report: SourceReport
) -> list[Labelled]:
    wrapper, roles = _layout([name.split("/") for name in shown if name in images], where)
    labelled: list[Labelled] = []
    full: dict[str, bool] = {}  # of each class folder of training images, whether it holds any
    for name in shown:
        parts = name.split("/")
        role, inner = "train" if parts[: len(wrapper)] == wrapper else "", parts[len(wrapper) :]
        if role and roles:
            role, inner = roles.get(inner[0], ""), inner[1:]
        if role == "train" and len(inner) > 1:
            folder = "/".join(parts[: len(parts) - len(inner) + 1])
            full[folder] = full.get(folder, False) or name in images
        if name in images and role and len(inner) > 1:
            labelled.append(Labelled(name, inner[0], role))
        elif name in images and role in ("val", "test"):
            report.leave_out(_UNLABELLED, name)
        elif name in images:
            report.leave_out("outside of the class folders" if role or not roles else "beside the split folders", name)
    train = [folder.rpartition("/")[2] for folder, holds in full.items() if holds]
    if len(train) < 2:
        _check_tables(tree, shown, [name for name in shown if name in images], where)
    if not train:
        raise SourceError(f"{where} has no class folders with images; expected {_LOOKS_FOR}. Check the path.")
    if len(train) == 1:
        report.notes.append(f"all images are of one class, {train[0]!r}; use class folders or data.labels_file")
    if empty := [folder for folder, holds in full.items() if not holds]:
        one = len(empty) == 1
        raise SourceError(
            f"{where}: {len(empty)} class {'folder holds' if one else 'folders hold'} no images: "
            f"{', '.join(map(repr, empty[:20]))}. Move images there, or remove {'it' if one else 'them'}."
        )
    return _without_unlabelled(labelled, set(train), where, report)


def _layout(images: Sequence[list[str]], where: str) -> tuple[list[str], dict[str, str]]:
    """Return the folders around all class or split folders, and what each split folder is for; none without train."""
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
            raise SourceError(f"{where} has the folders {' and '.join(map(repr, same))} for one split. Join them.")
    if "train" in roles.values():
        return wrapper, roles
    if roles and len(roles) == len(firsts):
        raise SourceError(
            f"{where} has no training images, only the split folders {', '.join(map(repr, roles))}. Rename one to "
            "'train', or let data.path name it."
        )
    # A single class may have sub-folders, and images beside them.
    return (wrapper if len(firsts) > 1 and len(deeper) == len(images) else []), {}


def _without_unlabelled(labelled: list[Labelled], train: set[str], where: str, report: SourceReport) -> list[Labelled]:
    """Leave out a test folder whose one sub-folder is no class, as ``test/images`` of unlabelled images."""
    for role in ("val", "test"):
        classes = {str(item.label) for item in labelled if item.split == role}
        unknown = sorted(classes - train)
        if len(classes) > 1 and unknown:
            raise SourceError(
                f"{where}: the {role} folder has the classes {unknown[:10]}, which train/ has not. "
                "Every class needs training images."
            )
        if unknown:
            for item in labelled:
                if item.split == role:
                    report.leave_out(_UNLABELLED, item.name)
            labelled = [item for item in labelled if item.split != role]
    return labelled


def _check_tables(tree: FileTree, shown: Sequence[str], images: Sequence[str], where: str) -> None:
    """Refuse images without classes beside a table that lists them, whose labels would be lost."""
    for table in shown:
        if _ending(table) in TABLE_ENDINGS and (fields := suggested_fields(tree, table, images)):
            lines = ", ".join(f"{name} = {value!r}" for name, value in fields.items())
            raise LabelsTableError(
                f"{where} has no two class folders, and the table {table!r} lists images. If it holds their labels, add "
                f"to [data]: {lines}. If not, remove it.",
                fields,
            )


# Tables of labels.


def _tables(shown: Sequence[str], config: ImageConfig) -> list[str]:
    if not config.labels_file:
        return [name for name in shown if PurePosixPath(name).name.lower() in METADATA_NAMES]
    wanted = config.labels_file.removeprefix("./")
    found = [name for name in shown if name == wanted] or [name for name in shown if name.endswith(f"/{wanted}")]
    if len(found) != 1:
        raise SourceError(f"there is no table {wanted!r} below data.path. Check data.labels_file.")
    return found


def _from_tables(
    tree: FileTree, tables: Sequence[str], images: Sequence[str], config: ImageConfig, report: SourceReport
) -> list[Labelled] | None:
    """Return the images with their labels in the order of the tables; None if found tables have no labels."""
    labelled: list[Labelled] = []
    for table in tables:
        rows = read_table(tree, table, images, config, required=bool(config.labels_file), report=report)
        if rows is None:
            return None
        labelled += rows
    named = Counter(item.name for item in labelled)
    if len(named) < len(labelled):
        twice = tree.label(named.most_common(1)[0][0])
        raise SourceError(f"{twice} is listed twice in {', '.join(tables)}. Remove one line.")
    for name in images:
        if name not in named:
            report.leave_out(f"not listed in {', '.join(tables)[:100]}", name)
    roles = {item.name: _role_of(item.name) for item in labelled}
    in_folders = "train" in roles.values()
    return [item if item.split else item._replace(split=roles[item.name] if in_folders else "") for item in labelled]


def _role_of(name: str) -> str:
    """Return what the split folder is for in which an image is; "" if it is in none."""
    return next((SPLIT_ROLES[part.lower()] for part in name.split("/")[:-1] if part.lower() in SPLIT_ROLES), "")


IMAGE_FOLDER = SourceFormat(
    name="image-folder",
    recognise=_recognise,
    files=_files,
    images=_images,
    general=True,
)
