"""Where shards are made: in this process, or on Dask. Same bytes out of each.

In process, reading the next shard, computing this one and writing the last overlap; Dask runs the very same task
function in its workers, each of which opens the model once.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, Self

from lsmix.data.errors import PartialError, RecipeError
from lsmix.pipeline.interruption import stop_point
from lsmix.pipeline.shards import ShardRecord, open_worker, run_shard, store_shard

__all__ = ["DaskExecutor", "Executor", "InProcessExecutor"]

_Report = Callable[[ShardRecord], None]


class Executor(Protocol):
    """Makes shards of unfinished artifacts; a context that owns whatever it needs for that."""

    def __enter__(self) -> Self:
        """Return itself."""

    def __exit__(self, *_: object) -> None:
        """Give back whatever it holds."""

    def run(self, folder: Path, shards: Sequence[int], report: _Report) -> None:
        """Make the ``shards`` of the artifact in ``folder``; call ``report`` as each is done, in any order.

        Raises:
            PartialError: some shards failed; all others are done.
        """


class InProcessExecutor:
    """Makes shards one after another; a thread reads one shard ahead, another writes the shard before."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, folder: Path, shards: Sequence[int], report: _Report) -> None:
        """Make the shards; an interruption lets the shard being written be written."""
        if not shards:
            return
        worker = open_worker(folder)
        with ThreadPoolExecutor(1, "load") as loading, ThreadPoolExecutor(1, "store") as storing:
            ahead: Future[Any] = loading.submit(worker.load, shards[0])
            stored: Future[ShardRecord] | None = None
            try:
                for position, shard in enumerate(shards):
                    stop_point()
                    begun = time.monotonic()
                    loaded = ahead.result()
                    if position + 1 < len(shards):
                        ahead = loading.submit(worker.load, shards[position + 1])
                    computed = worker.compute(loaded)
                    if stored:
                        report(stored.result())  # at most one shard waits to be written, so memory stays bounded
                    stored = storing.submit(store_shard, folder, worker, shard, computed, begun)
            finally:
                ahead.cancel()
                if stored:
                    report(stored.result())


class DaskExecutor:
    """Makes shards on a Dask cluster: one of its own on loopback, or one that runs already.

    Use it as a context: the cluster is started when the first shards are made, serves all stages, and ends with it.

    Args:
        workers: processes of a cluster of its own, at least 1; ignored where ``scheduler`` is given.
        scheduler: address of a running scheduler, such as "tcp://127.0.0.1:8786"; its workers must see the same
            workspace under the same path, and have lsmix installed.
        say: told the link of the dashboard.

    Raises:
        RecipeError: neither workers nor a scheduler.
    """

    def __init__(self, *, workers: int = 0, scheduler: str = "", say: Callable[[str], None]) -> None:
        if workers < 1 and not scheduler:
            raise RecipeError(f"a Dask executor needs at least 1 worker or the address of a scheduler, got {workers}.")
        self._workers = workers
        self._scheduler = scheduler
        self._say = say
        self._open = ExitStack()
        self._client: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def run(self, folder: Path, shards: Sequence[int], report: _Report) -> None:
        """Make the shards on the cluster; shards that fail are set aside until all others are done."""
        if not shards:
            return
        from distributed import as_completed

        client = self._connected()
        folder = folder.resolve()  # workers have current folders of their own
        # pure=False: what counts is the file on the disk, so an equal call must not be answered from memory.
        tasks = {client.submit(run_shard, folder, shard, pure=False, retries=2): shard for shard in shards}
        failed: dict[int, str] = {}
        try:
            for task in as_completed(tasks):
                stop_point()
                if task.status == "finished":
                    report(task.result())
                else:
                    failed[tasks[task]] = str(task.exception())
        finally:
            client.cancel(list(tasks))
        if failed:
            shard, reason = min(failed.items())
            raise PartialError(
                f"{len(failed)} of {len(shards)} shards of {str(folder)!r} failed; the first is shard {shard}: {reason}. "
                "All others are done and kept; run the same command again to make the rest."
            )

    def _connected(self) -> Any:
        if self._client is None:
            from distributed import Client, LocalCluster

            if self._scheduler:
                try:
                    self._client = self._open.enter_context(Client(self._scheduler, timeout="10s"))
                except (OSError, ValueError) as error:
                    raise RecipeError(
                        f"no Dask scheduler answers at {self._scheduler!r}: {error}. Check '--scheduler'."
                    ) from error
            else:
                cluster = LocalCluster(
                    n_workers=self._workers,
                    threads_per_worker=1,
                    host="127.0.0.1",
                    dashboard_address="127.0.0.1:0",  # loopback only: the dashboard has no password
                )
                self._client = self._open.enter_context(Client(self._open.enter_context(cluster)))
                self._client.run(_ignore_interrupts)  # Ctrl-C reaches the whole group; only this process acts on it
            self._say(f"Dask dashboard: {self._client.dashboard_link}")
        return self._client


def _ignore_interrupts() -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
