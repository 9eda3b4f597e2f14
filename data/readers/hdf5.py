"""Reader for HDF5 files with arrays of images and labels, including the ``dataset.h5`` that lsmix writes.

Before HDF5 reads any data, this module checks that the arrays are stored in this file, are plausible for its size, use
known filters, and that every chunk decompresses to exactly its size. Held-out images of a ``dataset.h5`` are read as
training images.
"""

import math
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy.typing as npt

from lsmix.data.dataset import SPLIT_NAMES, DataSet, open_dataset
from lsmix.data.errors import SourceError, format_bytes
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
_SPARE_BYTES = 256 << 20  # any compression ratio is allowed up to this size; labels, unlike images, can exceed 1000:1
_MAX_CHUNK_BYTES = 256 << 20  # HDF5 decompresses a chunk in memory, where it needs up to four times its size
_PIECE_BYTES = 1 << 16
_SLACK_BYTES = 64  # deflate may enlarge a chunk by this number of bytes plus 2%
_CHECKSUM_BYTES = 4  # appended to a chunk by fletcher32
_FILTERS = frozenset(
    [h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32, h5py.h5z.FILTER_LZF]
)
# Exceptions that h5py raises for damaged files.
_ERRORS = (OSError, RuntimeError, LookupError, TypeError, ValueError, OverflowError, MemoryError, zlib.error)


def _recognise(path: Path) -> bool:
    return path.is_file() and has_ending(path, (".h5", ".hdf5"))


def _read(path: Path) -> PublishedData:
    # Without locking, because read-only mounts do not support locks.
    with (
        refused_if_damaged(repr(str(path)), "an HDF5 file", *_ERRORS, advice="Write it again."),
        h5py.File(path, "r", locking=False) as file,
    ):
        written_by_lsmix = "format_version" in file.attrs and set(SPLIT_NAMES) <= set(file)
        data = None if written_by_lsmix else _read_arrays(path, file)
    return data or _from_dataset(open_dataset(path))


def _from_dataset(data: DataSet) -> PublishedData:
    stored = {name: Split(split.images, split.labels) for name, split in data.splits.items() if len(split)}
    splits = {"train": join_splits([stored[name] for name in ("train", "heldout") if name in stored])}
    if "test" in stored:
        splits["test"] = stored["test"]
    return PublishedData(splits=splits, class_names=data.class_names, licence=data.licence, citation=data.citation)


def _read_arrays(path: Path, file: Any) -> PublishedData:
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
    """Return an array by its path in the file, or None if it does not exist; raise SourceError for links."""
    item = file
    for part in name.split("/"):
        link = item.get(part, getlink=True) if isinstance(item, h5py.Group) else None
        if link is None:
            return None
        if not isinstance(link, h5py.HardLink):
            raise SourceError(
                f"{where} contains {name!r} as a link. lsmix does not follow links; copy the data into the file."
            )
        item = item[part]
    return item if isinstance(item, h5py.Dataset) else None


def _read_names(path: Path, item: Any) -> tuple[str, ...]:
    stored = item.id.get_type()
    if not isinstance(stored, h5py.h5t.TypeStringID) or stored.is_variable_str() or item.ndim != 1:
        raise SourceError(
            f"{item.name!r} in {str(path)!r} must be a one-dimensional array of fixed-length strings; got {item.dtype} "
            f"of shape {item.shape}. Save numpy.char.encode([...names...], 'utf-8')."
        )
    _check_storage(path, item)
    return tuple(name.decode("utf-8", "replace") for name in item[:].tolist())


def _read_numbers(path: Path, item: Any) -> npt.NDArray[Any]:
    if not isinstance(item.id.get_type(), h5py.h5t.TypeIntegerID | h5py.h5t.TypeFloatID):
        raise SourceError(
            f"{item.name!r} in {str(path)!r} has the type {item.dtype}; lsmix reads numbers, no objects or records."
        )
    _check_storage(path, item)
    array: npt.NDArray[Any] = item[...]
    return array


def _check_storage(path: Path, item: Any) -> None:
    """Raise SourceError if reading an array could access other files or need far more memory than the file's size."""
    where = f"{item.name!r} in {str(path)!r}"
    plist = item.id.get_create_plist()
    if plist.get_layout() == h5py.h5d.VIRTUAL or plist.get_external_count():
        raise SourceError(f"{where} is stored in other files, which lsmix does not open. Copy the data into this file.")
    file_bytes = path.stat().st_size
    size = math.prod(map(int, item.shape)) * item.id.get_type().get_size()
    if size > most_unpacked(file_bytes, _SPARE_BYTES):
        raise SourceError(
            f"{where} needs {format_bytes(size)}, more than {UNPACK_RATIO} times the size of the file "
            f"({format_bytes(file_bytes)}). If you trust it, write it again without filters."
        )
    if plist.get_layout() == h5py.h5d.CHUNKED:
        _check_chunks(where, item, plist, file_bytes)
    elif min(item.id.get_storage_size(), file_bytes) < size:
        raise _incomplete(where)


def _incomplete(where: str) -> SourceError:
    # Checked here because HDF5 reads missing chunks as zeros.
    return SourceError(f"{where} was not written completely, or is damaged. Write it again.")


def _check_chunks(where: str, item: Any, plist: Any, file_bytes: int) -> None:
    filters = [plist.get_filter(index) for index in range(plist.get_nfilters())]
    codes = [code for code, *_ in filters]
    chunk = math.prod(map(int, item.chunks)) * item.id.get_type().get_size()
    packer = next((code for code in codes if code in _UNPACKED_SIZES), None)
    after = codes[codes.index(packer) + 1 :] if packer is not None else []
    repeated = len(set(codes)) < len(codes) or set(_UNPACKED_SIZES) <= set(codes)
    if not set(codes) <= _FILTERS or repeated or after not in ([], [h5py.h5z.FILTER_FLETCHER32]):
        raise SourceError(
            f"{where} uses filters that lsmix does not support. Write it again without filters, or with shuffle, then "
            "gzip or lzf, then fletcher32."
        )
    if chunk > _MAX_CHUNK_BYTES:
        raise SourceError(
            f"{where} has chunks of {format_bytes(chunk)}; lsmix reads chunks of at most "
            f"{format_bytes(_MAX_CHUNK_BYTES)}. Write it again with smaller chunks."
        )
    for code, _, values, _ in filters:
        # The third value of LZF is the size of the buffer that it allocates for a chunk.
        if code == h5py.h5z.FILTER_LZF and len(values) > 2 and values[2] > chunk:
            raise SourceError(f"{where} is damaged: its filter expects chunks of another size. Write it again.")
    count = math.prod(-(-length // side) for length, side in zip(item.shape, item.chunks, strict=True))
    if count > file_bytes or item.id.get_num_chunks() != count:
        raise _incomplete(where)
    stored: list[Any] = []
    item.id.chunk_iter(stored.append)  # one pass; get_chunk_info(i) would search from the first chunk for every i
    for info in stored:
        _check_chunk(where, item, info, codes, chunk)


def _check_chunk(where: str, item: Any, info: Any, codes: list[int], chunk: int) -> None:
    """Raise SourceError if a chunk is not stored with, or does not decompress to, exactly its nominal size.

    Bit i of a chunk's mask means that filter i was skipped. HDF5 skips compression that would not make a chunk smaller.
    """
    used = [code for index, code in enumerate(codes) if not info.filter_mask >> index & 1]
    full = chunk + _CHECKSUM_BYTES * (h5py.h5z.FILTER_FLETCHER32 in used)
    packer = next((code for code in used if code in _UNPACKED_SIZES), None)
    # Deflate may enlarge a chunk by a few bytes.
    if info.size > full + chunk // 50 + _SLACK_BYTES or (packer is None and info.size != full):
        raise SourceError(f"{where} is damaged: a chunk of {full} bytes is stored in {info.size}. Write it again.")
    if packer is not None:
        _, packed = item.id.read_direct_chunk(info.chunk_offset)
        if (size := _UNPACKED_SIZES[packer](packed[: len(packed) - (full - chunk)], chunk)) != chunk:
            some = "more than" if size > chunk else f"{size} of"
            raise SourceError(f"{where} has a chunk that unpacks to {some} its {chunk} bytes. Write it again.")


def _deflated_size(packed: bytes, most: int) -> int:
    """Return the decompressed size of a zlib stream, or a number above ``most``, in constant memory."""
    unpacker, size = zlib.decompressobj(), 0
    for start in range(0, len(packed), _PIECE_BYTES):
        piece = packed[start : start + _PIECE_BYTES]
        while piece and size <= most and not unpacker.eof:
            size += len(unpacker.decompress(piece, _PIECE_BYTES))
            piece = unpacker.unconsumed_tail
    while size <= most and (rest := unpacker.decompress(b"", _PIECE_BYTES)):
        size += len(rest)
    if size <= most and not unpacker.eof:
        raise ValueError("a chunk is truncated")
    return size


def _lzf_size(packed: bytes, most: int) -> int:
    """Return the decompressed size of LZF data, or a number above ``most``, without decompressing it.

    Each item begins with a control byte. A control byte n below 32 precedes n + 1 literal bytes. Otherwise the item is
    a back reference: its length is given by the upper three bits, plus one more byte if they are all set; a further
    byte gives the lower part of the offset.
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
