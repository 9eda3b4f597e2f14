"""Where the pipeline tells what it does: a protocol that the command line draws as bars, and a silent one."""

from typing import Any, Protocol

__all__ = ["Progress", "SilentProgress"]


class Progress(Protocol):
    """What a run tells while it works. Calls come from one thread."""

    def say(self, message: str) -> None:
        """Tell one line, such as that a stage is up to date."""

    def detail(self, message: str) -> None:
        """Tell one line that only the curious want, such as what an artifact is made from."""

    def warn(self, message: str) -> None:
        """Tell that something deserves a look, though the work goes on correctly."""

    def start(self, label: str, total: int, unit: str, done: int = 0) -> None:
        """Begin to count ``total`` units of work, of which ``done`` were done before."""

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count finished units; ``note`` is a short figure to show beside them."""

    def finish(self) -> None:
        """End the count that was begun last."""

    def event(self, kind: str, **facts: Any) -> None:
        """Note what only a log wants, such as that a shard is done; facts are ready for JSON."""


class SilentProgress:
    """Tells nothing."""

    def say(self, message: str) -> None:
        """Tell nothing."""

    def detail(self, message: str) -> None:
        """Tell nothing."""

    def warn(self, message: str) -> None:
        """Tell nothing."""

    def start(self, label: str, total: int, unit: str, done: int = 0) -> None:
        """Tell nothing."""

    def advance(self, units: int = 1, note: str = "") -> None:
        """Tell nothing."""

    def finish(self) -> None:
        """Tell nothing."""

    def event(self, kind: str, **facts: Any) -> None:
        """Tell nothing."""
