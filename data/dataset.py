"""The data-set store ``dataset.h5``: train, held-out and test images, laid out so that they can be memory-mapped.

Every row of a published split goes to one of our splits at most; test images can never get into train.

Layout: one HDF5 group a split (train, heldout, test) with the contiguous, unfiltered datasets ``images`` uint8
(N, H, W, C), ``labels`` int64 (N,) and ``source_index`` int64 (N,), the row in the published split that the group's
attribute ``published_split`` names. The dataset ``class_names`` holds the bytes of a JSON list. Attributes of the file:
``format_version``, ``licence``, ``citation``. Texts are UTF-8 of fixed length.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import h5py
import msgspec
import numpy as np
import numpy.typing as npt

from lsmix.data.artifact import MANIFEST_NAME, Artifact
from lsmix.data.errors import (
    CorruptError,
    FormatError,
    LsmixError,
    MissingError,
)
from lsmix.data.store import local_folder, open_artifact

__all__ = [
    "COLUMNS",
    "DATASET_NAME",
    "FORMAT_VERSION",
    "MAX_NAMES_BYTES",
    "MAX_TEXT_BYTES",
    "SPLIT_NAMES",
    "DataSet",
    "SplitArrays",
    "open_dataset",
]

DATASET_NAME = "dataset.h5"
FORMAT_VERSION = 2
SPLIT_NAMES = ("train", "heldout", "test")
MAX_TEXT_BYTES = 60_000  # an attribute of HDF5 ends at 64 KiB
MAX_NAMES_BYTES = 16 << 20  # of all class names; those of ImageNet-21k have 500 kB
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
COLUMNS = {"images": ("|u1", 4), "labels": ("<i8", 1), "source_index": ("<i8", 1)}  # name -> dtype, dimensions


@dataclass(frozen=True, eq=False, slots=True)
class SplitArrays:
    """One split of an open data set; all arrays are read-only, images stay on disk until they are read."""

    images: npt.NDArray[np.uint8]  # (N, H, W, C), memory-mapped
    labels: npt.NDArray[np.int64]  # (N,)
    source_index: npt.NDArray[np.int64]  # (N,), row in the published split
    published_split: str  # "train" or "test"

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Return a copy of some images, uint8 (n, H, W, C), read in the order of the file."""
        images = np.empty((len(rows), *self.images.shape[1:]), np.uint8)
        order = np.argsort(rows)
        images[order] = self.images[rows[order]]
        return images

    def __reduce__(self) -> NoReturn:
        raise TypeError("a split is never pickled, since that would copy all of its images; pass the path instead")


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class DataSet:
    """An open data set. It holds no file handle; the maps last as long as the arrays."""

    location: str  # of the file, in messages
    splits: Mapping[str, SplitArrays]  # "train", "heldout", "test"
    class_names: tuple[str, ...]  # by label
    licence: str  # "" where it is unknown
    citation: str  # "" where it is unknown

    @property
    def train(self) -> SplitArrays:
        """What flows and classifiers learn from."""
        return self.splits["train"]

    @property
    def heldout(self) -> SplitArrays:
        """Published training images kept back to watch the training; perhaps none."""
        return self.splits["heldout"]

    @property
    def test(self) -> SplitArrays:
        """What error rates are taken on."""
        return self.splits["test"]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of every image."""
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels


def open_dataset(path: Path | str | Artifact) -> DataSet:
    """Open a data set: the file ``dataset.h5``, or the artifact that holds it, by its folder or its URL.

    Raises:
        MissingError: there is no such file or folder.
        FormatError: it is no data set of a version that this lsmix reads, or not laid out as one.
        CorruptError: it is damaged or cut short.

    Example:
        >>> import tempfile
        >>> from lsmix.data.readers.digits import read_digits
        >>> from lsmix.data.readers.dataset_writer import write_dataset
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "dataset.h5"
        ...     counts = write_dataset(path, read_digits(), heldout=100, test=0, limit=None, seed=0)
        ...     open_dataset(path).train.images.shape
        (1400, 8, 8, 1)
    """
    path, where = _locate(path)
    if not path.is_file():
        raise MissingError(f"no data set at {where!r}: there is no such file. Make it with 'lsmix ingest'.")
    with path.open("rb") as raw:
        if raw.read(len(_SIGNATURE)) != _SIGNATURE:
            raise FormatError(f"{where!r} is no HDF5 file: it does not start as one. Make it with 'lsmix ingest'.")
    try:
        return _read_file(path, where)
    except LsmixError:
        raise
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:  # what h5py raises on damaged files
        raise CorruptError(f"{where!r} is damaged: {error}. Fetch it again or make it with 'lsmix ingest'.") from error


def _locate(place: Path | str | Artifact) -> tuple[Path, str]:
    """Return the file of a data set, and how to call it in messages."""
    if not isinstance(place, Artifact):
        folder = local_folder(place)
        if folder is not None and not (folder / MANIFEST_NAME).exists():
            path = folder / DATASET_NAME if folder.is_dir() else folder
            return path, str(path)
        place = open_artifact(place)
    return place.file(DATASET_NAME), place.where(DATASET_NAME)


def _read_file(path: Path, where: str) -> DataSet:
    # Locking is off, since a file that is complete is never written again and read-only mounts refuse locks.
    with h5py.File(path, "r", locking=False) as file:
        version = _attribute(file, "format_version", h5py.h5t.TypeIntegerID)
        if version is None:
            raise FormatError(f"{where!r} is no lsmix data set: it has no format_version. See 'lsmix ingest --help'.")
        if version != FORMAT_VERSION:
            raise FormatError(
                f"data set {where!r} has format {version}; this version of lsmix reads format {FORMAT_VERSION}. "
                "Use a newer lsmix, or make the data set again with 'lsmix ingest'."
            )
        try:
            names = _map_array(path, where, file, "class_names", "|u1", 1)
            if len(names) > MAX_NAMES_BYTES:
                raise FormatError(
                    f"{where!r} has {len(names)} bytes of class names; at most {MAX_NAMES_BYTES} are read."
                )
            class_names = msgspec.json.decode(names.tobytes(), type=tuple[str, ...])
        except msgspec.DecodeError as error:
            raise CorruptError(f"{where!r} is damaged: class_names is no JSON list of names ({error}).") from error
        data_set = DataSet(
            location=where,
            splits={name: _read_split(path, where, file, name) for name in SPLIT_NAMES},
            class_names=class_names,
            licence=_text(where, file, "licence"),
            citation=_text(where, file, "citation"),
        )
    _check_whole(data_set)
    return data_set


def _attribute(item: Any, name: str, kind: Any) -> Any:
    """Return a small scalar attribute, or None if there is none of this HDF5 type."""
    if name not in item.attrs:
        return None
    attribute = item.attrs.get_id(name)
    stored = attribute.get_type()
    free_length = isinstance(stored, h5py.h5t.TypeStringID) and stored.is_variable_str()
    if not isinstance(stored, kind) or free_length or attribute.shape != () or stored.get_size() > MAX_TEXT_BYTES:
        return None
    return item.attrs[name]


def _text(where: str, item: Any, name: str) -> str:
    value = _attribute(item, name, h5py.h5t.TypeStringID)
    if not isinstance(value, bytes):
        raise FormatError(f"{where!r} is no lsmix data set: {item.name!r} has no text {name!r}.")
    return value.decode()


def _own_link(where: str, parent: Any, name: str, kind: type) -> Any:
    link = parent.get(name, getlink=True)
    if link is None:
        raise FormatError(f"{where!r} is no lsmix data set: {parent.name!r} has no {name!r}.")
    if not isinstance(link, h5py.HardLink):
        raise FormatError(
            f"{where!r} links {name!r} to another place; data sets hold their own data. Do not use this file."
        )
    item = parent[name]
    if not isinstance(item, kind):
        raise FormatError(f"{where!r} is no lsmix data set: {item.name!r} is of another kind than expected.")
    return item


def _read_split(path: Path, where: str, file: Any, name: str) -> SplitArrays:
    group = _own_link(where, file, name, h5py.Group)
    published_split = _text(where, group, "published_split")
    images, labels, source_index = (_map_array(path, where, group, name, *COLUMNS[name]) for name in COLUMNS)
    if not len(images) == len(labels) == len(source_index):
        raise FormatError(
            f"split {name!r} of {where!r} has {len(images)} images, {len(labels)} labels and "
            f"{len(source_index)} source rows; expected as many of each. Do not use this file."
        )
    return SplitArrays(images, labels, source_index, published_split)


def _map_array(path: Path, where: str, group: Any, name: str, dtype: str, dimensions: int) -> npt.NDArray[Any]:
    """Memory-map one HDF5 dataset after refusing every way in which its bytes could be stored elsewhere."""
    item = _own_link(where, group, name, h5py.Dataset)
    wanted = h5py.h5t.STD_U8LE if dtype == "|u1" else h5py.h5t.STD_I64LE
    if not item.id.get_type().equal(wanted) or item.ndim != dimensions:
        raise FormatError(
            f"{item.name!r} of {where!r} must be {np.dtype(dtype)} with {dimensions} dimensions; "
            f"got {item.dtype} of shape {item.shape}. Do not use this file."
        )
    plist = item.id.get_create_plist()
    if plist.get_layout() != h5py.h5d.CONTIGUOUS or plist.get_external_count() or plist.get_nfilters():
        raise FormatError(
            f"{item.name!r} of {where!r} is not stored as one plain block of this file (external, virtual, chunked "
            "or filtered storage). Make the data set again with 'lsmix ingest'."
        )
    size = math.prod(map(int, item.shape)) * np.dtype(dtype).itemsize
    offset = item.id.get_offset()
    if size == 0:
        mapped = np.empty(item.shape, dtype)
    elif offset is None or offset + size > path.stat().st_size:
        raise CorruptError(
            f"{where!r} is cut short: {item.name!r} needs {size} bytes at offset {offset}, the file has "
            f"{path.stat().st_size}. Fetch it again or make it with 'lsmix ingest'."
        )
    else:
        mapped = np.memmap(path, dtype, "r", offset, item.shape)
    plain: npt.NDArray[Any] = mapped.view(np.ndarray)
    plain.flags.writeable = False
    return plain


def _check_whole(data_set: DataSet) -> None:
    where, classes = data_set.location, len(data_set.class_names)
    train = data_set.train
    if not len(train) or 0 in train.images.shape:
        raise FormatError(f"{where!r} holds no training images. Make it again with 'lsmix ingest'.")
    for name, split in data_set.splits.items():
        if split.images.shape[1:] != train.images.shape[1:]:
            raise FormatError(f"{where!r} holds images of several shapes: {name!r} has {split.images.shape[1:]}.")
        if len(split) and not 0 <= int(split.labels.min()) <= int(split.labels.max()) < classes:
            raise CorruptError(
                f"{where!r} is damaged: labels of {name!r} are in {split.labels.min()}..{split.labels.max()}, "
                f"expected 0..{classes - 1}. Make it again with 'lsmix ingest'."
            )
    for published in {split.published_split for split in data_set.splits.values()}:
        rows = np.concatenate([s.source_index for s in data_set.splits.values() if s.published_split == published])
        if len(np.unique(rows)) != len(rows):
            raise CorruptError(
                f"{where!r} holds the same published {published!r} image twice, so its splits are not apart. "
                "Make it again with 'lsmix ingest'."
            )
