"""Export a pool as HDF5: one contiguous array per column, plus ``about``, a JSON description of the pool.

The arrays have no filters: they can be memory-mapped at their offset, and equal rows give equal bytes.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lsmix.data.exports.format import ExportFormat, ExportJob
from lsmix.data.readers.hdf5_writer import Extent, new_hdf5, reserve, write_rows

__all__ = ["HDF5_FORMAT"]

_CLASS_NAMES = "class_names"


def _write(job: ExportJob) -> Iterator[Path]:
    for path, rows in job.shards("h5"):
        with new_hdf5(path, functools.partial(_create_arrays, job, len(rows))) as (stream, extents):
            done = 0
            for block in job.blocks(rows):
                for name, values in block.items():
                    write_rows(stream, extents[name], done, values.astype(_little_endian(values.dtype.str), copy=False))
                done += len(block["status"])
        yield path


def _create_arrays(job: ExportJob, rows: int, file: Any) -> dict[str, Extent]:
    """Create the arrays and write the metadata; return the extent of each column."""
    arrays = {
        name: file.create_dataset(name, (rows, *column.shape[1:]), _little_endian(column.dtype.str), track_times=False)
        for name, column in job.pool.columns.items()
    }
    file.create_dataset(_CLASS_NAMES, data=np.char.encode(job.pool.class_names, "utf-8"), track_times=False)
    file.create_dataset("about", data=np.bytes_(job.about), track_times=False)
    return {name: reserve(array) for name, array in arrays.items()}


def _little_endian(dtype: str) -> np.dtype[Any]:
    return np.dtype(dtype).newbyteorder("<")


HDF5_FORMAT = ExportFormat(
    write=_write,
    encodes=False,
    hub_files=("pool-*.h5",),
    hub_row="array",
    row_overhead_bytes=0,
    loads_with='h5py.File(f"{folder}/pool-00000.h5")["image"][:8]',
)
