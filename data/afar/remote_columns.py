"""Opening the columns of an artifact that lies afar: metadata at once, each shard when it is first touched.

The one rule: columns read a shard from afar as they read a local one, through a map of a whole file, which came into the
cache and fits its SHA-256 in the manifest.
"""

import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from lsmix.data.afar.fetch import patiently
from lsmix.data.afar.file_cache import FileCache, cache_folder
from lsmix.data.afar.remote import Place, fetch_manifest, open_place
from lsmix.data.column_reader import ColumnReader
from lsmix.data.columns import ARRAY_BYTES, GROUP_BYTES, METADATA_NAME, MOST_COLUMNS, ColumnStore, open_store
from lsmix.data.errors import CorruptError, LsmixError, MissingError
from lsmix.data.manifest import FileRecord, Manifest
from lsmix.data.shard import shard_bytes

__all__ = ["open_remote_columns"]

_JOBS = 4  # shards on their way at a time
_MOST_METADATA_BYTES = GROUP_BYTES + MOST_COLUMNS * ARRAY_BYTES
_MOST_OPEN = 128


class _RemoteShards:
    """The shards of a store afar, as files in the cache."""

    def __init__(self, place: Place, cache: FileCache, name: str, records: dict[str, FileRecord]) -> None:
        self._place = place
        self._url = f"{place.url}/{name}"
        self._cache = cache
        self._records = records
        largest = max((record.bytes for record in records.values()), default=1)
        # What is mapped stays on the disk although it went from the cache: so only half of the limit may be mapped.
        self.most_open = max(1, min(_MOST_OPEN, cache.limit_bytes // 2 // max(largest, 1)))

    def where(self, name: str) -> str:
        """Return what to call a shard in messages; the store itself for ""."""
        return f"{self._url}/{name}"

    def open(self, name: str) -> IO[bytes]:
        """Return a shard's file, fetched if need be."""
        return self._cache.open(self._place, self._records[name])

    def prefetch(self, names: Sequence[str]) -> None:
        """Fetch those of the shards that are not in the cache, several at a time, as far as half of it holds them."""
        missing = []
        room = self._cache.limit_bytes // 2
        for name in names:
            if not self._cache.has(self._records[name]) and self._records[name].bytes <= room:
                room -= self._records[name].bytes
                missing.append(name)
        if len(missing) > 1:
            with ThreadPoolExecutor(_JOBS, thread_name_prefix="lsmix-fetch") as pool:
                for stream in pool.map(self.open, missing):
                    stream.close()


def open_remote_columns(
    url: str, name: str, *, check_crc: bool, cache: Path | str | None, cache_bytes: int
) -> tuple[Manifest, ColumnReader]:
    """Return the manifest and the columns called ``name`` of the artifact at ``url``.

    Args:
        url: the artifact's folder at a place.
        name: of the Zarr group in it.
        check_crc: whether to compare each chunk's checksum when it is first touched.
        cache: folder that shards are kept in; None for ``cache_folder()``.
        cache_bytes: how much may be kept there, of all artifacts together.

    Raises:
        MissingError: there is no artifact, no such columns in it, or it is not finished.
        FormatError: the artifact or the columns are of a format that this version does not read.
        CorruptError: its manifest or metadata is damaged, or they do not fit together.
        DownloadError: the place cannot be reached.
    """
    place = open_place(url)
    manifest, _ = patiently(repr(place.url), lambda: fetch_manifest(place))
    kept = FileCache(Path(cache) if cache else cache_folder(), cache_bytes)
    records = {
        record.path.removeprefix(f"{name}/"): record for record in manifest.files if record.path.startswith(f"{name}/")
    }
    for record in records.values():
        kept.check(place, record)
    store, attributes = _open_metadata(place, kept, name, records)
    for column in store.columns:
        for shard in range(store.shards):
            _check_record(place, store, shard, column.name, records.get(column.shard_name(shard)))
    return manifest, ColumnReader(
        store, attributes, check_crc=check_crc, files=_RemoteShards(place, kept, name, records)
    )


def _open_metadata(
    place: Place, cache: FileCache, name: str, records: dict[str, FileRecord]
) -> tuple[ColumnStore, dict[str, Any]]:
    if METADATA_NAME not in records:
        raise MissingError(f"no columns {name!r} in the artifact at {place.url!r}: {METADATA_NAME} is not listed.")
    metadata = {path: record for path, record in records.items() if path.rpartition("/")[2] == METADATA_NAME}
    if (size := sum(record.bytes for record in metadata.values())) > _MOST_METADATA_BYTES:
        raise CorruptError(
            f"the metadata at {place.url!r} has {size} bytes, and lsmix reads at most {_MOST_METADATA_BYTES}. Do not use it."
        )
    with tempfile.TemporaryDirectory(prefix="lsmix-") as folder:
        with ThreadPoolExecutor(_JOBS, thread_name_prefix="lsmix-fetch") as pool:
            contents = pool.map(lambda record: _content(cache, place, record), metadata.values())
            for path, content in zip(metadata, contents, strict=True):
                target = Path(folder, path)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
        try:
            store, attributes = open_store(Path(folder))
        except LsmixError as error:  # which speaks of the copy
            raise type(error)(str(error).replace(folder, f"{place.url}/{name}")) from error
    return replace(store, folder=Path(f"{place.url}/{name}")), attributes


def _content(cache: FileCache, place: Place, record: FileRecord) -> bytes:
    with cache.open(place, record) as stream:
        return stream.read()


def _check_record(place: Place, store: ColumnStore, shard: int, column: str, record: FileRecord | None) -> None:
    # Before anything is allocated: metadata may claim any number of rows, but only listed files can back them.
    (own,) = (each for each in store.columns if each.name == column)
    where = f"{place.url}/{store.folder.name}/{own.shard_name(shard)}"
    if record is None:
        raise CorruptError(f"{where!r} is not in the manifest. Ask its owner to send the artifact again.")
    least = shard_bytes(
        len(store.shard_range(shard)), row_bytes=own.row_bytes, chunk_rows=own.chunk_rows, shard_rows=store.shard_rows
    )
    if record.bytes < least:
        raise CorruptError(f"{where!r} is damaged: expected {least} bytes or more, the manifest lists {record.bytes}.")
