"""The data-set store ``dataset.h5``: train, held-out and test images in a layout that can be memory-mapped.

Every row of a published split is in at most one split of the store, so test images cannot be in train.

Layout: one HDF5 group per split (train, heldout, test) with the contiguous, unfiltered datasets ``images`` uint8
(N, H, W, C), ``labels`` int64 (N,) and ``source_index`` int64 (N,), which is the row in the published split named by the
group's attribute ``published_split``. The dataset ``class_names`` contains a JSON list as bytes. The file has the
attributes ``format_version``, ``licence`` and ``citation``. Strings are UTF-8 of fixed length.
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
from lsmix.data.errors import CorruptError, FormatError, LsmixError, MissingError
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
MAX_TEXT_BYTES = 60_000  # HDF5 limits an attribute to 64 KiB
MAX_NAMES_BYTES = 16 << 20  # of all class names; those of ImageNet-21k take 500 kB
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_REBUILD = "Download it again, or rebuild it with 'lsmix ingest'."
COLUMNS = {"images": ("|u1", 4), "labels": ("<i8", 1), "source_index": ("<i8", 1)}  # name -> dtype, dimensions


@dataclass(frozen=True, eq=False, slots=True)
class SplitArrays:
    """One split of an open data set, with read-only arrays; images are memory-mapped."""

    images: npt.NDArray[np.uint8]  # (N, H, W, C), memory-mapped
    labels: npt.NDArray[np.int64]  # (N,)
    source_index: npt.NDArray[np.int64]  # (N,), row in the published split
    published_split: str  # "train" or "test"

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Return copies of the given images, uint8 (n, H, W, C); they are read in file order."""
        images = np.empty((len(rows), *self.images.shape[1:]), np.uint8)
        order = np.argsort(rows)
        images[order] = self.images[rows[order]]
        return images

    def __reduce__(self) -> NoReturn:
        raise TypeError("a split cannot be pickled, since that would copy all of its images. Pass the path instead.")


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class DataSet:
    """An open data set. It needs no closing: there is no file handle, and the maps live as long as the arrays."""

    location: str  # path or URL of the file, for messages
    splits: Mapping[str, SplitArrays]  # "train", "heldout", "test"
    class_names: tuple[str, ...]  # by label
    licence: str  # "" if unknown
    citation: str  # "" if unknown

    @property
    def train(self) -> SplitArrays:
        """Images for training flows and classifiers."""
        return self.splits["train"]

    @property
    def heldout(self) -> SplitArrays:
        """Published training images held out to monitor training; may be empty."""
        return self.splits["heldout"]

    @property
    def test(self) -> SplitArrays:
        """Images for measuring error rates."""
        return self.splits["test"]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of every image."""
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels


def open_dataset(path: Path | str | Artifact) -> DataSet:
    """Open a data set.

    Args:
        path: The file ``dataset.h5``, or its artifact, the artifact's folder or URL.

    Raises:
        MissingError: The file or folder does not exist.
        FormatError: The file is not a data set, or this version of lsmix does not support its version.
        CorruptError: The file is damaged or truncated.

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
        raise MissingError(f"no data set at {where!r}: the file does not exist. Create it with 'lsmix ingest'.")
    with path.open("rb") as raw:
        if raw.read(len(_SIGNATURE)) != _SIGNATURE:
            raise FormatError(f"{where!r} is not an HDF5 file: wrong signature. Create a data set with 'lsmix ingest'.")
    try:
        return _read_file(path, where)
    except LsmixError:
        raise
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:  # raised by h5py for damaged files
        raise CorruptError(f"{where!r} is damaged: {error}. {_REBUILD}") from error


def _locate(place: Path | str | Artifact) -> tuple[Path, str]:
    """Return the path of a data set's file, and its name in messages."""
    if not isinstance(place, Artifact):
        folder = local_folder(place)
        if folder is not None and not (folder / MANIFEST_NAME).exists():
            path = folder / DATASET_NAME if folder.is_dir() else folder
            return path, str(path)
        place = open_artifact(place)
    return place.file(DATASET_NAME), place.where(DATASET_NAME)


def _read_file(path: Path, where: str) -> DataSet:
    # No locking: complete files are never written again, and read-only mounts do not allow locks.
    with h5py.File(path, "r", locking=False) as file:
        version = _attribute(file, "format_version", h5py.h5t.TypeIntegerID)
        if version is None:
            raise FormatError(f"{where!r} is not an lsmix data set: no format_version. See 'lsmix ingest --help'.")
        if version != FORMAT_VERSION:
            raise FormatError(
                f"data set {where!r} has format {version}; this version of lsmix reads format {FORMAT_VERSION}. "
                "Use a newer lsmix, or rebuild the data set with 'lsmix ingest'."
            )
        try:
            names = _map_array(path, where, file, "class_names", "|u1", 1)
            if len(names) > MAX_NAMES_BYTES:
                raise FormatError(
                    f"{where!r} has {len(names):,} bytes of class names; lsmix reads at most {MAX_NAMES_BYTES:,}."
                )
            class_names = msgspec.json.decode(names.tobytes(), type=tuple[str, ...])
        except msgspec.DecodeError as error:
            raise CorruptError(f"class_names of {where!r} is not a JSON list of names ({error}). {_REBUILD}") from error
        data_set = DataSet(
            location=where,
            splits={name: _read_split(path, where, file, name) for name in SPLIT_NAMES},
            class_names=class_names,
            licence=_text(where, file, "licence"),
            citation=_text(where, file, "citation"),
        )
    _check_consistent(data_set)
    return data_set


def _attribute(item: Any, name: str, kind: Any) -> Any:
    """Return a scalar attribute of an HDF5 type with a fixed size of at most 60,000 bytes, or None if there is none."""
    if name not in item.attrs:
        return None
    attribute = item.attrs.get_id(name)
    stored = attribute.get_type()
    is_variable = isinstance(stored, h5py.h5t.TypeStringID) and stored.is_variable_str()
    if not isinstance(stored, kind) or is_variable or attribute.shape != () or stored.get_size() > MAX_TEXT_BYTES:
        return None
    return item.attrs[name]


def _text(where: str, item: Any, name: str) -> str:
    value = _attribute(item, name, h5py.h5t.TypeStringID)
    if not isinstance(value, bytes):
        raise FormatError(f"{where!r} is not an lsmix data set: {item.name!r} has no string attribute {name!r}.")
    return value.decode()


def _own_link(where: str, parent: Any, name: str, kind: type) -> Any:
    link = parent.get(name, getlink=True)
    if link is None:
        raise FormatError(f"{where!r} is not an lsmix data set: {parent.name!r} has no {name!r}.")
    if not isinstance(link, h5py.HardLink):
        raise FormatError(
            f"{name!r} of {where!r} is a soft or external link, which a data set must not contain. {_REBUILD}"
        )
    item = parent[name]
    if not isinstance(item, kind):
        what = "group" if kind is h5py.Group else "dataset"
        raise FormatError(f"{where!r} is not an lsmix data set: {item.name!r} is not an HDF5 {what}.")
    return item


def _read_split(path: Path, where: str, file: Any, name: str) -> SplitArrays:
    group = _own_link(where, file, name, h5py.Group)
    published_split = _text(where, group, "published_split")
    images, labels, source_index = (_map_array(path, where, group, name, *COLUMNS[name]) for name in COLUMNS)
    if not len(images) == len(labels) == len(source_index):
        raise FormatError(
            f"split {name!r} of {where!r} has {len(images)} images, {len(labels)} labels and "
            f"{len(source_index)} source rows; expected equal numbers. {_REBUILD}"
        )
    return SplitArrays(images, labels, source_index, published_split)


def _map_array(path: Path, where: str, group: Any, name: str, dtype: str, dimensions: int) -> npt.NDArray[Any]:
    """Memory-map an HDF5 dataset, and reject it unless its bytes are one contiguous block of this file."""
    item = _own_link(where, group, name, h5py.Dataset)
    wanted = h5py.h5t.STD_U8LE if dtype == "|u1" else h5py.h5t.STD_I64LE
    if not item.id.get_type().equal(wanted) or item.ndim != dimensions:
        raise FormatError(
            f"{item.name!r} of {where!r} must be {np.dtype(dtype)} with {dimensions} dimensions; "
            f"got {item.dtype} of shape {item.shape}. {_REBUILD}"
        )
    plist = item.id.get_create_plist()
    if plist.get_layout() != h5py.h5d.CONTIGUOUS or plist.get_external_count() or plist.get_nfilters():
        raise FormatError(
            f"{item.name!r} of {where!r} must be one contiguous block of this file, without external, virtual, chunked "
            f"or filtered storage. {_REBUILD}"
        )
    size = math.prod(map(int, item.shape)) * np.dtype(dtype).itemsize
    offset = item.id.get_offset()
    if size == 0:
        mapped = np.empty(item.shape, dtype)
    elif offset is None or offset + size > path.stat().st_size:
        raise CorruptError(
            f"{where!r} is truncated: {item.name!r} needs {size:,} bytes at offset {offset}, but the file has "
            f"{path.stat().st_size:,} bytes. {_REBUILD}"
        )
    else:
        mapped = np.memmap(path, dtype, "r", offset, item.shape)
    array: npt.NDArray[Any] = mapped.view(np.ndarray)
    array.flags.writeable = False
    return array


def _check_consistent(data_set: DataSet) -> None:
    where, classes = data_set.location, len(data_set.class_names)
    train = data_set.train
    if not len(train) or 0 in train.images.shape:
        raise FormatError(f"{where!r} contains no training images. {_REBUILD}")
    for name, split in data_set.splits.items():
        if split.images.shape[1:] != train.images.shape[1:]:
            raise FormatError(
                f"{where!r} has images of different shapes in 'train' and {name!r}: {train.images.shape[1:]} and "
                f"{split.images.shape[1:]}. {_REBUILD}"
            )
        if len(split) and not 0 <= int(split.labels.min()) <= int(split.labels.max()) < classes:
            raise CorruptError(
                f"{where!r} is damaged: labels of {name!r} are from {split.labels.min()} to {split.labels.max()}, "
                f"expected 0 to {classes - 1}. {_REBUILD}"
            )
    for published in {split.published_split for split in data_set.splits.values()}:
        rows = np.concatenate([s.source_index for s in data_set.splits.values() if s.published_split == published])
        if len(np.unique(rows)) != len(rows):
            raise CorruptError(
                f"{where!r} contains a published {published!r} image twice, so its splits may overlap. {_REBUILD}"
            )
