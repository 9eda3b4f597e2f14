"""``samples.csv``: all columns of a pool except the pixels, as a CSV table in the pool's card.

The table contains only numbers and fixed words. Class names are in ``croissant.json`` instead, because programs could
read one as a missing value or a formula.
"""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from numpy.typing import NDArray

from lsmix.data.atomic import atomic_path
from lsmix.data.pool import POOL_COLUMNS, POOL_NAME, Pool

__all__ = ["SAMPLES_FILE", "TableField", "table_fields", "write_samples"]

SAMPLES_FILE: Final = "samples.csv"
_BLOCK_ROWS: Final = 16_384  # about 10 MB as Python objects


class TableField(NamedTuple):
    """One column of the table."""

    name: str
    kind: str  # see ``PoolColumn.kind``
    description: str
    column: str = ""  # column of the pool; "" for fields that locate the row or its image
    position: int | None = None  # index into a column with several further sources


def table_fields(pool: Pool, *, in_zarr: bool) -> list[TableField]:
    """Return the columns of the table, in order; with ``in_zarr`` including each image's chunk file and position."""
    fields = [TableField("row", "source", "row of the pool")]
    if in_zarr:
        fields += [
            TableField("image", "word", f"file that contains the image: a chunk of the Zarr array {POOL_NAME}/image"),
            TableField("image_row", "source", "row of the image in that chunk, uncompressed, row-major, see README.md"),
        ]
    for column in pool.attributes.columns():
        if column.row == "number":
            fields.append(TableField(column.name, column.kind, column.description, column.name))
        if column.row == "more":
            for index in range(pool.sources - 2):
                name, described = column.name.replace("more", str(index + 3)), f"{column.description}: of x{index + 3}"
                fields.append(TableField(name, column.kind, described, column.name, index))
    return fields


def write_samples(pool: Pool, path: Path, *, in_zarr: bool) -> None:
    """Write the table atomically to ``path``, block by block.

    Raises:
        CorruptError: A value is out of range, or a chunk is damaged.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.writelines(_table(pool, in_zarr=in_zarr))


def _table(pool: Pool, *, in_zarr: bool) -> Iterator[bytes]:
    fields = table_fields(pool, in_zarr=in_zarr)
    yield ",".join(field.name for field in fields).encode() + b"\n"
    table = pool.columns.table
    names = [name for name in table.chunk_paths() if name.startswith("image/")]
    for start in range(0, len(pool), _BLOCK_ROWS):
        rows = range(start, min(start + _BLOCK_ROWS, len(pool)))
        block = pool.rows(rows.start, rows.stop)
        text = io.StringIO(newline="")
        places: list[Any] = [rows]
        if in_zarr:
            files = [f"{POOL_NAME}/{names[row // table.chunk_rows]}" for row in rows]
            places += [files, [row % table.chunk_rows for row in rows]]
        columns = [*places, *(_texts(block, field) for field in fields if field.column)]
        csv.writer(text, lineterminator="\n").writerows(zip(*columns, strict=True))
        yield text.getvalue().encode()


def _texts(block: dict[str, NDArray[Any]], field: TableField) -> list[Any]:
    values = block[field.column]
    return POOL_COLUMNS[field.column].as_text(values if field.position is None else values[:, field.position])
