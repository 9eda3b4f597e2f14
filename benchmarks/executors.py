"""Executors: the mix stage in process, on Dask and as a job array, and the overhead per 256-byte shard.

The start of a cluster is measured separately, because it is paid once per command and not once per shard.
"""

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contender import call_fresh
from benchmarks.mix import Stages, make_flow
from benchmarks.pools import smooth_images
from benchmarks.turns import Scores, expect, measure, save

_STEPS = 8  # K of the flow
_COUNT = 4096  # images to mix
_CHUNK_ROWS = 512
_TINY_SHARDS = 2000
_SHARD_BYTES = 256  # as large as four images of 8×8×1


def run() -> None:
    """Measure and save."""
    import torch

    from lsmix.pipeline.engine.device import prepare_device

    prepare_device("cpu")
    torch.set_num_threads(os.cpu_count() or 1)
    tables: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tables |= _mixing(folder)
        tables |= _tiny_shards(folder)
    save("executors", tables, images=_COUNT, chunk_rows=_CHUNK_ROWS, steps=_STEPS, tiny_shards=_TINY_SHARDS)


def _mixing(folder: Path) -> dict[str, Any]:
    images = smooth_images(_COUNT)
    named = {"train_images": images, "train_labels": np.arange(_COUNT) % 10}
    np.savez(folder / "data.npz", **named, test_images=images[:10], test_labels=np.arange(10))
    stages = Stages(folder, make_flow(folder / "flow", _STEPS), _COUNT, _CHUNK_ROWS)
    title = f"mix, {_COUNT} images in {_COUNT // _CHUNK_ROWS} shards, K={_STEPS}, {os.cpu_count()} cores"
    with _cluster(1) as one, _cluster(2) as two:
        work = {
            "in process": stages.job("mix"),
            "1 Dask worker, running": stages.job("mix", scheduler=one),
            "2 Dask workers, running": stages.job("mix", scheduler=two),
            "1 Dask worker, start included": stages.job("mix", workers=1),
            "2 Dask workers, start included": stages.job("mix", workers=2),
            "2 array tasks in parallel, and finalize": stages.array_job("mix", 2),
        }
        rows = measure(work, floor="in process", title=title, turns=3)
    return {title: {"floor": "in process", "unit": "images", "rows": rows}}


@contextlib.contextmanager
def _cluster(workers: int) -> Iterator[str]:
    """Start Dask workers as ``--workers`` does; yield the scheduler's address."""
    from lsmix.pipeline.engine.dask import start_cluster

    with start_cluster(workers, "cpu") as cluster:
        cluster.wait_for_workers(workers)
        yield cluster.scheduler_address


# A stage of tiny shards; workers open its processor by the name of this module.


class TinyProcessor:
    """Writes tiny shards durably; with ``flush`` off, it disables all flushing in this process for good."""

    def __init__(self, job: Any, folder: Path, inputs: Any, device: str) -> None:
        self._folder = folder
        if not job.config["flush"]:
            os.fsync = lambda _: None  # type: ignore[assignment]  # to measure the cost of flushing

    def load(self, shard: int) -> int:
        """Return the shard number."""
        return shard

    def compute(self, loaded: int, advance: Callable[[int], None]) -> bytes:
        """Return the bytes of a shard."""
        advance(1)
        return bytes(_SHARD_BYTES)

    def store(self, shard: int, computed: bytes) -> tuple[dict[str, str], dict[str, Any]]:
        """Write the shard."""
        from lsmix.data.atomic import write_atomic

        write_atomic(self._folder / f"{shard}.bin", computed)
        return {f"{shard}.bin": hashlib.sha256(computed).hexdigest()}, {"shards": 1}

    def close(self) -> None:
        """Do nothing, since no resource is open."""


def tiny_job(folder: str, *, flush: bool) -> Any:
    """Return the job of the tiny-shard stage in a folder."""
    from lsmix.pipeline.engine.shards import ShardJob

    return ShardJob(
        processor="benchmarks.executors:TinyProcessor",
        stage="tiny",
        name="tiny",
        config={"flush": flush},
        inputs={},
        device="cpu",
        folder=folder,
    )


def make_tiny(folder: str, flush: bool, first: int, count: int, step: int) -> float:
    """Make every ``step``-th tiny shard in this process; return the seconds."""
    from lsmix.pipeline.engine.executor import InProcessExecutor
    from lsmix.pipeline.engine.shards import open_job

    job = tiny_job(folder, flush=flush)
    open_job(job)  # imports modules first, which is not a cost per shard
    begun = time.perf_counter()
    done: list[int] = []
    shards = range(first, count, step)
    InProcessExecutor().run(job, shards, lambda record: done.append(record.shard))
    expect(sorted(done), shards)
    return time.perf_counter() - begun


def _tiny_shards(folder: Path) -> dict[str, Any]:
    from lsmix.pipeline.engine.dask import DaskExecutor

    numbers = iter(range(1000))

    def new_folder() -> str:
        artifact = folder / "tiny" / f"artifact-{next(numbers)}"
        artifact.mkdir(parents=True)
        return str(artifact)

    def array_tasks(count: int, *, flush: bool = True) -> Callable[[], Scores]:
        def make() -> Scores:
            artifact = new_folder()
            calls = [["make_tiny", artifact, flush, first, _TINY_SHARDS, count] for first in range(count)]
            return Scores(_TINY_SHARDS, max(call_fresh("benchmarks.executors", calls)))

        return make

    with DaskExecutor(workers=2, device="cpu", say=lambda _: None) as executor:

        def on_dask() -> int:
            done: list[int] = []
            job = tiny_job(new_folder(), flush=True)
            executor.run(job, range(_TINY_SHARDS), lambda record: done.append(record.shard))
            expect(sorted(done), range(_TINY_SHARDS))
            return _TINY_SHARDS

        jobs = {
            "in process": array_tasks(1),
            "in process, without flushing": array_tasks(1, flush=False),
            "2 Dask workers, running": on_dask,
            "2 array tasks in parallel": array_tasks(2),
        }
        title = f"{_TINY_SHARDS} shards of {_SHARD_BYTES} bytes, written durably"
        rows = measure(jobs, floor="in process", title=title, turns=3, unit="shards")
    return {title: {"floor": "in process", "unit": "shards", "rows": rows}}
