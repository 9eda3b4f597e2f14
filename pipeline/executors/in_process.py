"""Shards made in this process: reading the next, computing this one and writing the last overlap."""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

from lsmix.pipeline.executors.executor import Failures, Report
from lsmix.pipeline.interruption import stop_point
from lsmix.pipeline.shards import ShardRecord, ShardWork, close_workers, open_worker, store_shard

__all__ = ["InProcessExecutor"]


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
