"""Progress of a stage: throughput, and a note for other processes of how far it is."""

import time
from typing import Any

from lsmix.data.progress import Progress
from lsmix.pipeline.workspace.locks import LockInfo

__all__ = ["TaskProgress", "Throughput"]

_SECONDS_BETWEEN = 1.0


class TaskProgress:
    """Tells another progress all that it is told, and keeps the note of the artifact's owner up to date.

    Args:
        progress: is told everything.
        note: beside the lock of the artifact.
    """

    def __init__(self, progress: Progress, note: LockInfo) -> None:
        self._progress = progress
        self._note = note
        self._pace: Throughput | None = None
        self._unit = ""
        self._told_at = 0.0
        self.info, self.debug, self.warning, self.event = (
            progress.info,
            progress.debug,
            progress.warning,
            progress.event,
        )

    def start(self, label: str, total: int, unit: str, done: int = 0) -> None:
        """Begin to count."""
        self._progress.start(label, total, unit, done)
        self._pace, self._unit = Throughput(total, done), unit
        self._tell()

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count finished units."""
        self._progress.advance(units, note)
        if self._pace:
            self._pace.advance(units)
            if time.monotonic() - self._told_at >= _SECONDS_BETWEEN:
                self._tell()

    def finish(self) -> None:
        """End the count."""
        self._progress.finish()
        self._pace = None

    def _tell(self) -> None:
        self._told_at = time.monotonic()
        if self._pace:
            facts: dict[str, Any] = {**self._pace.facts(), "unit": self._unit}
            self._note.tell(**facts)


class Throughput:
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
