"""One shard of a column: whole inner chunks of rows, each with its CRC32C behind it, and an index at the end.

The layout is Zarr v3's ``sharding_indexed`` codec with uncompressed, checksummed inner chunks, so that any Zarr library
reads it. The one rule: a reader goes by the shard's index, never by the order in which we write, since other writers
order chunks differently.
"""

from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from lsmix.data.errors import CorruptError

__all__ = ["CRC_BYTES", "check_chunk", "index_bytes", "read_index", "shard_bytes", "shard_pieces"]

CRC_BYTES = 4
_EMPTY = np.uint64(2**64 - 1)  # offset and size of a chunk that is not stored
_ENTRY = np.dtype("<u8")


def index_bytes(chunks: int) -> int:
    """Return the size of the index of a shard with room for ``chunks`` inner chunks, its checksum included."""
    return chunks * 2 * _ENTRY.itemsize + CRC_BYTES


def shard_bytes(rows: int, *, row_bytes: int, chunk_rows: int, shard_rows: int) -> int:
    """Return the size of a shard that holds ``rows`` rows, when its chunks lie back to back."""
    chunks = -(-rows // chunk_rows)
    return chunks * (chunk_rows * row_bytes + CRC_BYTES) + index_bytes(shard_rows // chunk_rows)


def shard_pieces(rows: NDArray[Any], *, chunk_rows: int, shard_rows: int) -> list[memoryview]:
    """Return the bytes of the shard that holds ``rows``, as pieces to be written one behind the other.

    Whole chunks are views of the rows' own memory: a shard of 25 MB is written without a copy.

    Args:
        rows: (n, …) with 1 ≤ n ≤ shard_rows; only a column's last shard has fewer than ``shard_rows``.
        chunk_rows: rows in an inner chunk, a divisor of ``shard_rows``.
        shard_rows: rows that a whole shard has.

    A last chunk that is not full is padded with zeros; chunks that lie wholly beyond the rows are left out.

    Raises:
        ValueError: the number of rows does not fit.

    Example:
        >>> import numpy as np
        >>> from lsmix.data.shard import shard_pieces
        >>> pieces = shard_pieces(np.zeros((3, 5), np.uint8), chunk_rows=2, shard_rows=4)
        >>> sum(len(piece) for piece in pieces)  # 2·(2·5 + 4) + 2·16 + 4
        64
    """
    if not 1 <= len(rows) <= shard_rows or shard_rows % chunk_rows:
        raise ValueError(f"{len(rows)} rows in chunks of {chunk_rows} do not make a shard of at most {shard_rows}.")
    content = np.ascontiguousarray(rows, dtype=rows.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
    chunk_bytes = content.size // len(rows) * chunk_rows
    slots, pieces = shard_rows // chunk_rows, []
    for start in range(0, content.size, chunk_bytes):
        chunk = content[start : start + chunk_bytes]
        if chunk.size < chunk_bytes:
            chunk = np.concatenate([chunk, np.zeros(chunk_bytes - chunk.size, np.uint8)])
        pieces += [chunk.data, _crc(chunk).data]
    chunks = len(pieces) // 2
    index = np.full((slots, 2), _EMPTY, _ENTRY)
    index[:chunks, 0] = np.arange(chunks) * (chunk_bytes + CRC_BYTES)
    index[:chunks, 1] = chunk_bytes + CRC_BYTES
    return [*pieces, index.reshape(-1).view(np.uint8).data, _crc(index).data]


def read_index(shard: NDArray[np.uint8], *, slots: int, chunks: int, chunk_bytes: int, where: str) -> NDArray[np.int64]:
    """Return the offsets, (chunks,), at which a shard's inner chunks begin.

    Args:
        shard: all bytes of the shard, uint8 (bytes,); only the index is read.
        slots: inner chunks that a whole shard has.
        chunks: inner chunks that hold rows; every one must be stored.
        chunk_bytes: size of a chunk without its checksum.
        where: the file, for messages.

    Raises:
        CorruptError: the index is damaged, leaves a chunk out, or points outside of the shard.
    """
    end = shard.size - index_bytes(slots)
    if end < chunks * (chunk_bytes + CRC_BYTES):
        least = chunks * (chunk_bytes + CRC_BYTES) + index_bytes(slots)
        raise CorruptError(f"{where!r} is cut short: expected {least} bytes or more, got {shard.size}. Fetch it again.")
    if not np.array_equal(shard[-CRC_BYTES:], _crc(shard[end:-CRC_BYTES])):
        raise CorruptError(f"{where!r} is damaged: the checksum of its index does not fit. Fetch or make it again.")
    index = shard[end:-CRC_BYTES].view(_ENTRY).reshape(slots, 2)[:chunks]
    offsets, sizes = index[:, 0], index[:, 1]
    last = np.uint64(end - chunk_bytes - CRC_BYTES)
    if (offsets > last).any() or (sizes != chunk_bytes + CRC_BYTES).any():
        bad = int(np.flatnonzero((offsets > last) | (sizes != chunk_bytes + CRC_BYTES))[0])
        state = "missing" if offsets[bad] == _EMPTY else "of a wrong size or outside of the file"
        raise CorruptError(f"{where!r} is damaged: its chunk {bad} is {state}. Fetch or make it again.")
    starts = offsets.astype(np.int64)
    if (np.diff(np.sort(starts)) < chunk_bytes + CRC_BYTES).any():
        raise CorruptError(f"{where!r} is damaged: two of its chunks overlap. Fetch or make it again.")
    return starts


def check_chunk(shard: NDArray[np.uint8], offset: int, chunk_bytes: int, *, where: str) -> None:
    """Raise CorruptError unless the chunk at ``offset`` fits the checksum that lies behind it."""
    end = offset + chunk_bytes
    if not np.array_equal(shard[end : end + CRC_BYTES], _crc(shard[offset:end])):
        raise CorruptError(
            f"{where!r} is damaged: the checksum of bytes {offset} to {end - 1} does not fit. Fetch or make it again."
        )


def _crc(content: NDArray[Any]) -> NDArray[np.uint8]:
    # google_crc32c reads an array's memory in place, but turns memoryviews down; 7 GB/s on one core.
    value: int = google_crc32c.value(content)
    return np.array([value], "<u4").view(np.uint8)
