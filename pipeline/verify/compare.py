"""Comparing rows of pools: how many pixels differ, and by how much; everything else exactly.

Another kind of device may move a pixel by one level and nothing else, so only pixels have a tolerance.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lsmix.data.errors import RecipeError
from lsmix.data.pool import Pool

__all__ = ["PoolComparison", "compare_pools", "same_kind_of_device"]

_BYTES = 4 << 20  # of images read at a time, of each pool
_KIND = ("device_kind", "device", "machine")  # of an environment; and the version of torch
_Rows = Mapping[str, npt.NDArray[Any]]  # (n, …) each, by column


@dataclass
class PoolComparison:
    """How rows of a pool differ from those of another; each channel of an image counts as a pixel."""

    images: int = 0
    images_differing: int = 0
    pixels: int = 0
    pixels_differing: int = 0
    largest: int = 0  # difference of a pixel, in levels
    columns: dict[str, dict[str, int]] = field(default_factory=dict)  # that differ: number of rows, the first one

    def add(self, rows: npt.NDArray[np.int64], found: _Rows, expected: _Rows) -> None:
        """Count some rows, (n,), with their columns."""
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
        """Return whether no pixel differs by more than some levels, and nothing else at all."""
        return self.columns.keys() <= {"image"} and self.largest <= levels

    def to_dict(self) -> dict[str, Any]:
        """Return the figures, ready for JSON."""
        return asdict(self)

    def text(self) -> str:
        """Return the figures in a sentence or two."""
        pixels = f"all {self.pixels} pixels of {self.images} images are the same"
        if self.pixels_differing:
            percent = 100 * self.pixels_differing / self.pixels
            pixels = (
                f"{self.pixels_differing} of {self.pixels} pixels differ ({percent:.4g} %), in {self.images_differing} of "
                f"{self.images} images, by {self.largest} at most"
            )
        rows = [
            f"{name} differs in {count['rows']} rows, first in row {count['first_row']}"
            for name, count in self.columns.items()
        ]
        same = [] if self.columns.keys() - {"image"} else ["all labels, shares and sources are the same"]
        return "; ".join([pixels, *rows, *same])


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
        stop = min(start + step, len(found))
        one, other = ({name: column[start:stop] for name, column in pool.columns.items()} for pool in (found, expected))
        comparison.add(np.arange(start, stop), one, other)
    return comparison


def _layout(pool: Pool) -> dict[str, Any]:
    return {name: (column.dtype.name, column.shape) for name, column in pool.columns.items()}


def same_kind_of_device(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two environments must give the same bytes: the same processor or GPU, and the same torch."""
    return all(one.get(name) == other.get(name) for name in _KIND) and _torch(one) == _torch(other)


def _torch(environment: Mapping[str, Any]) -> Any:
    versions = environment.get("versions")
    return versions.get("torch") if isinstance(versions, Mapping) else None
