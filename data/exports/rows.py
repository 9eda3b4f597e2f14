"""Rows of a pool in blocks of some megabytes, and the digests that tell whether two sets of rows are equal.

A digest is over values alone, row by row, little-endian, in the order of the pool; so it is the same in
every format, and ``hashlib.sha256(numpy.ascontiguousarray(images)).hexdigest()`` gives that of the column ``image``.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsmix.data.pool import Pool

__all__ = ["Block", "ColumnDigests", "block_rows", "pool_blocks", "row_metadata"]

Block = dict[str, NDArray[Any]]  # some rows, by column
_BLOCK_BYTES = 8 << 20


class ColumnDigests:
    """The SHA-256 of every column, taken block by block."""

    def __init__(self, names: Iterable[str]) -> None:
        self._digests = {name: hashlib.sha256() for name in names}

    def update(self, block: Block) -> None:
        """Take the next rows."""
        for name, digest in self._digests.items():
            rows = block[name]
            digest.update(np.ascontiguousarray(rows, rows.dtype.newbyteorder("<")).view(np.uint8).data)

    def hex(self) -> dict[str, str]:
        """Return the digests so far, by column."""
        return {name: digest.hexdigest() for name, digest in self._digests.items()}


def block_rows(row_bytes: int) -> int:
    """Return the rows in a block: some 8 MB, at least one."""
    return max(_BLOCK_BYTES // row_bytes, 1)


def pool_blocks(pool: Pool, rows: range, columns: tuple[str, ...] = ()) -> Iterator[Block]:
    """Go through rows of a pool in blocks.

    Args:
        pool: any.
        rows: a range with step 1.
        columns: which; none for all.

    Raises:
        CorruptError: a chunk is damaged, or a value is out of its range.
    """
    arrays = {name: pool.columns[name] for name in columns or pool.columns}
    step = block_rows(sum(array.row_bytes for array in arrays.values()))
    for start in range(rows.start, rows.stop, step):
        stop = min(start + step, rows.stop)
        yield pool.rows(start, stop, tuple(arrays))


def row_metadata(block: Block, first_row: int, class_names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Go through the rows of a block: everything but the image, ready for JSON.

    Args:
        block: some rows, by column.
        first_row: which row of the pool the first one is.
        class_names: by label.
    """
    numbers = {name: values.tolist() for name, values in block.items() if name != "image"}
    for index in range(len(block["status"])):
        facts: dict[str, Any] = {"row": first_row + index}
        facts |= {name: values[index] for name, values in numbers.items()}
        facts["class_a"], facts["class_b"] = class_names[facts["label_a"]], class_names[facts["label_b"]]
        yield facts
