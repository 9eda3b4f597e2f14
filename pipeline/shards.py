"""The task of a sharded stage: ``run_shard(work, shard)``, idempotent and without state; the disk is the only ledger.

A stage's worker knows how to load, compute and store one shard. A shard counts as done when its record lies in the
ledger, which is written after the shard's bytes are on the disk.
"""

import hashlib
import importlib
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec

from lsmix.data.durable import write_durably
from lsmix.data.errors import CorruptError
from lsmix.data.manifest import WORK_FOLDER
from lsmix.data.versioned import UNDECODABLE
from lsmix.pipeline.device_memory import free_device_memory
from lsmix.pipeline.environment import device_name, resolve_device
from lsmix.pipeline.outside import finished_artifact
from lsmix.pipeline.stage import InputArtifact
from lsmix.pipeline.workspace import Workspace

__all__ = [
    "LEDGER",
    "InputPlace",
    "OpenWorker",
    "ShardRecord",
    "ShardSpec",
    "ShardWork",
    "ShardWorker",
    "close_workers",
    "finished_shards",
    "merge_counts",
    "open_worker",
    "record_name",
    "run_shard",
    "store_shard",
    "write_spec",
]

LEDGER = "ledger"  # the folder of the records, below ``work``


class ShardRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a finished shard."""

    shard: int
    digests: dict[str, str]  # SHA-256 by path relative to the artifact
    sizes: dict[str, int]  # bytes by path
    seconds: float
    counts: dict[str, Any]
    made_on: str = ""  # processor or graphics card; "" of shards that an earlier version made


class InputPlace(msgspec.Struct, frozen=True, kw_only=True):
    """Where a worker finds one input, and which it must be."""

    folder: str  # relative to the workspace where it is in it, since that may be mounted elsewhere on another machine
    root: str  # root digest


class ShardSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a worker process needs, by reference: nothing big travels through a scheduler."""

    module: str  # the stage's module, which has ``open_worker(folder, config, inputs, device)``
    config: dict[str, Any]
    inputs: dict[str, InputPlace]  # by role
    device: str  # "auto", "cpu", "cuda" or "cuda:N"


class ShardWork(NamedTuple):
    """The shards of one unfinished artifact, as a reference that any process can follow."""

    place: str  # its folder, or where no folder is shared its URL
    spec: str  # name of the file below ``work`` that holds the ShardSpec, called by its digest
    url: str = ""  # where it is to lie in a remote workspace


class ShardWorker(Protocol):
    """Loads, computes and stores the shards of one artifact; the three may run in different threads, shard by shard."""

    def load(self, shard: int) -> Any:
        """Read what the shard is made from."""

    def compute(self, loaded: Any) -> Any:
        """Make the shard."""

    def store(self, shard: int, computed: Any) -> tuple[dict[str, str], dict[str, Any]]:
        """Write the shard; return the SHA-256 of each file by path, and counts."""

    def close(self) -> None:
        """Give back what it holds on a device."""


def write_spec(folder: Path, spec: ShardSpec, url: str = "") -> ShardWork:
    """Write what workers need beside an unfinished artifact, and return the reference to it.

    The file is called by its contents, so several machines with other devices may work on one artifact side by side.
    """
    content = msgspec.json.encode(spec, order="sorted")
    name = _spec_name(content)
    write_durably(folder / WORK_FOLDER / name, content)
    return ShardWork(str(folder.resolve()), name, url)


def _spec_name(content: bytes) -> str:
    return f"spec-{hashlib.sha256(content).hexdigest()[:32]}.json"


class OpenWorker(NamedTuple):
    """The worker of an unfinished artifact, ready to make shards."""

    folder: Path
    worker: ShardWorker
    made_on: str  # processor or graphics card


_opened: dict[ShardWork, OpenWorker] = {}  # at most one: the worker, with its model, of the last shard


def open_worker(work: ShardWork) -> OpenWorker:
    """Return the worker of an unfinished artifact; it stays open, with its model, until another one is asked for."""
    opened = _opened.get(work)
    if opened is None:
        close_workers()  # first, since a device may not have room for two models
        opened = _opened[work] = _open(work)
    return opened


def _open(work: ShardWork) -> OpenWorker:
    workspace, folder = _working_copy(work)
    content = (folder / WORK_FOLDER / work.spec).read_bytes()
    if _spec_name(content) != work.spec:
        raise CorruptError(f"{str(folder / WORK_FOLDER / work.spec)!r} was altered. Remove it and run again.")
    spec = msgspec.json.decode(content, type=ShardSpec)
    device = resolve_device(spec.device)
    inputs = {role: _input(workspace, folder, role, place) for role, place in spec.inputs.items()}
    worker: ShardWorker = importlib.import_module(spec.module).open_worker(folder, spec.config, inputs, device)
    return OpenWorker(folder, worker, device_name(device))


def _working_copy(work: ShardWork) -> tuple[Workspace, Path]:
    """Return the workspace and the folder here in which shards are made; fetches what that needs from a URL."""
    if "://" not in work.place:
        folder = Path(work.place)
        return Workspace(folder.parent.parent), folder
    from lsmix.pipeline.remote_workspace import RemoteWorkspace
    from lsmix.pipeline.shards_afar import fetch_work

    home, stage, name = work.place.rsplit("/", 2)
    workspace = RemoteWorkspace(home)
    folder = workspace.root / stage / name
    fetch_work(folder, work.place, work.spec)
    return workspace, folder


def _input(workspace: Workspace, folder: Path, role: str, place: InputPlace) -> InputArtifact:
    artifact = finished_artifact(workspace.provide(place.folder))
    if artifact.manifest.root != place.root:
        raise CorruptError(
            f"{str(artifact.folder)!r} is not the {role} that {str(folder)!r} is made from: expected root digest "
            f"{place.root[:12]}, got {artifact.manifest.root[:12]}. Run the recipe again."
        )
    return artifact


def close_workers() -> None:
    """Close the worker that is open in this process, and give the memory of its model back to the device."""
    while _opened:
        _, opened = _opened.popitem()
        opened.worker.close()
        del opened
    free_device_memory()


def run_shard(work: ShardWork, shard: int) -> ShardRecord:
    """Make one shard from beginning to end: the task that any executor runs, anywhere, any number of times."""
    opened = open_worker(work)
    begun = time.monotonic()
    computed = opened.worker.compute(opened.worker.load(shard))
    return store_shard(work, opened, shard, computed, begun)


def store_shard(work: ShardWork, opened: OpenWorker, shard: int, computed: Any, begun: float) -> ShardRecord:
    """Write a computed shard and then its record."""
    digests, counts = opened.worker.store(shard, computed)
    folder = opened.folder
    record = ShardRecord(
        shard=shard,
        digests=digests,
        sizes={path: (folder / path).stat().st_size for path in digests},
        seconds=round(time.monotonic() - begun, 4),
        counts=counts,
        made_on=opened.made_on,
    )
    write_durably(folder / WORK_FOLDER / record_name(shard), msgspec.json.encode(record))
    if work.url:
        from lsmix.pipeline.shards_afar import send_shard

        send_shard(folder, work.url, record)
    return record


def finished_shards(folder: Path) -> dict[int, ShardRecord]:
    """Return the records of finished shards whose files are there in full; damaged records count as unfinished."""
    finished = {}
    for path in sorted((folder / WORK_FOLDER / LEDGER).glob("*.json")):
        try:
            record = msgspec.json.decode(path.read_bytes(), type=ShardRecord)
        except UNDECODABLE:
            continue
        if path.name == Path(record_name(record.shard)).name and all(
            _is_whole(folder / name, size) for name, size in record.sizes.items()
        ):
            finished[record.shard] = record
    return finished


def _is_whole(path: Path, size: int) -> bool:
    """Return whether a file is there in full; asked once, since a pool has hundreds of thousands, maybe on a network."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # the latter of a name that can be none
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == size


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
            try:
                total[name] = value if name not in total else total[name] + value
            except TypeError as error:
                raise CorruptError(
                    f"the record of shard {shard} in the ledger does not count as the others do ({name!r}). Remove it, and "
                    "run the stage again."
                ) from error
    return total


def record_name(shard: int) -> str:
    """Return the path of a shard's record below ``work``."""
    return f"{LEDGER}/{shard:06d}.json"
