"""Pools as HDF5: a contiguous array for each column, and the facts as JSON beside them.

The one rule: no filters, so that the arrays can be memory-mapped by their offset and the same rows give the same bytes.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from lsmix.data.errors import SourceError
from lsmix.data.exports.facts import FACTS_NAME, MAX_FACTS_BYTES, ExportFacts, seal_facts, unseal_facts
from lsmix.data.exports.form import ExportForm, ExportJob
from lsmix.data.exports.rows import Block, block_rows, pool_blocks
from lsmix.data.pool import pool_columns
from lsmix.data.readers.hdf5 import check_storage, find_array, opened_hdf5
from lsmix.data.readers.hdf5_writer import Place, new_hdf5, reserve, write_rows

__all__ = ["HDF5_FORM", "Hdf5Rows"]

_CLASS_NAMES = "class_names"


def _write(job: ExportJob) -> Iterator[Path]:
    for path, rows in job.shards("h5"):
        with new_hdf5(path, functools.partial(_lay_out, job, len(rows))) as (stream, places):
            done = 0
            for block in pool_blocks(job.pool, rows):
                for name, values in block.items():
                    write_rows(stream, places[name], done, values.astype(_little(values.dtype.str), copy=False))
                done += len(block["state"])
                job.on_rows(len(block["state"]))
        yield path


def _lay_out(job: ExportJob, rows: int, file: Any) -> dict[str, Place]:
    """Write all but the columns, and return their places."""
    arrays = {
        name: file.create_dataset(name, (rows, *row_shape), _little(dtype), track_times=False)
        for name, (dtype, row_shape) in job.columns.items()
    }
    file.create_dataset(_CLASS_NAMES, data=np.char.encode(job.pool.class_names, "utf-8"), track_times=False)
    file.create_dataset(FACTS_NAME, data=np.bytes_(seal_facts(job.facts)), track_times=False)
    return {name: reserve(array) for name, array in arrays.items()}


def _little(dtype: str) -> np.dtype[Any]:
    return np.dtype(dtype).newbyteorder("<")


class Hdf5Rows:
    """The rows of one file that an export wrote, or a stranger."""

    ending = "h5"

    def __init__(self, path: Path, file: Any) -> None:
        self._path, self._file = path, file
        self.facts = _read_facts(path, file)
        self.rows = 0

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator["Hdf5Rows"]:
        """Open a file.

        Raises:
            SourceError: it is no HDF5 file, or no export of a pool.
            CorruptError, FormatError: its facts are damaged or of another version.
        """
        with opened_hdf5(path) as file:
            yield cls(path, file)

    def blocks(self) -> Iterator[Block]:
        """Go through the rows in blocks.

        Raises:
            SourceError: an array is missing, of another shape or dtype, or cannot be read safely.
        """
        columns = pool_columns(self.facts.attributes, self.facts.image_shape, str(self._path))
        arrays = {name: self._array(name, *layout) for name, layout in columns.items()}
        counts = {len(array) for array in arrays.values()}
        if len(counts) != 1:
            raise SourceError(
                f"the arrays of {str(self._path)!r} have different lengths: {sorted(counts)}. Fetch it again."
            )
        self.rows = counts.pop()
        step = block_rows(sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for dtype, shape in columns.values()))
        for start in range(0, self.rows, step):
            yield {
                name: array[start : start + step].astype(columns[name][0], copy=False) for name, array in arrays.items()
            }

    def _array(self, name: str, dtype: str, row_shape: tuple[int, ...]) -> Any:
        array = find_array(repr(str(self._path)), self._file, name)
        expected = _little(dtype)
        if array is None or array.dtype != expected or not array.shape or array.shape[1:] != row_shape:
            got = "nothing" if array is None else f"{array.dtype} {array.shape}"
            raise SourceError(
                f"{name!r} of {str(self._path)!r} must be {expected} {('N', *row_shape)}, got {got}. Export it again."
            )
        check_storage(self._path, array)
        return array


def _read_facts(path: Path, file: Any) -> ExportFacts:
    item = find_array(repr(str(path)), file, FACTS_NAME)
    kind = item.id.get_type() if item is not None else None
    if not isinstance(kind, h5py.h5t.TypeStringID) or kind.is_variable_str() or item.shape != ():
        raise SourceError(f"{str(path)!r} has no {FACTS_NAME!r} of a pool: 'lsmix export' did not write it.")
    if kind.get_size() > MAX_FACTS_BYTES:
        raise SourceError(f"{str(path)!r} has {kind.get_size()} bytes of facts, which no pool has. Do not use it.")
    check_storage(path, item)
    return unseal_facts(bytes(item[()]), repr(str(path)))


HDF5_FORM = ExportForm(
    name="hdf5",
    write=_write,
    encodes=False,
    row_overhead_bytes=0,
    loads_with='h5py.File(f"{folder}/pool-00000.h5")["image"][:8]',
)
