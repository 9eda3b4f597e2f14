"""Shards: the job that makes them, its processor, and the records of complete shards.

A shard is complete when its record is on disk, because the record is written after the data.
"""

import contextlib
import importlib
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import msgspec

from lsmix.data.artifact import WORK_FOLDER, Artifact, FileRecord, check_listing
from lsmix.data.atomic import DECODE_ERRORS, locked_file, write_atomic
from lsmix.data.cache import fetch_file
from lsmix.data.errors import CorruptError
from lsmix.data.remote import LocalFile, open_remote
from lsmix.data.sharing.hub import open_target
from lsmix.data.store import open_flow_artifact
from lsmix.pipeline.engine.device import device_name, free_device_memory, resolve_device
from lsmix.pipeline.workspace.locks import work_root

__all__ = [
    "LEDGER",
    "Advance",
    "Executor",
    "OpenJob",
    "Report",
    "ShardJob",
    "ShardProcessor",
    "ShardRecord",
    "close_job",
    "fetch_shard",
    "finished_shards",
    "merge_counts",
    "open_job",
    "read_ledger",
    "record_name",
    "run_shard",
    "send_shard",
]

LEDGER = "ledger"  # the folder of the records, below ``work``

# Called with the number of images computed since the last call; it may raise to stop the computation.
Advance = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """Everything a process needs to make shards of one unfinished artifact, as strings and numbers.

    Locations are absolute, a URL, or relative to the workspace, which may be mounted elsewhere on another machine.
    """

    processor: str  # "module:class" of the ShardProcessor
    stage: str
    name: str  # of the artifact, in the recipe
    config: dict[str, Any]  # of the stage, ready for JSON
    inputs: dict[str, tuple[str, str]]  # (location, content digest) by role
    device: str  # "auto", "cpu", "cuda" or "cuda:N"
    folder: str  # of the artifact; "" for a process without access to it, which works in a local copy of ``url``
    url: str = ""  # of the artifact in a remote workspace; each shard is uploaded to it
    metadata: dict[str, str] = field(default_factory=dict)  # of the store, by path; for processes without the folder

    @property
    def label(self) -> str:
        """The artifact for messages: "mix lsmix"."""
        return f"{self.stage} {self.name}"

    @property
    def location(self) -> str:
        """Folder or URL of the artifact."""
        return self.folder or self.url


class ShardProcessor(Protocol):
    """Makes the shards of one job. The three steps may run in different threads, each for a different shard.

    A processor is created as ``Processor(job, folder, inputs, device)`` with the local folder of the artifact, its
    complete inputs by role, and the name of the device.
    """

    def load(self, shard: int) -> Any:
        """Read the inputs of the shard."""

    def compute(self, loaded: Any, advance: Advance) -> Any:
        """Compute the shard; call ``advance`` after each batch."""

    def store(self, shard: int, computed: Any) -> tuple[dict[str, str], dict[str, Any]]:
        """Write the shard; return the SHA-256 of each file by path, and its counts."""

    def close(self) -> None:
        """Release device memory."""


class ShardRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The record of a complete shard."""

    shard: int
    files: list[FileRecord]
    seconds: float
    counts: dict[str, Any]
    made_on: str = ""  # name of the processor or GPU


Report = Callable[[ShardRecord], None]  # called for each complete shard, in any order


class Executor(ABC):
    """Makes shards of unfinished artifacts; a context manager that owns the resources for it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:  # noqa: B027 - not abstract, because most executors have no resources
        """Release the resources."""

    def worker_device(self, device: str) -> str:
        """Return the device for a job's workers if this process would use ``device``."""
        return device

    @abstractmethod
    def run(self, job: ShardJob, shards: Sequence[int], report: Report, advance: Advance = lambda images: None) -> None:
        """Make ``shards`` of an artifact; call ``report`` after each, and ``advance`` while they are computed.

        Raises:
            PartialError: Some shards failed; all others are complete.
        """


class OpenJob:
    """A job that is open in this process, with its processor and model."""

    def __init__(self, job: ShardJob) -> None:
        self.job = job
        self.folder = _working_copy(job)
        inputs = {
            role: _open_input(self.folder.parent.parent, job.label, role, *location_and_root)
            for role, location_and_root in job.inputs.items()
        }
        device = resolve_device(job.device)
        module, _, name = job.processor.partition(":")
        processor = getattr(importlib.import_module(module), name)
        self.processor: ShardProcessor = processor(job, self.folder, inputs, device)
        self._made_on = device_name(device)

    def store(self, shard: int, computed: Any, begun: float) -> ShardRecord:
        """Write a computed shard and then its record; ``begun`` is the start of the work, by ``time.monotonic``."""
        digests, counts = self.processor.store(shard, computed)
        record = ShardRecord(
            shard=shard,
            files=[
                FileRecord(path=path, bytes=(self.folder / path).stat().st_size, sha256=digest, payload=True)
                for path, digest in digests.items()
            ],
            seconds=round(time.monotonic() - begun, 4),
            counts=counts,
            made_on=self._made_on,
        )
        write_atomic(self.folder / WORK_FOLDER / record_name(shard), msgspec.json.encode(record))
        if self.job.url:
            send_shard(self.folder, self.job.url, record)
        return record


def _working_copy(job: ShardJob) -> Path:
    """Return the local folder to make shards in; write the store's metadata to it if it is a copy."""
    if job.folder:
        return Path(job.folder)
    home, stage, name = job.url.rsplit("/", 2)
    folder = work_root(home) / stage / name
    for path, text in job.metadata.items():
        write_atomic(folder / path, text.encode())
    return folder


def _open_input(workspace: Path, label: str, role: str, location: str, digest: str) -> Artifact:
    artifact = open_flow_artifact(location if "://" in location else workspace / location)
    if artifact.manifest.content_digest != digest:
        raise CorruptError(
            f"{artifact.location!r}, the {role} of {label}, has changed: expected content digest {digest[:12]}, got "
            f"{artifact.manifest.content_digest[:12]}. Run the recipe again."
        )
    return artifact


_opened: list[OpenJob] = []  # at most one: the job of the last shard


def open_job(job: ShardJob) -> OpenJob:
    """Return a job opened in this process. It stays open, with its model, until another job is opened."""
    if not _opened or _opened[0].job != job:
        close_job()  # first, because a device may not have memory for two models
        _opened.append(OpenJob(job))
    return _opened[0]


def close_job() -> None:
    """Close the open job, if any, and release the device memory of its model."""
    while _opened:
        opened = _opened.pop()
        opened.processor.close()
        del opened
    free_device_memory()


def run_shard(job: ShardJob, shard: int) -> ShardRecord:
    """Make one shard. Any process may call this any number of times; the bytes are the same."""
    opened = open_job(job)
    begun = time.monotonic()
    computed = opened.processor.compute(opened.processor.load(shard), lambda _: None)
    return opened.store(shard, computed, begun)


def finished_shards(folder: Path) -> dict[int, ShardRecord]:
    """Return the records of complete shards, whose files have the recorded sizes; ignore damaged records."""
    contents = ((path.name, path.read_bytes()) for path in sorted((folder / WORK_FOLDER / LEDGER).glob("*.json")))
    return _complete_records(contents, lambda file: _has_size(folder / file.path, file.bytes))


def _complete_records(
    contents: Iterable[tuple[str, bytes]], is_complete: Callable[[FileRecord], bool]
) -> dict[int, ShardRecord]:
    records = {}
    for name, content in contents:
        with contextlib.suppress(*DECODE_ERRORS):
            record = msgspec.json.decode(content, type=ShardRecord)
            if name == Path(record_name(record.shard)).name and all(map(is_complete, record.files)):
                records[record.shard] = record
    return records


def _has_size(path: Path, size: int) -> bool:
    """Return whether a file has this size, with a single system call: a pool has hundreds of thousands of files."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # ValueError for invalid file names
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == size


def merge_counts(records: Mapping[int, ShardRecord], shards: int) -> dict[str, Any]:
    """Merge the counts of all shards: sum numbers, and join lists in the order of the shards.

    Raises:
        CorruptError: The counts of the records do not match.
    """
    total: dict[str, Any] = {}
    for shard in range(shards):
        for name, value in records[shard].counts.items():
            try:
                total[name] = total[name] + value if name in total else value
            except TypeError as error:
                raise CorruptError(
                    f"the record of shard {shard} in the ledger does not match the others (count {name!r}). Remove the record "
                    "and run the stage again."
                ) from error
    return total


def record_name(shard: int) -> str:
    """Return the path of a shard's record below ``work``."""
    return f"{LEDGER}/{shard:06d}.json"


_JOBS = 8  # small files to read at the same time
_MAX_RECORD_BYTES = 16 << 20


def send_shard(folder: Path, url: str, record: ShardRecord) -> None:
    """Upload the files of a shard, and then its record; to the Hub in a single commit.

    Raises:
        DownloadError: The URL cannot be reached.
    """
    paths = [*(file.path for file in record.files), f"{WORK_FOLDER}/{record_name(record.shard)}"]
    open_target(url).update({path: LocalFile(folder / path, "") for path in paths})


def read_ledger(url: str, stage: str) -> dict[int, ShardRecord]:
    """Return the records of all complete shards at a URL; ignore damaged records.

    Raises:
        CorruptError: A record names files outside the artifact.
        DownloadError: The URL cannot be reached.
    """
    place = open_remote(url)
    sizes = place.sizes("")
    names = sorted(path for path in sizes if path.startswith(f"{WORK_FOLDER}/{LEDGER}/"))
    with ThreadPoolExecutor(_JOBS, "ledger") as threads:
        contents = threads.map(lambda path: (Path(path).name, place.read(path, _MAX_RECORD_BYTES)), names)
        records = _complete_records(contents, lambda file: sizes.get(file.path) == file.bytes)
    for record in records.values():
        check_listing(f"{url}/{WORK_FOLDER}/{record_name(record.shard)}", stage, record.files)
    return records


def fetch_shard(folder: Path, url: str, record: ShardRecord) -> None:
    """Download the files of a shard, check them, and write its record locally.

    Raises:
        CorruptError: A file does not match the record.
        DownloadError: The URL cannot be reached.
    """
    place = open_remote(url)
    for wanted in record.files:
        part = folder / WORK_FOLDER / "fetched" / wanted.sha256
        part.parent.mkdir(parents=True, exist_ok=True)
        with locked_file(part, wait=True) as stream:
            fetch_file(place, wanted.path, wanted.bytes, wanted.sha256, stream, lambda _: None)
            (folder / wanted.path).parent.mkdir(parents=True, exist_ok=True)
            part.replace(folder / wanted.path)
    write_atomic(folder / WORK_FOLDER / record_name(record.shard), msgspec.json.encode(record))
