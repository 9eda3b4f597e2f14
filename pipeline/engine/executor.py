"""The executor that makes shards in this process, and how all executors report failed shards.

After a failed shard the others are still made, unless the error, such as a full disk, would also stop them.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from lsmix.data.errors import LsmixError, PartialError
from lsmix.data.progress import stop_point
from lsmix.pipeline.engine.shards import Advance, Executor, OpenJob, Report, ShardJob, ShardRecord, close_job, open_job

__all__ = ["InProcessExecutor", "raise_failures"]

_FATAL = (OSError, MemoryError)  # such as a full disk or GPU: the next shard would fail too


def raise_failures(job: ShardJob, shards: int, errors: Mapping[int, Exception]) -> None:
    """Raise the error of the first failed shard if all errors are LsmixErrors, otherwise PartialError.

    ``shards`` is the number of shards that were attempted. Does nothing without errors.
    """
    if not errors:
        return
    shard, error = min(errors.items())
    if all(isinstance(other, LsmixError) for other in errors.values()):
        raise error
    raise PartialError(
        f"{len(errors)} of {shards} shards of {job.location!r} failed; the first is shard {shard}: "
        f"{type(error).__name__}: {error}. All others are kept. Run the command again to retry the failed shards."
    ) from error


class InProcessExecutor(Executor):
    """Makes shards one after another on this thread, while a second thread loads and a third thread stores."""

    def run(self, job: ShardJob, shards: Sequence[int], report: Report, advance: Advance = lambda images: None) -> None:
        """Make the shards. An interrupt stops after the current batch; a computed shard is stored first."""
        if not shards:
            return
        try:
            self._run(open_job(job), shards, report, advance)
        finally:
            close_job()  # frees device memory for the next stage

    def _run(self, opened: OpenJob, shards: Sequence[int], report: Report, advance: Advance) -> None:
        errors: dict[int, Exception] = {}

        @contextmanager
        def skipping(shard: int) -> Iterator[None]:
            try:
                yield
            except _FATAL:
                raise
            except Exception as error:  # noqa: BLE001 - the other shards can still be made
                errors[shard] = error

        def advance_or_stop(images: int) -> None:
            advance(images)
            stop_point()

        with ThreadPoolExecutor(1, "load") as loading, ThreadPoolExecutor(1, "store") as storing:
            ahead: Future[Any] = loading.submit(opened.processor.load, shards[0])
            behind: tuple[int, Future[ShardRecord]] | None = None

            def settle() -> None:
                """Wait for the shard being stored, so that at most one loaded and one computed shard wait in memory."""
                nonlocal behind
                stored, behind = behind, None
                if stored:
                    with skipping(stored[0]):
                        report(stored[1].result())

            try:
                for position, shard in enumerate(shards):
                    stop_point()
                    begun, loaded = time.monotonic(), ahead
                    if position + 1 < len(shards):
                        ahead = loading.submit(opened.processor.load, shards[position + 1])
                    computed = None
                    with skipping(shard):
                        computed = opened.processor.compute(loaded.result(), advance_or_stop)
                    del loaded
                    if shard not in errors:
                        settle()
                        behind = shard, storing.submit(opened.store, shard, computed, begun)
                    del computed
            finally:
                ahead.cancel()
                settle()
        raise_failures(opened.job, len(shards), errors)
