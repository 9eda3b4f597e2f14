"""Making a pool of an HDF5 or Parquet export again.

The one rule: a file is believed in nothing; the pool appears only if every column has the digest that the export states,
and the root digest of the new pool tells whether it is the exported one to the last byte.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lsmix.data.artifact import Manifest, record_files, root_digest, write_manifest
from lsmix.data.atomic import write_durably
from lsmix.data.errors import CorruptError, LsmixError, MissingError, SourceError
from lsmix.data.exports.beside import check_space, folder_beside
from lsmix.data.exports.facts import ExportFacts
from lsmix.data.exports.hdf5_form import Hdf5Rows
from lsmix.data.exports.parquet_form import ParquetRows
from lsmix.data.exports.record import is_export, read_record
from lsmix.data.exports.rows import Block, ColumnDigests
from lsmix.data.pool import (
    PLAN_NAME,
    POOL_NAME,
    create_pool,
    open_pool,
    pool_columns,
    pool_store,
    write_pool_shard,
)

__all__ = ["ImportedPool", "read_export"]

_READERS = (Hdf5Rows, ParquetRows)
_MAX_SHARD_BYTES = 1 << 30  # of memory for one shard of the pool
_MAX_SHARD_ROWS = 1 << 24  # of which a shard's index has an entry each, at worst
_STAGE = "mix"  # what makes pools


class ImportedPool(NamedTuple):
    """A pool that was made of an export."""

    root: str  # root digest of the new pool
    exported_root: str  # of the pool that was exported; equal but for pools that another program had laid out
    images: int
    pixel_digest: str  # SHA-256 over the bytes of all images, row by row


class _Source(NamedTuple):
    reader: "type[Hdf5Rows] | type[ParquetRows]"
    files: list[Path]  # in the order of rows


def read_export(
    source: Path,
    target: Path,
    *,
    on_start: Callable[[int], None] = lambda images: None,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> ImportedPool:
    """Make a pool of an HDF5 or Parquet export, in a new folder.

    Args:
        source: the export's folder, or a file of it that holds the whole pool.
        target: the folder to make; its parent exists.
        on_start: is told the number of images.
        on_rows: is told the number of rows written, shard by shard.

    Raises:
        MissingError: there is no export, or no folder to put the pool in.
        SourceError: it cannot be read safely, or is not what an export is.
        FormatError: it is of a version that this lsmix does not read.
        CorruptError: rows are missing, or values differ from what was exported.
        RecipeError: there is something at ``target`` already.
        DiskSpaceError: the pool would not fit on the disk.
    """
    found = _find(source)
    with found.reader.opened(found.files[0]) as first:
        facts = first.facts
    row_bytes = _check_facts(facts, found.files[0])
    with folder_beside(target) as folder:
        check_space(folder, facts.images * row_bytes, f"the pool in {str(source)!r}")
        on_start(facts.images)
        return _write(found, facts, folder, on_rows)


def _find(source: Path) -> _Source:
    """Return the files of an export, and what reads them."""
    if source.is_file():
        for reader in _READERS:
            if source.suffix == f".{reader.ending}":
                return _Source(reader, [source])
        raise SourceError(f"{str(source)!r} ends in neither .h5 nor .parquet; only these forms are imported.")
    if not source.is_dir():
        raise MissingError(f"no export at {str(source)!r}: there is no such file or folder. Check the path.")
    if is_export(source) and (form := read_record(source).format) not in ("hdf5", "parquet"):
        raise SourceError(f"{str(source)!r} is an export as {form}; only hdf5 and parquet are imported.")
    fitting = [(reader, files) for reader in _READERS if (files := sorted(source.glob(f"*.{reader.ending}")))]
    if len(fitting) != 1:
        raise SourceError(
            f"{str(source)!r} has {'both' if fitting else 'neither'} .h5 and .parquet files"
            f"{'. Name the one' if fitting else ': it is no export that can be imported. Name its folder'}."
        )
    return _Source(*fitting[0])


def _check_facts(facts: ExportFacts, path: Path) -> int:
    """Return the bytes of a row; refuse facts that no pool has."""
    columns = pool_columns(facts.attributes, facts.image_shape, str(path))
    row_bytes = sum(int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize for dtype, shape in columns.values())
    if min(facts.shard_rows, facts.images) * row_bytes > _MAX_SHARD_BYTES:
        raise SourceError(
            f"{str(path)!r} wants shards of {facts.shard_rows} rows of {row_bytes} bytes, more than {_MAX_SHARD_BYTES} "
            "bytes of memory. Do not use it."
        )
    if facts.shard_rows > _MAX_SHARD_ROWS:
        raise SourceError(f"{str(path)!r} wants shards of {facts.shard_rows} rows, as no pool has. Do not use it.")
    copies = facts.attributes["copies"] * facts.attributes["images_per_copy"]
    if (
        copies != facts.images
        or facts.attributes["class_names"] != facts.class_names
        or set(columns) != set(facts.digests)
    ):
        raise SourceError(f"{str(path)!r} contradicts itself: copies, classes or columns do not fit. Export it again.")
    return row_bytes


def _write(found: _Source, facts: ExportFacts, folder: Path, on_rows: Callable[[int], None]) -> ImportedPool:
    attributes = facts.attributes
    create_pool(
        folder,
        images_per_copy=attributes["images_per_copy"],
        copies=attributes["copies"],
        image_shape=facts.image_shape,
        class_names=tuple(facts.class_names),
        method=attributes["method"],
        shard_rows=facts.shard_rows,
        sources=attributes.get("sources", 2),
        corners=attributes.get("corners", False),
        attributes=attributes,
    )
    store, digests = pool_store(folder), ColumnDigests(facts.digests)
    known: dict[str, str] = {}
    rows = _Rows(_blocks(found, facts, digests))
    for shard in range(store.shards):
        count = len(store.shard_range(shard))
        try:
            known |= write_pool_shard(folder, shard, rows.take(count))
        except LsmixError:
            raise
        except ValueError as error:  # labels, shares or states that no pool has
            raise CorruptError(f"{str(found.files[0])!r} holds values that no pool has: {error}") from error
        on_rows(count)
    rows.check_end()
    for name, digest in digests.hex().items():
        if digest != facts.digests[name]:
            raise CorruptError(
                f"column {name!r} of {str(found.files[0].parent)!r} is not what was exported: expected the sha256 "
                f"{facts.digests[name][:12]}…, got {digest[:12]}…. Fetch or export it again."
            )
    return _finish(facts, folder, known)


def _blocks(found: _Source, facts: ExportFacts, digests: ColumnDigests) -> Iterator[Block]:
    for path in found.files:
        with found.reader.opened(path) as reader:
            if reader.facts != facts:
                raise SourceError(f"{str(path)!r} is of another pool than {str(found.files[0])!r}. Sort them out.")
            for block in reader.blocks():
                digests.update(block)
                yield block


class _Rows:
    """Takes rows by any number out of blocks of other lengths."""

    def __init__(self, blocks: Iterator[Block]) -> None:
        self._blocks = blocks
        self._rest: Block = {}

    def take(self, count: int) -> Block:
        """Return the next ``count`` rows."""
        pieces, missing = [], count
        while missing:
            block = self._rest or next(self._blocks, {})
            if not block:
                raise CorruptError(
                    f"the export has fewer rows than its pool: {missing} and more are missing. Fetch all files."
                )
            pieces.append({name: values[:missing] for name, values in block.items()})
            taken = len(pieces[-1]["state"])
            self._rest = {name: values[taken:] for name, values in block.items()} if taken < len(block["state"]) else {}
            missing -= taken
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    def check_end(self) -> None:
        """Raise CorruptError if there are rows left."""
        if self._rest or next(self._blocks, {}):
            raise CorruptError("the export has more rows than its pool. Remove the files that do not belong to it.")


def _finish(facts: ExportFacts, folder: Path, known: dict[str, str]) -> ImportedPool:
    if facts.plan:
        write_durably(folder / PLAN_NAME, facts.plan.encode())
    files = record_files(folder, {POOL_NAME, PLAN_NAME}, known)
    artifact: dict[str, Any] = {name: getattr(facts.artifact, name) for name in facts.artifact.__struct_fields__}
    environment = {"imported_root": facts.root}
    write_manifest(
        folder, Manifest(stage=_STAGE, root=root_digest(files), files=files, environment=environment, **artifact)
    )
    pool = open_pool(folder)
    return ImportedPool(pool.manifest.root, facts.root, len(pool), facts.digests["image"])
