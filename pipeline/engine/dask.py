"""Shards on a Dask cluster: one that lsmix starts on loopback, or one that is running.

Dask carries jobs and records, never data. Completed shards are recorded on disk only, so a lost worker, scheduler or
message loses no work, and a shard that is made twice has the same bytes.
"""

import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from lsmix.data.errors import CorruptError, PartialError, RecipeError
from lsmix.data.progress import bounded, stop_point
from lsmix.pipeline.engine.executor import InProcessExecutor, raise_failures
from lsmix.pipeline.engine.shards import Advance, Executor, Report, ShardJob, ShardRecord, close_job, run_shard

__all__ = ["DaskExecutor", "make_executor", "start_cluster", "worker_environment"]

_RETRIES = 2  # of a shard that raises
_TASKS_A_THREAD = 4  # submitted ahead, so that no thread waits; the rest waits here, and the scheduler stays small
_CONNECT_SECONDS = 10.0
_ROUND_SECONDS = 0.5  # between two looks at interrupts and at the cluster
_MOST_FAILURES = 16  # without a single shard made, after which the rest is not tried: a full disk, a wrong path
_PATIENCE_SECONDS = 15.0  # without any worker, until a message says so
_Tasks = dict["Future[ShardRecord | Exception]", int]  # the shard of each task


class DaskExecutor(Executor):
    """Makes shards on a Dask cluster: one of its own on loopback, or one that runs already.

    Use it as a context: the cluster is started when the first shards are made, serves all stages, and ends with it.

    Args:
        workers: processes of a cluster of its own, at least 1; ignored if ``scheduler`` is given.
        scheduler: address of a running scheduler, such as "tcp://127.0.0.1:8786"; its workers must see the same
            workspace under the same path or URL, and have lsmix installed.
        device: as the user asked for it; workers of another cluster resolve "auto" themselves.
        say: called with the link of the dashboard, and with a message when the cluster has no workers.
    """

    def __init__(
        self, *, workers: int = 0, scheduler: str = "", device: str = "auto", say: Callable[[str], None]
    ) -> None:
        self._workers = workers
        self._scheduler = scheduler
        self._device = device
        self._say = say
        self._open = ExitStack()
        self._client: Any = None

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def worker_device(self, device: str) -> str:
        """Return "cuda" for any card, since each of our workers sees its own alone; elsewhere what the user asked for."""
        if self._scheduler:
            return self._device
        self._device = device  # resolved, which the cluster must know when it starts
        return device.partition(":")[0]

    def run(self, job: ShardJob, shards: Sequence[int], report: Report, advance: Advance = lambda images: None) -> None:
        """Make the shards on the cluster; shards that fail are skipped until all others are complete.

        Images are counted shard by shard, since a batch is not worth a message.
        """
        if not shards:
            return
        from distributed import KilledWorker

        if job.url.startswith("memory://"):
            raise RecipeError(f"{job.url!r} lives in the memory of this process: workers cannot reach it.")
        if job.url and self._scheduler:  # its workers run on any machine, and have folders of their own
            job = replace(job, folder="")
        client = self._connected()
        errors: dict[int, Exception] = {}
        killed: list[int] = []
        made = 0

        def settle(shard: int, task: "Future[ShardRecord | Exception]") -> None:
            nonlocal made
            try:
                result = task.result()
            except KilledWorker:
                killed.append(shard)
                return
            except Exception as error:  # noqa: BLE001 - any error: the other shards can be made
                result = error
            if isinstance(result, CancelledError | MemoryError):
                raise result
            if isinstance(result, ShardRecord):
                made += 1
                report(result)
                advance(result.counts.get("images", 0))
                return
            errors[shard] = result
            if not made and len(errors) >= _MOST_FAILURES:
                raise_failures(job, len(shards), errors)

        self._run(client, job, shards, settle)
        # A dead worker fails all shards that it was given. Run each of them alone to find the one that kills workers; it
        # costs as many workers again as Dask allows.
        suspects, killed = killed, []
        for shard in suspects:
            self._run(client, job, [shard], settle)
        for shard in killed:
            errors[shard] = RuntimeError("each worker that took it died, so it is left out")
        if self._device.startswith("cuda") and not self._scheduler:
            client.run(close_job, on_error="ignore")  # or the next stage would have less of the cards' memory
        raise_failures(job, len(shards), errors)

    def _run(self, client: Any, job: ShardJob, shards: Sequence[int], settle: Callable[[int, Any], None]) -> None:
        """Make shards, at most so many tasks at a time; ``settle`` is called with each shard and its completed task."""
        # pure=False: what counts is the file on the disk, so an equal call must not be answered from memory.
        executor = client.get_executor(pure=False, retries=_RETRIES)
        waiting, running = deque(shards), _Tasks()
        workers = _Workers(client, self._say)
        try:
            while (waiting or running) and client.status == "running":
                stop_point()
                while waiting and len(running) < _TASKS_A_THREAD * workers.threads():
                    shard = waiting.popleft()
                    running[executor.submit(_attempt, job, shard)] = shard
                for task in wait(running, _ROUND_SECONDS, FIRST_COMPLETED).done:
                    settle(running[task], task)
                    del running[task]
        except CancelledError:  # of a task, once the connection is lost
            pass
        finally:
            if running and client.status == "running":
                executor.shutdown(wait=False)  # cancels them
        if waiting or running:
            raise PartialError(
                f"the Dask scheduler of {job.location!r} went away ({self._scheduler or 'its own'}); {len(waiting) + len(running)} "
                f"of {len(shards)} shards were not heard of. All others are done and kept; run the same command again."
            )

    def _connected(self) -> Any:
        if self._client is None:
            from distributed import Client

            logging.getLogger("distributed").setLevel(logging.CRITICAL)  # our own errors report each failure once
            if self._scheduler:
                self._client = self._open.enter_context(_client_of(self._scheduler))
            else:
                cluster = self._open.enter_context(start_cluster(self._workers, self._device))
                self._client = self._open.enter_context(Client(cluster))
                # Ctrl-C reaches the whole group; only this process acts on it. Workers that start later do the same.
                self._client.register_plugin(_ignoring_interrupts(), name="lsmix-interrupts")
            self._say(f"Dask dashboard: {self._client.dashboard_link}")
        return self._client


def _client_of(scheduler: str) -> Any:
    """Return a client of a running scheduler.

    Raises:
        RecipeError: the address is of another kind, or no scheduler answers there in time.
    """
    from distributed import Client

    kind, separator, _ = scheduler.rpartition("://")
    if not scheduler.isprintable() or (separator and kind not in ("tcp", "tls")):
        raise RecipeError(
            f"{scheduler!r} is not the address of a Dask scheduler. Expected one such as 'tcp://10.0.0.5:8786'."
        )
    try:
        # Another server than a scheduler may answer anything, or never.
        return bounded(lambda: Client(scheduler, timeout=_CONNECT_SECONDS), _CONNECT_SECONDS + _ROUND_SECONDS)
    except Exception as error:
        # What is no scheduler, or has no TLS configured, makes distributed raise errors of any kind.
        raise RecipeError(f"no Dask scheduler answers at {scheduler!r}: {error}. Check '--scheduler'.") from error


def _attempt(job: ShardJob, shard: int) -> ShardRecord | Exception:
    """Make a shard; errors that trying again would not change are returned, since Dask tries again what is raised."""
    try:
        return run_shard(job, shard)
    except (CorruptError, MemoryError) as error:
        return error


class _Workers:
    """Counts the threads of a cluster now and then, and warns once if it has no workers for a while."""

    def __init__(self, client: Any, say: Callable[[str], None]) -> None:
        self._client = client
        self._say = say
        self._counted_at, self._threads = -1.0, 0
        self._warn_at = time.monotonic() + _PATIENCE_SECONDS

    def threads(self) -> int:
        """Return the threads of all workers, at least 1."""
        now = time.monotonic()
        if now - self._counted_at > _ROUND_SECONDS:
            workers = self._client.scheduler_info(n_workers=-1)["workers"]
            self._counted_at, self._threads = now, sum(worker["nthreads"] for worker in workers.values())
            if self._threads:
                self._warn_at = now + _PATIENCE_SECONDS
            elif now > self._warn_at:
                self._say(
                    "the Dask cluster has no workers; waiting for some to join. Ctrl-C stops, and keeps what is done"
                )
                self._warn_at = math.inf
        return max(self._threads, 1)


def _ignoring_interrupts() -> Any:
    from distributed import WorkerPlugin

    class IgnoreInterrupts(WorkerPlugin):
        def setup(self, worker: Any) -> None:
            import signal

            signal.signal(signal.SIGINT, signal.SIG_IGN)

    return IgnoreInterrupts()


_LOOPBACK = "127.0.0.1"


def start_cluster(workers: int, device: str) -> Any:
    """Return a running cluster of ``workers`` processes with a thread each, for a resolved device; close it when done."""
    from distributed import Nanny, Scheduler, SpecCluster

    # No limit: workers share the machine's memory with other programs, and a shard's memory is bounded anyway.
    options = {"nthreads": 1, "host": _LOOPBACK, "dashboard": False, "memory_limit": 0, "silence_logs": 50}
    return SpecCluster(
        workers={
            worker: {"cls": Nanny, "options": {**options, "env": worker_environment(worker, workers, device)}}
            for worker in range(workers)
        },
        # Loopback only: neither the scheduler nor its dashboard has a password.
        scheduler={
            "cls": Scheduler,
            "options": {"host": _LOOPBACK, "port": 0, "dashboard": True, "dashboard_address": f"{_LOOPBACK}:0"},
        },
        silence_logs=50,  # our own errors report each failure once, without a traceback
    )


def worker_environment(worker: int, workers: int, device: str) -> dict[str, str]:
    """Return the environment of one of ``workers`` processes: its number of threads, and its graphics card.

    Cards are dealt out in turn, those that CUDA_VISIBLE_DEVICES names if it is set; "cuda:N" gives all workers card N.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(max(1, cores // workers))
    wanted = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
    if device.startswith("cuda"):
        cards = _cards()
        _, _, index = device.partition(":")
        wanted["CUDA_VISIBLE_DEVICES"] = cards[int(index) if index else worker % len(cards)]
    return wanted


def _cards() -> list[str]:
    """Return the names of the graphics cards that this process may use, as CUDA_VISIBLE_DEVICES takes them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        return visible.split(",")
    import torch

    return [str(card) for card in range(torch.cuda.device_count())]


def make_executor(*, workers: int, scheduler: str, device: str, say: Callable[[str], None]) -> Executor:
    """Return what makes shards: this process, unless Dask workers or a scheduler are asked for; see ``DaskExecutor``.

    Raises:
        RecipeError: both are asked for.
    """
    if workers and scheduler:
        raise RecipeError(
            f"'--workers {workers}' starts a Dask cluster of its own and '--scheduler {scheduler}' joins another: give one."
        )
    if not workers and not scheduler:
        return InProcessExecutor()
    return DaskExecutor(workers=workers, scheduler=scheduler, device=device, say=say)
