"""What makes the shards of unfinished artifacts: one small interface, and how failures are told behind it.

The one rule: a shard that fails is set aside until all others are done; what the next shard would meet too stops at once.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Protocol, Self

from lsmix.data.errors import LsmixError, PartialError
from lsmix.pipeline.shards import ShardRecord, ShardWork

__all__ = ["FATAL", "Executor", "Failures", "Report"]

Report = Callable[[ShardRecord], None]

# Such as a full disk, or a full graphics card: the next shard would meet them too.
FATAL: Final = (OSError, MemoryError)


class Executor(Protocol):
    """Makes shards of unfinished artifacts; a context that owns whatever it needs for that."""

    def __enter__(self) -> Self:
        """Return itself."""

    def __exit__(self, *_: object) -> None:
        """Give back whatever it holds."""

    def worker_device(self, device: str) -> str:
        """Return the device that a worker shall use, where this process would use ``device``."""

    def run(self, work: ShardWork, shards: Sequence[int], report: Report) -> None:
        """Make ``shards`` of an artifact; call ``report`` as each is done, in any order.

        Raises:
            PartialError: some shards failed; all others are done.
        """


class Failures:
    """Shards that failed, set aside until all others are done."""

    def __init__(self, work: ShardWork, shards: int) -> None:
        self._work = work
        self._shards = shards
        self._errors: dict[int, BaseException] = {}

    def add(self, shard: int, error: BaseException) -> None:
        """Set a shard aside."""
        self._errors[shard] = error

    def __len__(self) -> int:
        return len(self._errors)

    @contextmanager
    def of(self, shard: int) -> Iterator[None]:
        """Set the shard aside if anything in the block fails, but for what is fatal."""
        try:
            yield
        except FATAL:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the other shards can be made
            self.add(shard, error)

    def tell(self) -> None:
        """Raise what there is to say of shards that failed: the first of our own errors if there are no others."""
        if not self._errors:
            return
        shard, error = min(self._errors.items())
        if all(isinstance(other, LsmixError) for other in self._errors.values()):
            raise error
        raise PartialError(
            f"{len(self._errors)} of {self._shards} shards of {self._work.place!r} failed; the first is shard {shard}: "
            f"{type(error).__name__}: {error}. All others are done and kept; run the same command again to make the rest."
        ) from error
