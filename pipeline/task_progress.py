"""What one artifact's work tells of itself while it is made: to whoever runs it, and to ``lsmix status`` elsewhere."""

import time
from typing import Any

from lsmix.pipeline.locks import OwnerNote
from lsmix.pipeline.pace import Pace
from lsmix.pipeline.progress import Progress

__all__ = ["TaskProgress"]

_SECONDS_BETWEEN = 1.0


class TaskProgress:
    """Tells another progress all that it is told, and keeps the note of the artifact's owner up to date.

    Args:
        progress: is told everything.
        note: beside the lock of the artifact.
    """

    def __init__(self, progress: Progress, note: OwnerNote) -> None:
        self._progress = progress
        self._note = note
        self._pace: Pace | None = None
        self._unit = ""
        self._told_at = 0.0
        self.say, self.detail, self.warn, self.event = progress.say, progress.detail, progress.warn, progress.event

    def start(self, label: str, total: int, unit: str, done: int = 0) -> None:
        """Begin to count."""
        self._progress.start(label, total, unit, done)
        self._pace, self._unit = Pace(total, done), unit
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
