"""Comparing two pools row by row: how many pixels differ, and by how much; everything else exactly.

Another kind of device may move a pixel by one level and nothing else, so only pixels have a tolerance.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lsmix.data.errors import RecipeError
from lsmix.data.pool import Pool

__all__ = ["PixelTally", "PoolComparison", "compare_pools", "differing_rows", "same_kind_of_device"]

_BYTES = 4 << 20  # of images read at a time, of each pool
_KIND = ("device_kind", "device", "machine")  # of an environment; and the version of torch


def differing_rows(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return the rows, int64, in which two arrays (n, …) of the same shape differ."""
    return np.flatnonzero((one != other).reshape(len(one), -1).any(axis=1))


@dataclass
class PixelTally:
    """By how much the pixels of images differ from those of other images (each channel counts)."""

    images: int = 0
    images_differing: int = 0
    first_row: int | None = None  # the first row that differs
    by: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))  # pixels by difference in levels

    @property
    def largest(self) -> int:
        """The largest difference, in levels."""
        return int(np.flatnonzero(self.by).max(initial=0))

    def add(self, rows: npt.NDArray[np.int64], found: npt.NDArray[np.uint8], expected: npt.NDArray[np.uint8]) -> None:
        """Count some images, uint8 (n, …), of ``rows`` (n,)."""
        gap = np.where(found > expected, found - expected, expected - found)
        self.by += np.bincount(gap.ravel(), minlength=256)
        differing = differing_rows(found, expected)
        self.images += len(gap)
        self.images_differing += len(differing)
        if len(differing) and self.first_row is None:
            self.first_row = int(rows[differing[0]])

    def to_dict(self) -> dict[str, Any]:
        """Return the figures, ready for JSON."""
        pixels, differing = int(self.by.sum()), int(self.by[1:].sum())
        return {
            "images": self.images,
            "images_differing": self.images_differing,
            "pixels": pixels,
            "pixels_differing": differing,
            "share": differing / pixels if pixels else 0.0,
            "by_one": int(self.by[1]),
            "by_two": int(self.by[2]),
            "by_more": int(self.by[3:].sum()),
            "largest": self.largest,
            "first_row": self.first_row,
        }

    def text(self) -> str:
        """Return the figures in a sentence."""
        n = self.to_dict()
        if not n["pixels_differing"]:
            return f"all {n['pixels']} pixels of {self.images} images are the same"
        return (
            f"{n['pixels_differing']} of {n['pixels']} pixels differ ({100 * n['share']:.4g} %), in "
            f"{self.images_differing} of {self.images} images, by {self.largest} at most: "
            f"{n['by_one']} by 1, {n['by_two']} by 2, {n['by_more']} by more"
        )


@dataclass
class PoolComparison:
    """How one pool differs from another."""

    pixels: PixelTally = field(default_factory=PixelTally)
    columns: dict[str, tuple[int, int]] = field(default_factory=dict)  # that differ: number of rows, the first one

    def within(self, levels: int) -> bool:
        """Return whether no pixel differs by more than some levels, and nothing else at all."""
        return not self.columns and self.pixels.largest <= levels

    def to_dict(self) -> dict[str, Any]:
        """Return the figures, ready for JSON."""
        columns = {name: {"rows": rows, "first_row": first} for name, (rows, first) in self.columns.items()}
        return {"pixels": self.pixels.to_dict(), "columns": columns}

    def text(self) -> str:
        """Return the figures in a sentence or two."""
        parts = [f"{name} differs in {rows} rows, first in row {first}" for name, (rows, first) in self.columns.items()]
        return "; ".join([self.pixels.text(), *(parts or ["all labels, shares and sources are the same"])])


def compare_pools(found: Pool, expected: Pool) -> PoolComparison:
    """Compare two pools of the same rows and columns, some megabytes at a time.

    Raises:
        RecipeError: they are of different shapes, so that their rows have nothing to do with each other.
    """
    if _layout(found) != _layout(expected):
        raise RecipeError(
            f"{found.location!r} and {expected.location!r} cannot be compared: they hold {_layout(found)} and "
            f"{_layout(expected)}. Name the pool that the plan belongs to."
        )
    comparison = PoolComparison()
    step = max(1, _BYTES // found.image.row_bytes)
    for start in range(0, len(found), step):
        part = slice(start, min(start + step, len(found)))
        for name in found.columns:
            one, other = found.columns[name][part], expected.columns[name][part]
            if name == "image":
                comparison.pixels.add(np.arange(part.start, part.stop), one, other)
            elif len(rows := differing_rows(one, other)):
                count, first = comparison.columns.get(name, (0, start + int(rows[0])))
                comparison.columns[name] = count + len(rows), first
    return comparison


def _layout(pool: Pool) -> dict[str, Any]:
    return {name: (column.dtype.name, column.shape) for name, column in pool.columns.items()}


def same_kind_of_device(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two environments must give the same bytes: the same processor or GPU, and the same torch."""
    return all(one.get(name) == other.get(name) for name in _KIND) and _torch(one) == _torch(other)


def _torch(environment: Mapping[str, Any]) -> Any:
    versions = environment.get("versions")
    return versions.get("torch") if isinstance(versions, Mapping) else None
