"""How fast counted work goes, and how long it will take."""

import time
from typing import Any

__all__ = ["Pace"]


class Pace:
    """Counts units of work from when it is made.

    Args:
        total: units in all.
        done: units that were done before, which say nothing of the speed.
    """

    def __init__(self, total: int, done: int = 0) -> None:
        self.total = total
        self.done = done
        self._before = done
        self._begun = time.monotonic()

    def advance(self, units: int) -> None:
        """Count finished units."""
        self.done += units

    @property
    def per_second(self) -> float:
        """Units a second since the beginning; 0.0 while none is finished."""
        return (self.done - self._before) / max(time.monotonic() - self._begun, 1e-3)

    @property
    def seconds_left(self) -> float | None:
        """Seconds that the rest will take at this speed; None while nobody knows."""
        return (self.total - self.done) / self.per_second if self.per_second else None

    def facts(self) -> dict[str, Any]:
        """Return all of it, ready for JSON."""
        left = self.seconds_left
        return {
            "done": self.done,
            "total": self.total,
            "per_second": round(self.per_second, 3),
            "seconds_left": None if left is None else round(left, 1),
        }
