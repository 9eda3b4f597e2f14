"""Image files in class folders, or with a table of their labels; in a folder, a zip or a tar.

Class folders may have sub-folders. ``train`` beside ``val``, ``valid``, ``validation``, ``test`` or ``testing`` in any
case are splits; ``val`` beside ``test`` is the held-out split. One folder around everything is passed through. Every
file is used, or counted in the listing's report with the reason why it is not.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from lsmix.data.errors import SourceError
from lsmix.data.readers.images.labels_table import (
    METADATA_NAMES,
    TABLE_ENDINGS,
    read_table,
    suggested_fields,
)
from lsmix.data.readers.images.pixels import IMAGE_ENDINGS
from lsmix.data.readers.images.splits import SPLIT_ROLES, Labelled, make_listing
from lsmix.data.readers.source_images import (
    ImageConfig,
    ImageError,
    ImageListing,
    LabelsTableError,
    SourceFormat,
    SourceReport,
)
from lsmix.data.readers.trees import TREE_ENDINGS, FileTree, open_tree, part_order, peek_names, walk

__all__ = ["IMAGE_FOLDER"]

_LOOKS_FOR = "a folder, zip or tar with one sub-folder of images a class, with such a train/ (and test/ or val/), or with metadata.csv"
_HIDDEN = "hidden, or made by macOS"
_UNLABELLED = "in a split folder without class folders, so without labels"


def _recognise(path: Path) -> bool:
    if path.is_dir():
        return any(_is_image(name) and not _is_hidden(name) for name in walk(path))
    return path.name.endswith(TREE_ENDINGS) and any(map(_is_image, peek_names(path)))


def _files(path: Path) -> list[Path]:
    """Return the images and tables; links to missing files are reported when the images are read."""
    if not path.is_dir():
        return [path]
    names = [name for name in walk(path, dangling=False) if _ending(name) in _COUNTING and not _is_hidden(name)]
    return [path / name for name in sorted(names, key=part_order)]


_COUNTING = IMAGE_ENDINGS | frozenset(TABLE_ENDINGS)


@contextmanager
def _images(path: Path, config: ImageConfig) -> Iterator[ImageListing]:
    with open_tree(path) as tree:
        yield _list(tree, repr(str(path)), config)


def _list(tree: FileTree, where: str, config: ImageConfig) -> ImageListing:
    names = tree.names()
    report = SourceReport(found=sum(not name.endswith("/") or _is_hidden(name) for name in names))
    shown = [name for name in names if not _is_hidden(name)]
    for name in names:
        if _is_hidden(name):
            report.leave_out(_HIDDEN, name)
    images = [name for name in shown if _is_image(name)]
    tables = _tables(shown, config)
    wrapper = _wrapper(images, shown)
    labelled = _from_tables(tree, tables, images, config, report) if tables else None
    if labelled is None:
        tables = []
        labelled = _from_folders(images, shown, wrapper, where, report)
        _check_single_class(tree, labelled, shown, wrapper, where)
    report.found -= len(tables)
    for name in shown:
        if not name.endswith("/") and not _is_image(name) and name not in tables:
            report.leave_out(f"not an image ({_ending(name) or 'no ending'})", name)
    known = set(images)

    def read(name: str) -> bytes:
        if name not in known:  # a table may name anything, also what is outside of the data set
            raise ImageError("is listed, but is not there", "Correct the table.")
        return tree.read(name)

    return make_listing(labelled, where, report, read, tree.label)


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX/")) or "/." in name


def _ending(name: str) -> str:
    stem, dot, ending = name[name.rfind("/") + 1 :].rpartition(".")
    return f".{ending.lower()}" if stem and dot else ""


def _is_image(name: str) -> bool:
    return _ending(name) in IMAGE_ENDINGS


def _wrapper(images: Sequence[str], shown: Sequence[str]) -> str:
    """Return the name with slash of the one folder around all class or split folders, or ""."""
    firsts = {name.partition("/")[0] for name in images}
    if len(firsts) != 1 or any("/" not in name for name in images):
        return ""
    first = next(iter(firsts))
    inside = {name.split("/")[1] for name in images if name.count("/") > 1}
    wraps = len(inside) > 1 and all(name.count("/") > 1 for name in images)
    wraps |= any(SPLIT_ROLES.get(name.lower()) == "train" for name in inside)
    return f"{first}/" if wraps and first.lower() not in SPLIT_ROLES else ""


# Class folders.


def _from_folders(
    images: Sequence[str], shown: Sequence[str], wrapper: str, where: str, report: SourceReport
) -> list[Labelled]:
    roles = _split_folders(images, wrapper, where)
    labelled: list[Labelled] = []
    for name in images:
        parts = name.removeprefix(wrapper).split("/")
        role = roles.get(parts[0], "") if roles else "train"
        inner = parts[1:] if roles else parts
        if not name.startswith(wrapper) or not role:
            report.leave_out("beside the split folders", name)
        elif len(inner) < 2:
            report.leave_out("outside of the class folders" if role == "train" else _UNLABELLED, name)
        else:
            labelled.append(Labelled(name, inner[0], role))
    train = {str(item.label) for item in labelled if item.split == "train"}
    if not train:
        raise SourceError(f"{where} has no class folders with images; expected {_LOOKS_FOR}. Check the path.")
    _check_empty(shown, labelled, roles, wrapper, where)
    return _without_unlabelled(labelled, train, where, report)


def _split_folders(images: Sequence[str], wrapper: str, where: str) -> dict[str, str]:
    """Return what each split folder is for: "train", "val" or "test"; nothing if there is no folder train."""
    firsts = dict.fromkeys(name.removeprefix(wrapper).partition("/")[0] for name in images if "/" in name)
    roles = {first: SPLIT_ROLES[first.lower()] for first in firsts if first.lower() in SPLIT_ROLES}
    if "train" not in roles.values():
        return {}
    for role in set(roles.values()):
        same = [first for first in roles if roles[first] == role]
        if len(same) > 1:
            raise SourceError(f"{where} has the folders {' and '.join(map(repr, same))} for one split. Join them.")
    return roles


def _without_unlabelled(labelled: list[Labelled], train: set[str], where: str, report: SourceReport) -> list[Labelled]:
    """Leave out a test folder whose one sub-folder is no class, as ``test/images`` of unlabelled images."""
    for role in ("val", "test"):
        classes = {str(item.label) for item in labelled if item.split == role}
        unknown = sorted(classes - train)
        if len(classes) == 1 and unknown:
            for item in labelled:
                if item.split == role:
                    report.leave_out(_UNLABELLED, item.name)
            labelled = [item for item in labelled if item.split != role]
        elif unknown:
            raise SourceError(
                f"{where}: the {role} folder has the classes {unknown[:10]}, which train/ has not. "
                "Every class needs training images."
            )
    return labelled


def _check_empty(
    shown: Sequence[str], labelled: Sequence[Labelled], roles: dict[str, str], wrapper: str, where: str
) -> None:
    depth = 1 if roles else 0
    full = {tuple(item.name.removeprefix(wrapper).split("/")[: depth + 1]) for item in labelled}
    empty = dict.fromkeys(
        "/".join(parts[: depth + 1])
        for name in shown
        if name.startswith(wrapper)
        for parts in [name.removeprefix(wrapper).split("/")]
        if len(parts) > depth + 1 and tuple(parts[: depth + 1]) not in full
        if not roles or roles.get(parts[0]) == "train"
    )
    if empty:
        names = list(empty)
        raise SourceError(
            f"{where}: {len(names)} class {'folder holds' if len(names) == 1 else 'folders hold'} no images: "
            f"{', '.join(map(repr, names[:20]))}. Move images there, or remove {'it' if len(names) == 1 else 'them'}."
        )


def _check_single_class(
    tree: FileTree, labelled: Sequence[Labelled], shown: Sequence[str], wrapper: str, where: str
) -> None:
    """Refuse one class with a table beside it, whose labels would be lost."""
    tables = [name for name in shown if _ending(name) in TABLE_ENDINGS]
    if len({item.label for item in labelled}) > 1 or not tables:
        return
    fields = suggested_fields(tree, tables[0], [item.name for item in labelled])
    lines = ", ".join(f"{name} = {value!r}" for name, value in fields.items())
    raise LabelsTableError(
        f"{where}: all images are in the one class folder {labelled[0].label!r}, and there is a table {tables[0]!r}. If it "
        f"holds the labels, add to [data]: {lines}. If not, remove it.",
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
    looks_for=_LOOKS_FOR,
    recognise=_recognise,
    files=_files,
    images=_images,
    general=True,
)
