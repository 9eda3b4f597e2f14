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

__all__ = ["PixelTally", "PoolComparison", "compare_pools", "same_kind_of_device"]

_BYTES = 4 << 20  # of images read at a time, of each pool
_NARROW_ROWS = 1 << 16
_KIND = ("device_kind", "device", "machine")  # of an environment; and the version of torch


@dataclass
class PixelTally:
    """How far images are from other images, pixel by pixel (each channel counts)."""

    images: int = 0
    images_differing: int = 0
    pixels: int = 0
    by_one: int = 0  # pixels that differ by ±1
    by_two: int = 0
    by_more: int = 0
    largest: int = 0  # difference
    first_row: int | None = None  # the first row that differs

    @property
    def pixels_differing(self) -> int:
        """Number of pixels that differ at all."""
        return self.by_one + self.by_two + self.by_more

    @property
    def share(self) -> float:
        """Share of pixels that differ, 0 to 1."""
        return self.pixels_differing / self.pixels if self.pixels else 0.0

    def add(self, rows: npt.NDArray[np.int64], found: npt.NDArray[np.uint8], expected: npt.NDArray[np.uint8]) -> None:
        """Count some images, uint8 (n, …), that lie in ``rows`` (n,)."""
        gap = np.where(found > expected, found - expected, expected - found)
        histogram = np.bincount(gap.ravel(), minlength=3)
        self.images += len(gap)
        self.pixels += gap.size
        self.by_one += int(histogram[1])
        self.by_two += int(histogram[2])
        self.by_more += int(histogram[3:].sum())
        self.largest = max(self.largest, int(gap.max(initial=0)))
        differing = np.flatnonzero(gap.reshape(len(gap), -1).any(axis=1))
        self.images_differing += len(differing)
        if len(differing) and self.first_row is None:
            self.first_row = int(rows[differing[0]])

    def facts(self) -> dict[str, Any]:
        """Return the figures, ready for JSON."""
        return {
            "images": self.images,
            "images_differing": self.images_differing,
            "pixels": self.pixels,
            "pixels_differing": self.pixels_differing,
            "share": self.share,
            "by_one": self.by_one,
            "by_two": self.by_two,
            "by_more": self.by_more,
            "largest": self.largest,
            "first_row": self.first_row,
        }

    def text(self) -> str:
        """Return the figures in a sentence."""
        if not self.pixels_differing:
            return f"all {self.pixels} pixels of {self.images} images are the same"
        return (
            f"{self.pixels_differing} of {self.pixels} pixels differ ({100 * self.share:.4g} %), in "
            f"{self.images_differing} of {self.images} images, by {self.largest} at most: "
            f"{self.by_one} by 1, {self.by_two} by 2, {self.by_more} by more"
        )


@dataclass
class PoolComparison:
    """How one pool differs from another."""

    pixels: PixelTally = field(default_factory=PixelTally)
    columns: dict[str, tuple[int, int]] = field(default_factory=dict)  # that differ: number of rows, the first one

    def within(self, levels: int) -> bool:
        """Tell whether no pixel differs by more than some levels, and nothing else at all."""
        return not self.columns and self.pixels.largest <= levels

    def facts(self) -> dict[str, Any]:
        """Return the figures, ready for JSON."""
        columns = {name: {"rows": rows, "first_row": first} for name, (rows, first) in self.columns.items()}
        return {"pixels": self.pixels.facts(), "columns": columns}

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
    for name in found.columns:
        if name != "image":
            _compare_column(comparison, name, found, expected)
    step = max(1, _BYTES // found.image.row_bytes)
    for start in range(0, len(found), step):
        part = slice(start, min(start + step, len(found)))
        comparison.pixels.add(np.arange(part.start, part.stop), found.image[part], expected.image[part])
    return comparison


def _compare_column(comparison: PoolComparison, name: str, found: Pool, expected: Pool) -> None:
    rows, first = 0, -1
    for start in range(0, len(found), _NARROW_ROWS):
        part = slice(start, start + _NARROW_ROWS)
        one, other = found.columns[name][part], expected.columns[name][part]
        differing = np.flatnonzero((one != other).reshape(len(one), -1).any(axis=1))
        if len(differing):
            first = first if rows else start + int(differing[0])
            rows += len(differing)
    if rows:
        comparison.columns[name] = rows, first


def _layout(pool: Pool) -> dict[str, Any]:
    return {name: (column.dtype.name, column.shape) for name, column in pool.columns.items()}


def same_kind_of_device(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Tell of two environments whether they must give the same bytes: the same processor or GPU, and the same torch."""
    return all(one.get(name) == other.get(name) for name in _KIND) and _torch(one) == _torch(other)


def _torch(environment: Mapping[str, Any]) -> Any:
    versions = environment.get("versions")
    return versions.get("torch") if isinstance(versions, Mapping) else None
