"""Make shards on a Dask cluster: a running one, or one that lsmix starts on the loopback interface.

Dask transfers jobs and records, never data. Complete shards are recorded only on disk, so losing a worker, the
scheduler or a message loses no work. A shard that is made twice has the same bytes.
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

_RETRIES = 2  # of a shard that raises an exception
_TASKS_PER_THREAD = 4  # submitted at a time, so that threads stay busy and the scheduler's memory stays small
_CONNECT_SECONDS = 10.0
_ROUND_SECONDS = 0.5  # between checks for interrupts and of the cluster
_MAX_FAILURES = 16  # if no shard has succeeded, give up after so many failures: a full disk, a wrong path
_PATIENCE_SECONDS = 15.0  # without any worker, before a message is printed
_Tasks = dict["Future[ShardRecord | Exception]", int]  # the shard of each task


class DaskExecutor(Executor):
    """Makes shards on a running Dask cluster, or on a local one that it starts.

    Use it as a context manager. The cluster starts with the first shards, serves all stages, and stops at the end.

    Args:
        workers: Number of worker processes of the local cluster, at least 1; ignored if ``scheduler`` is given.
        scheduler: Address of a running scheduler, such as "tcp://127.0.0.1:8786". Its workers need lsmix and must see
            the workspace under the same path or URL.
        device: The device that the user requested; workers of a running cluster resolve "auto" themselves.
        say: Called with the link of the dashboard, and with a message if the cluster has no workers.
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
        """Return "cuda" for any GPU, as each local worker sees only its own; on other clusters the requested device."""
        if self._scheduler:
            return self._device
        self._device = device  # the resolved device, which the cluster needs to start
        return device.partition(":")[0]

    def run(self, job: ShardJob, shards: Sequence[int], report: Report, advance: Advance = lambda images: None) -> None:
        """Make the shards on the cluster; failures are raised after all other shards are complete.

        ``advance`` is called once per shard, because a message per batch would cost too much.
        """
        if not shards:
            return
        from distributed import KilledWorker

        if job.url.startswith("memory://"):
            raise RecipeError(f"{job.url!r} is in the memory of this process, so Dask workers cannot reach it.")
        if job.url and self._scheduler:  # its workers may run on other machines and have their own folders
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
            except Exception as error:  # noqa: BLE001 - the other shards can still be made
                result = error
            if isinstance(result, CancelledError | MemoryError):
                raise result
            if isinstance(result, ShardRecord):
                made += 1
                report(result)
                advance(result.counts.get("images", 0))
                return
            errors[shard] = result
            if not made and len(errors) >= _MAX_FAILURES:
                raise_failures(job, len(shards), errors)

        self._run(client, job, shards, settle)
        # A dead worker fails all of its queued shards. Rerun each alone to find the culprit, which kills as many
        # workers again as Dask allows.
        suspects, killed = killed, []
        for shard in suspects:
            self._run(client, job, [shard], settle)
        for shard in killed:
            errors[shard] = RuntimeError("each worker that ran it died")
        if self._device.startswith("cuda") and not self._scheduler:
            client.run(close_job, on_error="ignore")  # frees GPU memory for the next stage
        raise_failures(job, len(shards), errors)

    def _run(self, client: Any, job: ShardJob, shards: Sequence[int], settle: Callable[[int, Any], None]) -> None:
        """Make shards, with a bounded number of tasks at a time; call ``settle`` with each shard and its task."""
        # pure=False: the result is a file, so Dask must not answer an equal call from its cache.
        executor = client.get_executor(pure=False, retries=_RETRIES)
        waiting, running = deque(shards), _Tasks()
        workers = _Workers(client, self._say)
        try:
            while (waiting or running) and client.status == "running":
                stop_point()
                while waiting and len(running) < _TASKS_PER_THREAD * workers.threads():
                    shard = waiting.popleft()
                    running[executor.submit(_attempt, job, shard)] = shard
                for task in wait(running, _ROUND_SECONDS, FIRST_COMPLETED).done:
                    settle(running[task], task)
                    del running[task]
        except CancelledError:  # raised by tasks if the connection is lost
            pass
        finally:
            if running and client.status == "running":
                executor.shutdown(wait=False)  # cancels them
        if waiting or running:
            raise PartialError(
                f"lost the connection to the Dask scheduler ({self._scheduler or 'local'}) while making {job.location!r}; "
                f"{len(waiting) + len(running)} of {len(shards)} shards did not report back. Complete shards are kept. Run the command again."
            )

    def _connected(self) -> Any:
        if self._client is None:
            from distributed import Client

            logging.getLogger("distributed").setLevel(logging.CRITICAL)  # lsmix reports each failure once
            if self._scheduler:
                self._client = self._open.enter_context(_client_of(self._scheduler))
            else:
                cluster = self._open.enter_context(start_cluster(self._workers, self._device))
                self._client = self._open.enter_context(Client(cluster))
                # Ctrl-C reaches all processes of the group; only this one handles it. Also applies to workers that
                # start later.
                self._client.register_plugin(_ignoring_interrupts(), name="lsmix-interrupts")
            self._say(f"Dask dashboard: {self._client.dashboard_link}")
        return self._client


def _client_of(scheduler: str) -> Any:
    """Return a client of a running scheduler.

    Raises:
        RecipeError: The address is invalid, or no scheduler answers in time.
    """
    from distributed import Client

    kind, separator, _ = scheduler.rpartition("://")
    if not scheduler.isprintable() or (separator and kind not in ("tcp", "tls")):
        raise RecipeError(
            f"{scheduler!r} is not the address of a Dask scheduler. Expected one such as 'tcp://10.0.0.5:8786'."
        )
    try:
        # A server that is not a scheduler may answer anything, or nothing.
        return bounded(lambda: Client(scheduler, timeout=_CONNECT_SECONDS), _CONNECT_SECONDS + _ROUND_SECONDS)
    except Exception as error:
        # distributed raises all kinds of errors if the server is not a scheduler or TLS is not configured.
        raise RecipeError(f"no Dask scheduler answers at {scheduler!r}: {error}. Check '--scheduler'.") from error


def _attempt(job: ShardJob, shard: int) -> ShardRecord | Exception:
    """Make a shard. Return errors that a retry cannot fix, because Dask retries tasks that raise."""
    try:
        return run_shard(job, shard)
    except (CorruptError, MemoryError) as error:
        return error


class _Workers:
    """Counts the threads of a cluster at intervals, and warns once if it has no workers for a while."""

    def __init__(self, client: Any, say: Callable[[str], None]) -> None:
        self._client = client
        self._say = say
        self._counted_at, self._threads = -1.0, 0
        self._warn_at = time.monotonic() + _PATIENCE_SECONDS

    def threads(self) -> int:
        """Return the number of threads of all workers, at least 1."""
        now = time.monotonic()
        if now - self._counted_at > _ROUND_SECONDS:
            workers = self._client.scheduler_info(n_workers=-1)["workers"]
            self._counted_at, self._threads = now, sum(worker["nthreads"] for worker in workers.values())
            if self._threads:
                self._warn_at = now + _PATIENCE_SECONDS
            elif now > self._warn_at:
                self._say("waiting for Dask workers: the cluster has none. Ctrl-C stops and keeps completed work")
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
    """Start a local cluster of ``workers`` single-threaded processes for a resolved device; the caller closes it."""
    from distributed import Nanny, Scheduler, SpecCluster

    # No memory limit: a shard's memory is bounded anyway, and workers share the machine with other programs.
    options = {"nthreads": 1, "host": _LOOPBACK, "dashboard": False, "memory_limit": 0, "silence_logs": 50}
    return SpecCluster(
        workers={
            worker: {"cls": Nanny, "options": {**options, "env": worker_environment(worker, workers, device)}}
            for worker in range(workers)
        },
        # Loopback only, because neither the scheduler nor its dashboard has a password.
        scheduler={
            "cls": Scheduler,
            "options": {"host": _LOOPBACK, "port": 0, "dashboard": True, "dashboard_address": f"{_LOOPBACK}:0"},
        },
        silence_logs=50,  # lsmix reports each failure once, without a traceback
    )


def worker_environment(worker: int, workers: int, device: str) -> dict[str, str]:
    """Return the environment variables of one of ``workers`` processes: its number of threads and its GPU.

    GPUs are assigned round-robin, from CUDA_VISIBLE_DEVICES if that is set; "cuda:N" gives all workers GPU N.
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
    """Return the GPUs that this process may use, in the form of CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        return visible.split(",")
    import torch

    return [str(card) for card in range(torch.cuda.device_count())]


def make_executor(*, workers: int, scheduler: str, device: str, say: Callable[[str], None]) -> Executor:
    """Return the executor for these options: this process, or a ``DaskExecutor`` if workers or a scheduler are given.

    Raises:
        RecipeError: Both are given.
    """
    if workers and scheduler:
        raise RecipeError(
            f"'--workers {workers}' starts a Dask cluster and '--scheduler {scheduler}' uses a running one. Remove one of them."
        )
    if not workers and not scheduler:
        return InProcessExecutor()
    return DaskExecutor(workers=workers, scheduler=scheduler, device=device, say=say)
