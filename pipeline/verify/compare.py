"""Comparison of pools row by row: the number and size of pixel differences; all other columns must be equal.

Another kind of device may change a pixel by one level but nothing else, so only pixels have a tolerance.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lsmix.data.errors import RecipeError, format_count
from lsmix.data.pool import Pool

__all__ = ["PoolComparison", "compare_pools", "same_kind_of_device"]

_BYTES = 4 << 20  # of images read at a time from each pool
_KIND = ("device_kind", "device", "machine")  # fields of an environment; torch's version also counts
_Rows = Mapping[str, npt.NDArray[Any]]  # columns by name, (n, …) each


@dataclass
class PoolComparison:
    """Differences between the rows of two pools; each channel of an image counts as a pixel."""

    images: int = 0
    images_differing: int = 0
    pixels: int = 0
    pixels_differing: int = 0
    largest: int = 0  # largest difference of a pixel, in levels
    columns: dict[str, dict[str, int]] = field(default_factory=dict)  # differing columns: number of rows, first row

    def add(self, rows: npt.NDArray[np.int64], found: _Rows, expected: _Rows) -> None:
        """Add some rows, (n,), and their columns."""
        for name, values in found.items():
            differs = values != expected[name]
            differing = np.flatnonzero(differs.reshape(len(values), -1).any(axis=1))
            if len(differing):
                count = self.columns.setdefault(name, {"rows": 0, "first_row": int(rows[differing[0]])})
                count["rows"] += len(differing)
            if name == "image":
                self.images += len(values)
                self.images_differing += len(differing)
                self.pixels += values.size
                self.pixels_differing += int(differs.sum())
                gap = values[differs].astype(np.int16) - expected[name][differs]
                self.largest = max(self.largest, int(np.abs(gap).max(initial=0)))

    def within(self, levels: int) -> bool:
        """Return whether all pixels differ by at most ``levels`` and all other columns are equal."""
        return self.columns.keys() <= {"image"} and self.largest <= levels

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as a dictionary for JSON."""
        return asdict(self)

    def text(self) -> str:
        """Return the comparison as a sentence."""
        pixels = f"all {self.pixels:,} pixels of {self.images:,} images are equal"
        if self.pixels_differing:
            percent = 100 * self.pixels_differing / self.pixels
            pixels = (
                f"{self.pixels_differing:,} of {self.pixels:,} pixels differ ({percent:.4g}%), in "
                f"{self.images_differing:,} of {self.images:,} images, by at most {self.largest}"
            )
        rows = [
            f"{name} differs in {format_count(count['rows'], 'row')}, first in row {count['first_row']}"
            for name, count in self.columns.items()
        ]
        same = [] if self.columns.keys() - {"image"} else ["all labels, shares and sources are equal"]
        return "; ".join([pixels, *rows, *same])


def compare_pools(found: Pool, expected: Pool) -> PoolComparison:
    """Compare two pools with the same rows and columns, a few megabytes at a time.

    Raises:
        RecipeError: The pools have different shapes, so their rows do not correspond.
    """
    if _layout(found) != _layout(expected):
        raise RecipeError(
            f"{found.location!r} and {expected.location!r} cannot be compared: their columns are {_layout(found)} and "
            f"{_layout(expected)}. Name the pool that the plan belongs to."
        )
    comparison = PoolComparison()
    step = max(1, _BYTES // found.image.row_bytes)
    for start in range(0, len(found), step):
        stop = min(start + step, len(found))
        one, other = ({name: column[start:stop] for name, column in pool.columns.items()} for pool in (found, expected))
        comparison.add(np.arange(start, stop), one, other)
    return comparison


def _layout(pool: Pool) -> dict[str, Any]:
    return {name: (column.dtype.name, column.shape) for name, column in pool.columns.items()}


def same_kind_of_device(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two environments must produce the same bytes: same processor or GPU, and same torch."""
    return all(one.get(name) == other.get(name) for name in _KIND) and _torch(one) == _torch(other)


def _torch(environment: Mapping[str, Any]) -> Any:
    versions = environment.get("versions")
    return versions.get("torch") if isinstance(versions, Mapping) else None
