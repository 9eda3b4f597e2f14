"""``samples.csv``: the narrow columns of a pool as a table that any program reads, written with its card.

The one rule: it holds numbers and words of our own only, no names that a stranger chose, so that no reader can take one
for a missing value or a formula; what a class is called stands in ``croissant.json``.
"""

import csv
import io
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lsmix.data.atomic import atomic_path
from lsmix.data.pool import CORNERS, POOL_NAME, STATUSES, Pool
from lsmix.pipeline.views.dataset_card.summary import blocks

__all__ = ["SAMPLES_FILE", "sample_columns", "samples_digest", "write_samples"]

SAMPLES_FILE: Final = "samples.csv"
_MORE: Final = ("source_more", "label_more", "lam_more", "share_more")


def sample_columns(pool: Pool) -> dict[str, str]:
    """Return the columns of the table, in order, with what each holds."""
    columns = {
        "row": "Row of the pool.",
        "image": f"File that holds the image: a shard of the Zarr array {POOL_NAME}/image.",
        "image_row": "Row of the image in that shard, uncompressed and in row-major order, see the card.",
    }
    for letter, place in (("a", "first"), ("b", "second")):
        columns[f"source_{letter}"] = f"Row of the {place} source image in the train split of the base set."
        columns[f"label_{letter}"] = f"Class of the {place} source image."
    columns["lam"] = "λ as drawn: the share of the second image that was asked for."
    columns["share_b"] = "Share of the second image that was really taken: the weight of label_b in the loss."
    for number in range(3, pool.sources + 1):
        columns[f"source_{number}"] = f"Row of source image {number} in the train split of the base set."
        columns[f"label_{number}"] = f"Class of source image {number}."
        columns[f"lam_{number}"] = f"λ of source image {number} as drawn."
        columns[f"share_{number}"] = f"Share of source image {number}: the weight of label_{number} in the loss."
    columns["status"] = (
        "ok; redrawn: the first draw could not be decoded; replaced: none could, the image is the first source."
    )
    if "corner" in pool.columns:
        columns["corner"] = "Corner at which the second image begins."
    return columns


def samples_digest(pool: Pool) -> str:
    """Return the SHA-256 of the table, which is not written."""
    digest = sha256()
    for block in _table(pool):
        digest.update(block)
    return digest.hexdigest()


def write_samples(pool: Pool, path: Path) -> str:
    """Write the table block by block beside ``path``, then rename it there; return its SHA-256."""
    digest = sha256()
    with atomic_path(path) as beside, beside.open("wb") as file:
        for block in _table(pool):
            file.write(block)
            digest.update(block)
    return digest.hexdigest()


def _table(pool: Pool) -> Iterator[bytes]:
    yield ",".join(sample_columns(pool)).encode() + b"\n"
    shard_rows = pool.columns.store.shard_rows
    names = [name for name in pool.columns.shard_names() if name.startswith("image/")]
    for rows, block in blocks(pool):
        text = io.StringIO(newline="")
        shards = [f"{POOL_NAME}/{names[row // shard_rows]}" for row in rows]
        places = [row % shard_rows for row in rows]
        columns = [rows, shards, places, *_numbers(block)]
        csv.writer(text, lineterminator="\n").writerows(zip(*columns, strict=True))
        yield text.getvalue().encode()


def _numbers(block: dict[str, NDArray[Any]]) -> Iterator[list[Any]]:
    """Go through the table's columns behind the image's; NumPy's text of a float32 is the shortest that gives it back."""
    for name in ("source_a", "label_a", "source_b", "label_b"):
        yield block[name].tolist()
    yield block["lam"].astype("U").tolist()
    yield block["share_b"].astype("U").tolist()
    if "source_more" in block:
        for place in range(block["source_more"].shape[1]):
            for name in _MORE:
                values = block[name][:, place]
                yield (values if values.dtype.kind == "i" else values.astype("U")).tolist()
    yield np.array(STATUSES)[block["status"]].tolist()
    if "corner" in block:
        yield np.array(CORNERS)[block["corner"]].tolist()
