"""Shards: what one is made from, making it, recording it, and moving it to and from a remote workspace.

A shard is complete when its record is on disk, which is written after its bytes.
"""

import hashlib
import importlib
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec

from lsmix.data.artifact import WORK_FOLDER, Artifact, FileRecord, check_listing
from lsmix.data.atomic import DECODE_ERRORS, locked_file, write_atomic
from lsmix.data.cache import fetch_file
from lsmix.data.errors import CorruptError
from lsmix.data.progress import stop_point
from lsmix.data.remote import open_remote
from lsmix.data.store import open_flow_artifact
from lsmix.data.table import METADATA_NAME, ColumnStore
from lsmix.pipeline.engine.device import device_name, resolve_device
from lsmix.pipeline.engine.device_memory import free_device_memory
from lsmix.pipeline.engine.stage import ArrayTask, ArrayTaskResult, ShardRecord, ShardWork, StageResult, StageTask
from lsmix.pipeline.workspace.locks import work_root

__all__ = [
    "LEDGER",
    "InputPlace",
    "OpenWorker",
    "ShardSpec",
    "ShardWorker",
    "ShardedWork",
    "close_workers",
    "fetch_shard",
    "fetch_work",
    "finished_shards",
    "merge_counts",
    "open_worker",
    "read_ledger",
    "record_name",
    "run_shard",
    "send_shard",
    "send_work",
    "store_shard",
    "write_spec",
]

LEDGER = "ledger"  # the folder of the records, below ``work``


class InputPlace(msgspec.Struct, frozen=True, kw_only=True):
    """Where a worker finds one input, and which it must be."""

    location: str  # URL, or path: relative to its workspace, which may be mounted elsewhere on another machine
    root: str  # root digest


class ShardSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a worker process needs, by reference: nothing big travels through a scheduler."""

    module: str  # the stage's module, which has ``open_worker(folder, config, inputs, device)``
    config: dict[str, Any]
    inputs: dict[str, InputPlace]  # by role
    device: str  # "auto", "cpu", "cuda" or "cuda:N"


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
    write_atomic(folder / WORK_FOLDER / name, content)
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
    folder = _working_copy(work)
    content = (folder / WORK_FOLDER / work.spec).read_bytes()
    if _spec_name(content) != work.spec:
        raise CorruptError(f"{str(folder / WORK_FOLDER / work.spec)!r} was altered. Remove it and run again.")
    spec = msgspec.json.decode(content, type=ShardSpec)
    device = resolve_device(spec.device)
    inputs = {role: _input(folder, role, place) for role, place in spec.inputs.items()}
    worker: ShardWorker = importlib.import_module(spec.module).open_worker(folder, spec.config, inputs, device)
    return OpenWorker(folder, worker, device_name(device))


def _working_copy(work: ShardWork) -> Path:
    """Return the folder here in which shards are made; downloads what that needs from a URL."""
    if "://" not in work.place:
        return Path(work.place)
    home, stage, name = work.place.rsplit("/", 2)
    folder = work_root(home) / stage / name
    fetch_work(folder, work.place, work.spec)
    return folder


def _input(folder: Path, role: str, place: InputPlace) -> Artifact:
    remote = "://" in place.location
    artifact = open_flow_artifact(place.location if remote else folder.parent.parent / place.location)
    if artifact.manifest.root != place.root:
        raise CorruptError(
            f"{artifact.location!r} is not the {role} that {str(folder)!r} is made from: expected root digest "
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
    write_atomic(folder / WORK_FOLDER / record_name(shard), msgspec.json.encode(record))
    if work.url:
        send_shard(folder, work.url, record)
    return record


def finished_shards(folder: Path) -> dict[int, ShardRecord]:
    """Return the records of finished shards whose files are there in full; damaged records count as unfinished."""
    finished = {}
    for path in sorted((folder / WORK_FOLDER / LEDGER).glob("*.json")):
        try:
            record = msgspec.json.decode(path.read_bytes(), type=ShardRecord)
        except DECODE_ERRORS:
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


class ShardedWork(NamedTuple):
    """How a stage divides its work."""

    module: str  # the stage's module, whose ``open_worker`` the workers call
    create: Callable[[StageTask], ColumnStore]  # writes the store's metadata; again and again to the same bytes
    conclude: Callable[
        [StageTask, ColumnStore, dict[str, Any], dict[str, str]], StageResult
    ]  # with all counts and digests

    def run(self, task: StageTask) -> StageResult:
        """Make all shards that are not done yet, and conclude.

        Raises:
            PartialError: some shards failed.
        """
        store = self.create(task)
        finished = self._make_missing(task, store, range(store.shards), _finished(task, store))
        _bring_here(task, store, finished)
        digests = {path: digest for record in finished.values() for path, digest in record.digests.items()}
        counts = {**merge_counts(finished, store.shards), "shards": store.shards}
        _tell_other_devices(task, finished)
        return self.conclude(task, store, counts, digests)

    def make_part(self, task: StageTask, part: ArrayTask) -> ArrayTaskResult:
        """Make the shards of one part that are not done yet, and leave the rest to others.

        Raises:
            PartialError: some of them failed.
        """
        store = self.create(task)
        own = range(part.index, store.shards, part.size)
        before = _finished(task, store)
        finished = self._make_missing(task, store, own, before)
        return ArrayTaskResult(
            label=task.label,
            folder=str(task.folder),
            shards=len(own),
            made=len(own) - len(before.keys() & set(own)),
            finished=len(finished),
            of=store.shards,
        )

    def _make_missing(
        self, task: StageTask, store: ColumnStore, wanted: Sequence[int], before: dict[int, ShardRecord]
    ) -> dict[int, ShardRecord]:
        """Make the wanted shards that are not done yet; return the records of all that are done then."""
        inputs = {}
        for role, artifact in task.inputs.items():
            location = artifact.url
            if artifact.is_local:
                folder, workspace = artifact.folder.resolve(), task.folder.resolve().parent.parent
                location = str(folder.relative_to(workspace) if folder.is_relative_to(workspace) else folder)
            inputs[role] = InputPlace(location=location, root=artifact.manifest.root)
        config: dict[str, Any] = msgspec.to_builtins(task.config)
        device = task.executor.worker_device(task.device)
        spec = ShardSpec(module=self.module, config=config, inputs=inputs, device=device)
        work = write_spec(task.folder, spec, task.url)
        if task.url:
            send_work(task.folder, task.url, work.spec)
        finished = dict(before)
        done = sum(len(store.shard_range(shard)) for shard in wanted if shard in finished)
        task.progress.start(task.label, sum(len(store.shard_range(shard)) for shard in wanted), "image", done=done)

        def report(record: ShardRecord) -> None:
            finished[record.shard] = record
            facts = {"label": task.label, "shard": record.shard, "seconds": record.seconds, "made_on": record.made_on}
            task.progress.event("shard", **facts)
            task.progress.advance(len(store.shard_range(record.shard)))

        task.executor.run(work, [shard for shard in wanted if shard not in finished], report)
        task.progress.finish()
        return finished


def _finished(task: StageTask, store: ColumnStore) -> dict[int, ShardRecord]:
    """Return the records of all shards that are done; in a remote workspace those that lie at the URL, or will at once."""
    here = _finished_here(task, store)
    if not task.url:
        return here
    afar = read_ledger(task.url)
    for shard in here.keys() - afar.keys():  # made, and not sent before the end
        send_shard(task.folder, task.url, here[shard])
    return here | {shard: record for shard, record in afar.items() if shard < store.shards}


def _finished_here(task: StageTask, store: ColumnStore) -> dict[int, ShardRecord]:
    return {
        shard: record
        for shard, record in finished_shards(task.folder).items()
        if shard < store.shards and store.is_written(shard)
    }


def _bring_here(task: StageTask, store: ColumnStore, finished: dict[int, ShardRecord]) -> None:
    """Fetch the shards that other machines made."""
    missing = sorted(finished.keys() - _finished_here(task, store).keys()) if task.url else []
    if not missing:
        return
    task.progress.start(f"{task.label}: fetch", len(missing), "shard")
    for shard in missing:
        stop_point()
        fetch_shard(task.folder, task.url, finished[shard])
        task.progress.advance()
    task.progress.finish()


def _tell_other_devices(task: StageTask, finished: dict[int, ShardRecord]) -> None:
    """Warn where shards were made on several kinds of device, whose last bits differ."""
    kinds = sorted({record.made_on for record in finished.values() if record.made_on})
    if len(kinds) > 1:
        task.progress.warning(
            f"{task.label}: its shards were made on {' and on '.join(kinds)}; each kind of device rounds in its own way, so "
            "another run's digest will differ unless it divides the work alike."
        )


_JOBS = 8  # small files on their way at a time
_MOST_RECORD_BYTES = 16 << 20


def send_work(folder: Path, url: str, spec: str) -> None:
    """Send what workers on other machines need to begin: the store's metadata, and the file that says what to do."""
    place = open_remote(url)
    paths = [path.relative_to(folder).as_posix() for path in folder.rglob(METADATA_NAME)]
    for path in [*paths, f"{WORK_FOLDER}/{spec}"]:
        place.write(path, folder / path)


def fetch_work(folder: Path, url: str, spec: str) -> None:
    """Fetch what ``send_work`` sent, as far as it is not here."""
    place = open_remote(url)
    sizes = place.sizes("")
    paths = [path for path in sizes if path.rpartition("/")[2] == METADATA_NAME]
    check_listing(url, [FileRecord(path=path, bytes=sizes[path], sha256="0" * 64, payload=True) for path in paths])
    for path in [*paths, f"{WORK_FOLDER}/{spec}"]:
        content = place.read(path, _MOST_RECORD_BYTES)
        if not (folder / path).is_file() or (folder / path).read_bytes() != content:
            write_atomic(folder / path, content)


def send_shard(folder: Path, url: str, record: ShardRecord) -> None:
    """Send the files of a shard, and then its record.

    Raises:
        DownloadError: the URL cannot be reached.
    """
    place = open_remote(url)
    for path in record.digests:
        place.write(path, folder / path)
    path = f"{WORK_FOLDER}/{record_name(record.shard)}"
    place.write(path, folder / path)


def read_ledger(url: str) -> dict[int, ShardRecord]:
    """Return the records of all shards at a URL whose files are there in full; damaged ones count as unfinished.

    Raises:
        CorruptError: a record names files outside of the artifact.
        DownloadError: the URL cannot be reached.
    """
    place = open_remote(url)
    sizes = place.sizes("")
    names = [path for path in sizes if path.startswith(f"{WORK_FOLDER}/{LEDGER}/")]
    with ThreadPoolExecutor(_JOBS, "ledger") as threads:
        contents = threads.map(lambda path: place.read(path, _MOST_RECORD_BYTES), sorted(names))
        records = {}
        for content in contents:
            try:
                record = msgspec.json.decode(content, type=ShardRecord)
            except DECODE_ERRORS:
                continue
            if record.sizes.keys() == record.digests.keys() and all(
                sizes.get(path) == size for path, size in record.sizes.items()
            ):
                check_listing(f"{url}/{WORK_FOLDER}/{record_name(record.shard)}", _files(record))
                records[record.shard] = record
    return records


def _files(record: ShardRecord) -> list[FileRecord]:
    return [
        FileRecord(path=path, bytes=record.sizes[path], sha256=digest, payload=True)
        for path, digest in record.digests.items()
    ]


def fetch_shard(folder: Path, url: str, record: ShardRecord) -> None:
    """Fetch the files of a shard, each checked, and write its record here.

    Raises:
        CorruptError: a file is not the one that the record tells of.
        DownloadError: the URL cannot be reached.
    """
    place = open_remote(url)
    for wanted in _files(record):
        part = folder / WORK_FOLDER / "fetched" / wanted.sha256
        part.parent.mkdir(parents=True, exist_ok=True)
        with locked_file(part, wait=True) as stream:
            fetch_file(place, wanted, stream, lambda _: None)
            (folder / wanted.path).parent.mkdir(parents=True, exist_ok=True)
            part.replace(folder / wanted.path)
    write_atomic(folder / WORK_FOLDER / record_name(record.shard), msgspec.json.encode(record))
