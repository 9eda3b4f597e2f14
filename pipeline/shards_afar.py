"""Shards of an artifact that lies at a URL: sent there as they are made, with their records, so that any machine goes on.

The one rule: a record is sent after its shard's files; whoever fetches a shard checks it against its record.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import msgspec

from lsmix.data.afar.fetch import fetch_file, locked_file, patiently
from lsmix.data.afar.remote import Place, open_place
from lsmix.data.columns import METADATA_NAME
from lsmix.data.durable import write_durably
from lsmix.data.manifest import WORK_FOLDER, FileRecord, check_listing
from lsmix.data.versioned import UNDECODABLE
from lsmix.pipeline.shards import LEDGER, ShardRecord, record_name

__all__ = ["fetch_shard", "fetch_work", "read_ledger", "send_shard", "send_work"]

_JOBS = 8  # small files on their way at a time
_MOST_RECORD_BYTES = 16 << 20


def send_work(folder: Path, url: str, spec: str) -> None:
    """Send what workers on other machines need to begin: the store's metadata, and the file that says what to do."""
    place = open_place(url)
    paths = [path.relative_to(folder).as_posix() for path in folder.rglob(METADATA_NAME)]
    for path in [*paths, f"{WORK_FOLDER}/{spec}"]:
        _send(place, folder, path)


def fetch_work(folder: Path, url: str, spec: str) -> None:
    """Fetch what ``send_work`` sent, as far as it is not here."""
    place = open_place(url)
    sizes = patiently(repr(url), lambda: place.sizes(""))
    paths = [path for path in sizes if path.rpartition("/")[2] == METADATA_NAME]
    check_listing(url, [FileRecord(path=path, bytes=sizes[path], sha256="0" * 64, payload=True) for path in paths])
    for path in [*paths, f"{WORK_FOLDER}/{spec}"]:
        content = patiently(repr(url), partial(place.read, path, _MOST_RECORD_BYTES))
        if not (folder / path).is_file() or (folder / path).read_bytes() != content:
            write_durably(folder / path, content)


def send_shard(folder: Path, url: str, record: ShardRecord) -> None:
    """Send the files of a shard, and then its record.

    Raises:
        DownloadError: the URL cannot be reached.
    """
    place = open_place(url)
    for path in record.digests:
        _send(place, folder, path)
    _send(place, folder, f"{WORK_FOLDER}/{record_name(record.shard)}")


def read_ledger(url: str) -> dict[int, ShardRecord]:
    """Return the records of all shards at a URL whose files are there in full; damaged ones count as unfinished.

    Raises:
        CorruptError: a record names files outside of the artifact.
        DownloadError: the URL cannot be reached.
    """
    place = open_place(url)
    sizes = patiently(repr(url), lambda: place.sizes(""))
    names = [path for path in sizes if path.startswith(f"{WORK_FOLDER}/{LEDGER}/")]
    with ThreadPoolExecutor(_JOBS, "ledger") as threads:
        contents = threads.map(
            lambda path: patiently(repr(url), partial(place.read, path, _MOST_RECORD_BYTES)), sorted(names)
        )
        records = {}
        for content in contents:
            try:
                record = msgspec.json.decode(content, type=ShardRecord)
            except UNDECODABLE:
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
    place = open_place(url)
    for wanted in _files(record):
        part = folder / WORK_FOLDER / "fetched" / wanted.sha256
        part.parent.mkdir(parents=True, exist_ok=True)
        with locked_file(part, wait=True) as stream:
            fetch_file(place, wanted, stream, lambda _: None)
            (folder / wanted.path).parent.mkdir(parents=True, exist_ok=True)
            part.replace(folder / wanted.path)
    write_durably(folder / WORK_FOLDER / record_name(record.shard), msgspec.json.encode(record))


def _send(place: Place, folder: Path, path: str) -> None:
    patiently(f"'{place.url}/{path}'", lambda: place.write(path, folder / path))
