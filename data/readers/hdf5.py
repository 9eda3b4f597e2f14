"""Data sets in an HDF5 file: images and labels by name, and the ``dataset.h5`` that lsmix writes.

Before HDF5 reads anything, this module checks that the numbers are in this file, fit its size, use known filters, and that each chunk
unpacks to exactly its size. Held-out images of a ``dataset.h5`` count as training images again.
"""

import math
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy.typing as npt

from lsmix.data.dataset import SPLIT_NAMES, DataSet, open_dataset
from lsmix.data.errors import SourceError
from lsmix.data.readers.named_arrays import LAYOUTS, choose_names, number_classes, to_split
from lsmix.data.readers.source_images import (
    UNPACK_RATIO,
    PublishedData,
    SourceFormat,
    Split,
    has_ending,
    join_splits,
    most_unpacked,
    refused_if_damaged,
)

__all__ = ["HDF5"]

_KEYS = sorted({name for layout in LAYOUTS for names in layout for name in names})
_NAMES = "class_names"
_SPARE_BYTES = 256 << 20  # that any array may take: labels alone can shrink a thousandfold, images don't
_MAX_CHUNK_BYTES = 256 << 20  # HDF5 unpacks a chunk in memory, and takes up to four times as much on the way
_PIECE_BYTES = 1 << 16
_SLACK_BYTES = 64  # by which deflate may lengthen a chunk, beside a fiftieth of it
_CHECKSUM_BYTES = 4  # that fletcher32 puts behind a chunk
_FILTERS = frozenset(
    [h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32, h5py.h5z.FILTER_LZF]
)
# What h5py raises on damaged files.
_ERRORS = (OSError, RuntimeError, LookupError, TypeError, ValueError, OverflowError, MemoryError, zlib.error)


def _recognise(path: Path) -> bool:
    return path.is_file() and has_ending(path, (".h5", ".hdf5"))


def _read(path: Path) -> PublishedData:
    # Locking is off, since read-only mounts refuse locks.
    with (
        refused_if_damaged(repr(str(path)), "HDF5 file", *_ERRORS, advice="Write it again."),
        h5py.File(path, "r", locking=False) as file,
    ):
        ours = "format_version" in file.attrs and set(SPLIT_NAMES) <= set(file)
        data = None if ours else _read_foreign(path, file)
    return data or _from_ours(open_dataset(path))


def _from_ours(data: DataSet) -> PublishedData:
    own = {name: Split(split.images, split.labels) for name, split in data.splits.items() if len(split)}
    splits = {"train": join_splits([own[name] for name in ("train", "heldout") if name in own])}
    if "test" in own:
        splits["test"] = own["test"]
    return PublishedData(splits=splits, class_names=data.class_names, licence=data.licence, citation=data.citation)


def _read_foreign(path: Path, file: Any) -> PublishedData:
    where = repr(str(path))
    keys = [key for key in _KEYS if _find_array(where, file, key) is not None]
    splits = {}
    for split, names in choose_names(where, keys, file).items():
        images, labels = (_read_numbers(path, _find_array(where, file, name)) for name in names)
        splits[split] = to_split(where, names, images, labels)
    stored = _find_array(where, file, _NAMES)
    class_names = number_classes(where, splits) if stored is None else _read_names(path, stored)
    return PublishedData(splits=splits, class_names=class_names)


def _find_array(where: str, file: Any, name: str) -> Any:
    """Return an array of the file by its path, or None if there is none; a link to elsewhere is a SourceError."""
    item = file
    for part in name.split("/"):
        link = item.get(part, getlink=True) if isinstance(item, h5py.Group) else None
        if link is None:
            return None
        if not isinstance(link, h5py.HardLink):
            raise SourceError(
                f"{where} links {name!r} to another place, which is never followed. Copy the data into it."
            )
        item = item[part]
    return item if isinstance(item, h5py.Dataset) else None


def _read_names(path: Path, item: Any) -> tuple[str, ...]:
    stored = item.id.get_type()
    if not isinstance(stored, h5py.h5t.TypeStringID) or stored.is_variable_str() or item.ndim != 1:
        raise SourceError(
            f"{item.name!r} of {str(path)!r} must be a one-dimensional array of text of fixed length; got {item.dtype} of "
            f"shape {item.shape}. Save numpy.char.encode([...names...], 'utf-8')."
        )
    _check_storage(path, item)
    return tuple(name.decode("utf-8", "replace") for name in item[:].tolist())


def _read_numbers(path: Path, item: Any) -> npt.NDArray[Any]:
    if not isinstance(item.id.get_type(), h5py.h5t.TypeIntegerID | h5py.h5t.TypeFloatID):
        raise SourceError(
            f"{item.name!r} of {str(path)!r} holds {item.dtype}; only plain numbers are read, never objects or records."
        )
    _check_storage(path, item)
    array: npt.NDArray[Any] = item[...]
    return array


def _check_storage(path: Path, item: Any) -> None:
    """Raise SourceError if reading an array could reach outside the file or take far more memory than it has bytes."""
    where = f"{item.name!r} of {str(path)!r}"
    plist = item.id.get_create_plist()
    if plist.get_layout() == h5py.h5d.VIRTUAL or plist.get_external_count():
        raise SourceError(f"{where} is stored in other files, which are never opened. Copy the data into it.")
    file_bytes = path.stat().st_size
    size = math.prod(map(int, item.shape)) * item.id.get_type().get_size()
    if size > most_unpacked(file_bytes, _SPARE_BYTES):
        raise SourceError(
            f"{where} would take {size} bytes, more than {UNPACK_RATIO} times those of its file ({file_bytes}). "
            "Do not use it, or write it again without filters."
        )
    if plist.get_layout() == h5py.h5d.CHUNKED:
        _check_chunks(where, item, plist, file_bytes)
    elif min(item.id.get_storage_size(), file_bytes) < size:
        raise _unwritten(where)


def _unwritten(where: str) -> SourceError:
    # HDF5 reads missing chunks as zeros.
    return SourceError(f"{where} was never written whole, or is damaged. Write it again.")


def _check_chunks(where: str, item: Any, plist: Any, file_bytes: int) -> None:
    filters = [plist.get_filter(index) for index in range(plist.get_nfilters())]
    codes = [code for code, *_ in filters]
    chunk = math.prod(map(int, item.chunks)) * item.id.get_type().get_size()
    packer = next((code for code in codes if code in _UNPACKED_SIZES), None)
    after = codes[codes.index(packer) + 1 :] if packer is not None else []
    odd = len(set(codes)) < len(codes) or set(_UNPACKED_SIZES) <= set(codes)
    if not set(codes) <= _FILTERS or odd or after not in ([], [h5py.h5z.FILTER_FLETCHER32]):
        raise SourceError(
            f"{where} is stored through filters that are not read here; shuffle, then gzip or lzf, then fletcher32 are. "
            "Write it again."
        )
    if chunk > _MAX_CHUNK_BYTES:
        raise SourceError(
            f"{where} has chunks of {chunk} bytes; at most {_MAX_CHUNK_BYTES} are read. Write it again with smaller chunks."
        )
    for code, _, values, _ in filters:
        # The third value of LZF is the size that it sets aside for a chunk.
        if code == h5py.h5z.FILTER_LZF and len(values) > 2 and values[2] > chunk:
            raise SourceError(f"{where} is damaged: its filter expects other chunks. Do not use it.")
    count = math.prod(-(-length // side) for length, side in zip(item.shape, item.chunks, strict=True))
    if count > file_bytes or item.id.get_num_chunks() != count:
        raise _unwritten(where)
    stored: list[Any] = []
    item.id.chunk_iter(stored.append)  # in one pass; asked for one by one, each would be searched from the first on
    for info in stored:
        _check_chunk(where, item, info, codes, chunk)


def _check_chunk(where: str, item: Any, info: Any, codes: list[int], chunk: int) -> None:
    """Refuse a chunk that is not stored as, or does not unpack to, exactly the bytes of a chunk.

    Bit i of a chunk's mask says that filter i was left out for it: HDF5 does so where packing would not make it smaller.
    """
    used = [code for index, code in enumerate(codes) if not info.filter_mask >> index & 1]
    whole = chunk + _CHECKSUM_BYTES * (h5py.h5z.FILTER_FLETCHER32 in used)
    packer = next((code for code in used if code in _UNPACKED_SIZES), None)
    # Packing gives up where it would not shorten a chunk; deflate may lengthen it by a few bytes.
    if info.size > whole + chunk // 50 + _SLACK_BYTES or (packer is None and info.size != whole):
        raise SourceError(f"{where} is damaged: a chunk of {whole} bytes is stored in {info.size}. Do not use it.")
    if packer is not None:
        _, packed = item.id.read_direct_chunk(info.chunk_offset)
        if (size := _UNPACKED_SIZES[packer](packed[: len(packed) - (whole - chunk)], chunk)) != chunk:
            some = "more than" if size > chunk else f"{size} of"
            raise SourceError(f"{where} has a chunk that unpacks to {some} its {chunk} bytes. Do not use it.")


def _deflated_size(packed: bytes, most: int) -> int:
    """Return what a zlib stream unpacks to, or something above ``most``; it is never whole in memory."""
    unpacker, size = zlib.decompressobj(), 0
    for start in range(0, len(packed), _PIECE_BYTES):
        piece = packed[start : start + _PIECE_BYTES]
        while piece and size <= most and not unpacker.eof:
            size += len(unpacker.decompress(piece, _PIECE_BYTES))
            piece = unpacker.unconsumed_tail
    while size <= most and (rest := unpacker.decompress(b"", _PIECE_BYTES)):
        size += len(rest)
    if size <= most and not unpacker.eof:
        raise ValueError("a chunk is cut short")
    return size


def _lzf_size(packed: bytes, most: int) -> int:
    """Return what LZF unpacks to, or something above ``most``, without unpacking.

    Each piece begins with a byte: below 32, one more than so many bytes follow as they are; else its upper three bits, and
    a byte more where all are set, say how many bytes are repeated, and a byte says from where.
    """
    at = size = 0
    while at < len(packed) and size <= most:
        control = packed[at]
        if control < 32:
            at, size = at + control + 2, size + control + 1
        else:
            long = control >> 5 == 7
            at, size = at + 2 + long, size + 2 + (control >> 5) + (packed[at + 1] if long else 0)
    return size


_UNPACKED_SIZES = {h5py.h5z.FILTER_DEFLATE: _deflated_size, h5py.h5z.FILTER_LZF: _lzf_size}
HDF5 = SourceFormat(name="hdf5", recognise=_recognise, read=_read)
