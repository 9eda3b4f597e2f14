"""The task of a sharded stage: ``run_shard(folder, shard)``, idempotent and without state; the disk is the only ledger.

A stage's worker knows how to load, compute and store one shard. A shard counts as done when its record lies in the
ledger, which is written after the shard's bytes are on the disk.
"""

import functools
import importlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec

from lsmix.data.durable import write_durably
from lsmix.data.errors import CorruptError
from lsmix.data.manifest import WORK_FOLDER
from lsmix.pipeline.outside import finished_artifact

__all__ = [
    "ShardRecord",
    "ShardSpec",
    "ShardWorker",
    "finished_shards",
    "merge_counts",
    "open_worker",
    "run_shard",
    "store_shard",
    "write_spec",
]

_SPEC_FILE = "spec.json"
_LEDGER = "ledger"


class ShardRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a finished shard."""

    shard: int
    digests: dict[str, str]  # SHA-256 by path relative to the artifact
    sizes: dict[str, int]  # bytes by path
    seconds: float
    counts: dict[str, Any]


class ShardSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a worker process needs, by reference: nothing big travels through a scheduler."""

    module: str  # the stage's module, which has ``open_worker(folder, config, inputs, device)``
    config: dict[str, Any]
    inputs: dict[str, str]  # folder of the artifact by role
    device: str


class ShardWorker(Protocol):
    """Loads, computes and stores the shards of one artifact; the three may run in different threads, shard by shard."""

    def load(self, shard: int) -> Any:
        """Read what the shard is made from."""

    def compute(self, loaded: Any) -> Any:
        """Make the shard."""

    def store(self, shard: int, computed: Any) -> tuple[dict[str, str], dict[str, Any]]:
        """Write the shard; return the SHA-256 of each file by path, and counts."""


def write_spec(folder: Path, spec: ShardSpec) -> None:
    """Write the reference that workers open; folders may have moved since an earlier session, so always anew."""
    write_durably(folder / WORK_FOLDER / _SPEC_FILE, msgspec.json.encode(spec))


@functools.lru_cache(maxsize=2)
def _cached_worker(folder: Path, spec: bytes) -> ShardWorker:
    facts = msgspec.json.decode(spec, type=ShardSpec)
    inputs = {role: finished_artifact(Path(path)) for role, path in facts.inputs.items()}
    worker: ShardWorker = importlib.import_module(facts.module).open_worker(folder, facts.config, inputs, facts.device)
    return worker


def open_worker(folder: Path) -> ShardWorker:
    """Return the worker of an unfinished artifact; it is opened once a process, with its model."""
    return _cached_worker(folder, (folder / WORK_FOLDER / _SPEC_FILE).read_bytes())


def run_shard(folder: Path, shard: int) -> ShardRecord:
    """Make one shard from beginning to end: the task that any executor runs, anywhere, any number of times."""
    worker = open_worker(folder)
    begun = time.monotonic()
    computed = worker.compute(worker.load(shard))
    return store_shard(folder, worker, shard, computed, begun)


def store_shard(folder: Path, worker: ShardWorker, shard: int, computed: Any, begun: float) -> ShardRecord:
    """Write a computed shard and then its record."""
    digests, counts = worker.store(shard, computed)
    record = ShardRecord(
        shard=shard,
        digests=digests,
        sizes={path: (folder / path).stat().st_size for path in digests},
        seconds=round(time.monotonic() - begun, 4),
        counts=counts,
    )
    write_durably(_record_path(folder, shard), msgspec.json.encode(record))
    return record


def finished_shards(folder: Path) -> dict[int, ShardRecord]:
    """Return the records of finished shards whose files are there in full; damaged records count as unfinished."""
    finished = {}
    for path in sorted((folder / WORK_FOLDER / _LEDGER).glob("*.json")):
        try:
            record = msgspec.json.decode(path.read_bytes(), type=ShardRecord)
        except msgspec.MsgspecError:
            continue
        if all(
            (folder / name).is_file() and (folder / name).stat().st_size == size for name, size in record.sizes.items()
        ):
            finished[record.shard] = record
    return finished


def merge_counts(records: Mapping[int, ShardRecord], shards: int) -> dict[str, Any]:
    """Add up the counts of all shards: numbers are summed, lists are joined in order of the shards.

    Raises:
        CorruptError: a shard has no record.
    """
    total: dict[str, Any] = {}
    for shard in range(shards):
        if shard not in records:
            raise CorruptError(f"shard {shard} of {shards} has no record in the ledger. Run the stage again.")
        for name, value in records[shard].counts.items():
            total[name] = value if name not in total else total[name] + value
    return total


def _record_path(folder: Path, shard: int) -> Path:
    return folder / WORK_FOLDER / _LEDGER / f"{shard:06d}.json"
