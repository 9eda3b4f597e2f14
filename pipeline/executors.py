"""Where shards are made: in this process, or on Dask. Same bytes out of each.

In process, reading the next shard, computing this one and writing the last overlap; Dask runs the very same task
function in its workers, each of which opens the model once.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, Self

from lsmix.data.errors import LsmixError, PartialError, RecipeError
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


class _Failures:
    """Shards that failed, set aside until all others are done."""

    def __init__(self, folder: Path, shards: int) -> None:
        self._folder = folder
        self._shards = shards
        self._errors: dict[int, BaseException] = {}

    def add(self, shard: int, error: BaseException) -> None:
        """Set a shard aside."""
        self._errors[shard] = error

    @contextmanager
    def of(self, shard: int) -> Iterator[None]:
        """Set the shard aside if anything in the block fails, but for the system's errors, which the next would meet too."""
        try:
            yield
        except OSError:
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
            f"{len(self._errors)} of {self._shards} shards of {str(self._folder)!r} failed; the first is shard {shard}: "
            f"{type(error).__name__}: {error}. All others are done and kept; run the same command again to make the rest."
        ) from error


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
        failures = _Failures(folder, len(shards))
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
                        stored = shard, storing.submit(store_shard, folder, worker, shard, computed, begun)
            finally:
                ahead.cancel()
                if stored:
                    with failures.of(stored[0]):
                        report(stored[1].result())
        failures.tell()


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
        failures = _Failures(folder, len(shards))
        try:
            for task in as_completed(tasks):
                stop_point()
                if task.status == "finished":
                    report(task.result())
                else:
                    failures.add(tasks[task], task.exception())
        finally:
            client.cancel(list(tasks))
        failures.tell()

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
                    silence_logs=logging.CRITICAL,  # what fails is told once, at the end, and without a traceback
                )
                self._client = self._open.enter_context(Client(self._open.enter_context(cluster)))
                self._client.run(_ignore_interrupts)  # Ctrl-C reaches the whole group; only this process acts on it
            self._say(f"Dask dashboard: {self._client.dashboard_link}")
        return self._client


def _ignore_interrupts() -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
