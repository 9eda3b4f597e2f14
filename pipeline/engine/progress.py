"""Progress of a stage: throughput, and a note that shows the progress to other processes."""

import time
from typing import Any

from lsmix.data.progress import Progress
from lsmix.pipeline.workspace.locks import LockInfo

__all__ = ["TaskProgress", "Throughput"]

_SECONDS_BETWEEN = 1.0


class Throughput:
    """Counts units of work from its creation on; ``done`` of the ``total`` units were finished earlier."""

    def __init__(self, total: int, done: int = 0) -> None:
        self.total = total
        self.done = done
        self.step_seconds: float | None = None  # between the last two calls of ``advance``
        self._before = done
        self._begun = self._last = time.monotonic()

    def advance(self, units: int) -> None:
        """Count finished units; negative numbers subtract units that failed."""
        now = time.monotonic()
        self.done += units
        self.step_seconds, self._last = now - self._last, now

    @property
    def per_second(self) -> float:
        """Units per second since creation; 0.0 while none is finished."""
        return (self.done - self._before) / max(time.monotonic() - self._begun, 1e-3)

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds for the remaining units; None while the speed is unknown."""
        return (self.total - self.done) / self.per_second if self.per_second else None

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers, ready for JSON."""
        left = self.seconds_left
        return {
            "done": self.done,
            "total": self.total,
            "per_second": round(self.per_second, 3),
            "seconds_left": None if left is None else round(left, 1),
        }


class TaskProgress:
    """Forwards everything to another progress reporter, and updates the note next to the artifact's lock."""

    def __init__(self, progress: Progress, note: LockInfo) -> None:
        self._progress = progress
        self._note = note
        self._throughput = Throughput(0)
        self._unit = ""
        self._written_at = 0.0
        self.info, self.debug, self.warning = progress.info, progress.debug, progress.warning
        self.event, self.finish = progress.event, progress.finish

    def start(self, label: str, total: int, unit: str, done: int = 0) -> None:
        """Start counting."""
        self._progress.start(label, total, unit, done)
        self._throughput, self._unit = Throughput(total, done), unit
        self._write_note()

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count finished units."""
        self._progress.advance(units, note)
        self._throughput.advance(units)
        if time.monotonic() - self._written_at >= _SECONDS_BETWEEN:
            self._write_note()

    def _write_note(self) -> None:
        self._written_at = time.monotonic()
        self._note.write(**self._throughput.to_dict(), unit=self._unit)
