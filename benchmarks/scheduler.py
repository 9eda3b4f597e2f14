"""The overhead of a hundred thousand nearly empty shards: scheduling them on Dask, and reading their records.

Nothing is written during scheduling, so that only the load of the scheduler is measured.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.contender import call_fresh, peak_mb
from benchmarks.turns import expect, save
from lsmix.data.artifact import FileRecord
from lsmix.pipeline.engine.shards import ShardJob, ShardRecord

_LOADS = (1000, 10_000, 100_000)  # shards
_FILES_A_SHARD = 8  # as in a pool, one per column
_NOWHERE = ShardJob(processor="", stage="tiny", name="tiny", config={}, inputs={}, device="cpu", folder="nowhere")


def run() -> None:
    """Measure and save."""
    tables = _load()
    with tempfile.TemporaryDirectory() as temporary:
        tables |= _ledger(Path(temporary))
    save("scheduler", tables)


def empty_shard(work: Any, shard: int) -> Any:
    """Return a record like that of a pool's shard, but write nothing."""
    names = [f"column{i}/c/{shard}" for i in range(_FILES_A_SHARD)]
    files = [FileRecord(path=name, bytes=1, sha256="0" * 64, payload=True) for name in names]
    return ShardRecord(shard=shard, files=files, seconds=0.0, counts={"images": 1}, made_on="cpu")


def hand_out(how: str, shards: int) -> dict[str, float]:
    """Schedule tasks on two workers; return the cost for this process, which is both client and scheduler."""
    from lsmix.pipeline.engine import dask as on_dask

    on_dask._attempt = empty_shard
    received: list[int] = []
    facts = {"shards": float(shards)}
    with on_dask.DaskExecutor(workers=2, device="cpu", say=lambda _: None) as executor:
        executor.run(_NOWHERE, range(100), lambda record: None)  # starts the cluster and warms it up

        def bounded() -> None:
            executor.run(_NOWHERE, range(shards), lambda record: received.append(record.shard))

        def all_together() -> None:
            from distributed import as_completed, get_client

            tasks = get_client().map(lambda shard: empty_shard(None, shard), range(shards), pure=False)
            received.extend(record.shard for _, record in as_completed(tasks, with_results=True))

        begun, cpu = time.perf_counter(), time.process_time()
        facts["peak_mb"] = peak_mb({"DaskExecutor": bounded, "client.map": all_together}[how])
        facts["seconds"], facts["cpu_seconds"] = time.perf_counter() - begun, time.process_time() - cpu
        facts["shards_per_second"] = shards / facts["seconds"]
        expect(sorted(received), range(shards))
    return facts


def _load() -> dict[str, Any]:
    rows = {}
    print("\nscheduling nearly empty shards on 2 workers; cost of the client and scheduler process", flush=True)
    for shards in _LOADS:
        for how in ("DaskExecutor", "client.map"):
            (row,) = call_fresh("benchmarks.scheduler", [["hand_out", how, shards]])
            rows[f"{how}, {shards}"] = row
            print(f"  {how:<14} {shards:>7}  {row}", flush=True)
    return {"the scheduler's load, nothing written": {"figures": rows}}


def _ledger(folder: Path) -> dict[str, Any]:
    """Read many shard records; all name the same files, so that reading and checking is measured and not the disk."""
    import msgspec

    from lsmix.pipeline.engine.shards import finished_shards

    print("\nshard records, read from the page cache", flush=True)
    rows, artifact = {}, folder / "ledger" / "artifact"
    ledger = artifact / "work" / "ledger"
    ledger.mkdir(parents=True)
    names = [f"column{i}" for i in range(_FILES_A_SHARD)]
    for name in names:
        (artifact / name).write_bytes(b"1")
    files = [FileRecord(path=name, bytes=1, sha256="0" * 64, payload=True) for name in names]
    written = 0
    for shards in _LOADS:
        for shard in range(written, shards):
            record = ShardRecord(shard=shard, files=files, seconds=0.0, counts={"images": 1})
            (ledger / f"{shard:06d}.json").write_bytes(msgspec.json.encode(record))
        written = shards
        taken = []
        for _ in range(3):
            begun = time.perf_counter()
            expect(sorted(finished_shards(artifact)), range(shards))
            taken.append(time.perf_counter() - begun)
        rows[f"{shards} records"] = {"seconds": sorted(taken)[1], "µs per record": sorted(taken)[1] / shards * 1e6}
        print(f"  {shards:>7}  {rows[f'{shards} records']}", flush=True)
    return {"reading shard records": {"figures": rows}}
