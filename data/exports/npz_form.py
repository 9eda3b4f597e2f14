"""Pools as NumPy archives: an uncompressed array for each column, and the facts as JSON beside them.

The one rule: an array is streamed into its archive block by block, so its header, which NumPy writes first, is ours.
"""

import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from lsmix.data.exports.facts import FACTS_NAME, seal_facts
from lsmix.data.exports.form import ExportForm, ExportJob
from lsmix.data.exports.rows import pool_blocks

__all__ = ["NPZ_FORM"]

_MODE = 0o100644 << 16  # a plain file that everybody may read
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first time that a zip knows


def _write(job: ExportJob) -> Iterator[Path]:
    texts = {"class_names": np.array(job.pool.class_names), FACTS_NAME: np.array(seal_facts(job.facts))}
    for path, rows in job.shards("npz"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name, (dtype, row_shape) in job.columns.items():
                blocks = _column(job, name, rows)
                _add(archive, name, np.dtype(dtype), (len(rows), *row_shape), blocks)
            for name, text in texts.items():
                _add(archive, name, text.dtype, text.shape, [text])
        yield path


def _column(job: ExportJob, name: str, rows: range) -> Iterator[NDArray[Any]]:
    for block in pool_blocks(job.pool, rows, (name,)):
        yield block[name]
        if name == "image":  # by far the longest column, so that its rows tell how far the work is
            job.on_rows(len(block[name]))


def _add(
    archive: zipfile.ZipFile, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], blocks: Iterable[NDArray[Any]]
) -> None:
    dtype = dtype.newbyteorder("<")
    info = zipfile.ZipInfo(f"{name}.npy", _EPOCH)
    info.external_attr, info.create_system = _MODE, 3
    with archive.open(info, "w", force_zip64=True) as member:
        header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(member, header)
        for block in blocks:
            member.write(np.ascontiguousarray(block, dtype).tobytes())


NPZ_FORM = ExportForm(
    name="npz",
    write=_write,
    encodes=False,
    row_overhead_bytes=0,
    loads_with='numpy.load(f"{folder}/pool-00000.npz")["image"][:8]',
)
