"""Rows of a pool in blocks of some megabytes, and the digests that tell whether two sets of rows are equal.

A digest is over values alone, row by row, little-endian, in the order of the pool; so it is the same in
every format, and ``hashlib.sha256(numpy.ascontiguousarray(images)).hexdigest()`` gives that of the column ``image``.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsmix.data.pool import Pool

__all__ = ["Block", "ColumnDigests", "pool_blocks", "row_metadata"]

Block = dict[str, NDArray[Any]]  # some rows, by column
_BLOCK_BYTES = 8 << 20


class ColumnDigests:
    """The SHA-256 of every column, taken block by block."""

    def __init__(self) -> None:
        self._digests: dict[str, Any] = {}
        self.rows = 0  # taken so far

    def update(self, block: Block) -> None:
        """Take the next rows."""
        self.rows += len(block["status"])
        for name, rows in block.items():
            digest = self._digests.setdefault(name, hashlib.sha256())
            digest.update(np.ascontiguousarray(rows, rows.dtype.newbyteorder("<")).view(np.uint8).data)

    def hex(self) -> dict[str, str]:
        """Return the digests so far, by column."""
        return {name: digest.hexdigest() for name, digest in self._digests.items()}


def pool_blocks(pool: Pool, rows: range) -> Iterator[Block]:
    """Go through rows of a pool in blocks of some 8 MB, at least one row, with all columns.

    Args:
        pool: any.
        rows: a range with step 1.

    Raises:
        CorruptError: a chunk is damaged, or a value is out of its range.
    """
    arrays = {name: pool.columns[name] for name in pool.columns}
    step = max(_BLOCK_BYTES // sum(array.row_bytes for array in arrays.values()), 1)
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
        facts = {"row": first_row + index} | {name: values[index] for name, values in numbers.items()}
        facts["class_a"], facts["class_b"] = class_names[facts["label_a"]], class_names[facts["label_b"]]
        yield facts
