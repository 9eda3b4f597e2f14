"""Executors that make shards in this process, and the check that nothing is missing.

A shard that fails is set aside until the others are done; an error that the next shard would meet too stops at once.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final, Self

from lsmix.data.errors import LsmixError, PartialError
from lsmix.data.progress import stop_point
from lsmix.pipeline.engine.shards import close_workers, open_worker, store_shard
from lsmix.pipeline.engine.stage import Report, ShardRecord, ShardWork

__all__ = ["FATAL", "CompletenessCheck", "Failures", "InProcessExecutor"]

# Such as a full disk, or a full graphics card: the next shard would meet them too.
FATAL: Final = (OSError, MemoryError)


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


class InProcessExecutor:
    """Makes shards one after another; a thread reads one shard ahead, another writes the shard before."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def worker_device(self, device: str) -> str:
        """Return the same device."""
        return device

    def run(self, work: ShardWork, shards: Sequence[int], report: Report) -> None:
        """Make the shards; an interruption lets the shard being written be written. The model is closed at the end."""
        if not shards:
            return
        try:
            self._run(work, shards, report)
        finally:
            close_workers()  # or the next stage would have less of the device's memory

    def _run(self, work: ShardWork, shards: Sequence[int], report: Report) -> None:
        opened = open_worker(work)
        worker = opened.worker
        failures = Failures(work, len(shards))
        with ThreadPoolExecutor(1, "load") as loading, ThreadPoolExecutor(1, "store") as storing:
            ahead: Future[Any] = loading.submit(worker.load, shards[0])
            stored: tuple[int, Future[ShardRecord]] | None = None
            try:
                for position, shard in enumerate(shards):
                    stop_point()
                    begun = time.monotonic()
                    loaded, computed = ahead, None
                    if position + 1 < len(shards):
                        ahead = loading.submit(worker.load, shards[position + 1])
                    with failures.of(shard):
                        computed = worker.compute(loaded.result())
                    before, stored = stored, None
                    if before:  # at most one shard waits to be written, so memory stays bounded
                        with failures.of(before[0]):
                            report(before[1].result())
                    if computed is not None:
                        stored = shard, storing.submit(store_shard, work, opened, shard, computed, begun)
            finally:
                ahead.cancel()
                if stored:
                    with failures.of(stored[0]):
                        report(stored[1].result())
        failures.tell()


_NAMED = 10


class CompletenessCheck(InProcessExecutor):
    """Makes no shards, and says which ones are missing."""

    def run(self, work: ShardWork, shards: Sequence[int], report: Report) -> None:
        """Raise PartialError if any shard is missing."""
        if not shards:
            return
        named = ", ".join(map(str, shards[:_NAMED])) + (", …" if len(shards) > _NAMED else "")
        raise PartialError(
            f"{len(shards)} shards of {work.place!r} are missing ({named}): a part of the job array has not run, or failed. "
            "Run that part again, or make them here with the stage's command; then finish."
        )
