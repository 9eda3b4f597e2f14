"""Reader for WebDataset: tars in which an image and a ``.cls`` or ``.json`` file with the same base name form a sample.

Splits are derived from the names of the tar files, such as ``train-000.tar`` and ``val-000.tar``; other names contain
training images. The label is the content of ``.cls``, or the field ``data.label_column`` or ``cls`` of ``.json``. Rows
keep the order of the tars.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec

from lsmix.data.errors import SourceError
from lsmix.data.readers.images.pixels import IMAGE_ENDINGS, is_image_name
from lsmix.data.readers.images.splits import Labelled, leave_out_beside, make_listing, role_in
from lsmix.data.readers.source_images import ImageConfig, ImageListing, SourceFormat, SourceReport, has_ending
from lsmix.data.readers.trees import TarTree, peek_names

__all__ = ["WEBDATASET"]

_ENDINGS = (".tar", ".tar.gz", ".tgz")
_MAX_LABEL_BYTES = 1 << 20
_LABELS = (".cls", ".json")


def _tars(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.iterdir() if has_ending(file, _ENDINGS) and not file.name.startswith("."))
    return [path] if has_ending(path, _ENDINGS) else []


def _recognise(path: Path) -> bool:
    tars = _tars(path)
    if not tars:
        return False
    names = peek_names(tars[0])
    return any(name.endswith(_LABELS) for name in names) and any(map(is_image_name, names))


@contextmanager
def _images(path: Path, config: ImageConfig) -> Iterator[ImageListing]:
    tars = _tars(path)
    if not tars:
        raise SourceError(f"{str(path)!r} contains no tar files. Check the path.")
    with ExitStack() as stack:
        trees = {tar.name: TarTree(tar, stack) for tar in tars}
        report = SourceReport(found=0)
        leave_out_beside(path, report)
        labelled = [item for name, tree in trees.items() for item in _samples(name, tree, config, report)]
        yield make_listing(labelled, repr(str(path)), report, _by_tar(trees, "read"), _by_tar(trees, "label"))


def _by_tar(trees: dict[str, TarTree], method: str) -> Callable[[str], Any]:
    def call(name: str) -> Any:
        tar, _, member = name.partition("/")
        return getattr(trees[tar], method)(member)

    return call


def _samples(tar: str, tree: TarTree, config: ImageConfig, report: SourceReport) -> Iterator[Labelled]:
    role = role_in(tar)
    images: dict[str, list[str]] = {}
    labels: dict[str, str] = {}
    for name in tree.in_order():
        folder, slash, file = name.rpartition("/")
        base, _, ending = file.partition(".")
        key, ending = folder + slash + base, f".{ending.lower()}"
        if ending in IMAGE_ENDINGS:
            images.setdefault(key, []).append(name)
            report.found += 1
        elif ending in _LABELS:
            labels.setdefault(key, name)
        else:
            report.found += 1
            report.leave_out(f"not a supported image type ({ending})", f"{tar}/{name}")
    for key, names in images.items():
        label = _label(tree, labels.get(key, ""), config)
        for extra in names if label is None else names[1:]:
            reason = "without a label" if label is None else "an additional image of a sample"
            report.leave_out(reason, f"{tar}/{extra}")
        if label is not None:
            yield Labelled(f"{tar}/{names[0]}", label, role)


def _label(tree: TarTree, name: str, config: ImageConfig) -> str | int | None:
    if not name:
        return None
    content = tree.read(name, _MAX_LABEL_BYTES)
    try:
        if name.endswith(".cls"):
            text = content.decode().strip()
            return int(text) if re.fullmatch("[0-9]{1,9}", text) else text or None
        fields = msgspec.json.decode(content, type=dict[str, Any])
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{tree.label(name)} does not contain a label ({error}). Correct it.") from error
    label = fields.get(config.label_column, fields.get("cls"))
    return label if isinstance(label, str | int) and label != "" else None


WEBDATASET = SourceFormat(
    name="webdataset",
    recognise=_recognise,
    files=_tars,
    images=_images,
)
