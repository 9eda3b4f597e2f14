"""Opening an artifact by its path or its URL; the rest of lsmix asks the artifact for the files that it lists."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from lsmix.data.artifact import (
    MANIFEST_NAME,
    Artifact,
    FileRecord,
    Manifest,
    check_sizes,
    read_manifest,
    root_digest,
)
from lsmix.data.atomic import sha256_file
from lsmix.data.errors import CorruptError, LsmixError, MissingError, RecipeError
from lsmix.data.table import (
    ARRAY_BYTES,
    GROUP_BYTES,
    METADATA_NAME,
    MOST_COLUMNS,
    ColumnStore,
    open_store,
    shard_bytes,
)
from lsmix.data.table_reader import ColumnReader

if TYPE_CHECKING:
    from lsmix.data.cache import FileCache

__all__ = [
    "CACHE_BYTES",
    "local_folder",
    "local_target",
    "open_artifact",
    "open_flow_artifact",
    "open_input",
    "open_remote_columns",
    "trim_location",
]

CACHE_BYTES: Final = 10 << 30  # of downloaded files, of all artifacts together
_PARTS = ("pool.zarr", "latents.zarr", "dataset.h5")  # of an artifact, by which users name it too
_FLOW_FILES = ("glow.json", "glow.safetensors")
_STAGES = {"flow": ("train-glow", "flow"), "dataset": ("ingest", "data set")}  # by role, and its name


def open_artifact(
    place: Path | str | Artifact, *, cache: Path | str | None = None, cache_bytes: int = CACHE_BYTES
) -> Artifact:
    """Open the artifact in a folder or at a URL.

    Of a URL only the manifest is downloaded at once. Other files follow when they are first asked for, are checked against
    their SHA-256, and stay in a cache that all processes share.

    Args:
        place: path or URL of the artifact, or of its "pool.zarr", "latents.zarr" or "dataset.h5".
        cache: the folder of that cache; None for LSMIX_CACHE, else "~/.cache/lsmix".
        cache_bytes: how much the cache may hold, of all artifacts together; what was used longest ago goes first.

    Raises:
        MissingError: there is no artifact, or it is unfinished.
        FormatError: it is of a version that this lsmix does not read.
        CorruptError: its manifest is damaged, or a file in its folder is missing or of another size.
        RecipeError: lsmix reads no URLs of this kind.
        DownloadError: the URL cannot be reached.
    """
    if isinstance(place, Artifact):
        return place
    folder = local_folder(place)
    if folder is None:
        from lsmix.data.cache import FileCache, cache_folder
        from lsmix.data.remote import fetch_manifest, open_remote

        remote = open_remote(trim_location(str(place)))
        manifest, _ = fetch_manifest(remote)
        files = FileCache(remote, Path(cache) if cache else cache_folder(), cache_bytes)
        return Artifact(manifest=manifest, url=remote.url, files=files)
    folder = folder.parent if folder.name in _PARTS else folder
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    return Artifact(manifest=manifest, folder=folder)


def open_flow_artifact(place: Path | str | Artifact) -> Artifact:
    """Open the artifact of a flow, or a folder in which ``save_flow`` wrote one without a manifest.

    Raises:
        MissingError: it is neither.
        LsmixError: as ``open_artifact``.
    """
    folder = None if isinstance(place, Artifact) else local_folder(place)
    if folder is None or not folder.is_dir() or (folder / MANIFEST_NAME).is_file():
        return open_artifact(place)
    config, weights = _FLOW_FILES
    if not (folder / config).is_file():
        raise MissingError(
            f"no flow at {str(folder)!r}: expected {config} in it. Name the folder that 'lsmix train-glow' made."
        )
    if not (folder / weights).is_file():
        raise MissingError(f"{str(folder / weights)!r} is missing beside {config}. Fetch both.")
    files = [
        FileRecord(path=name, bytes=(folder / name).stat().st_size, sha256=sha256_file(folder / name), payload=True)
        for name in _FLOW_FILES
    ]
    manifest = Manifest(
        stage="train-glow",
        stage_version=0,  # unknown
        name=folder.name,
        key="",
        root=root_digest(files),
        config={},
        inputs=[],
        files=files,
    )
    return Artifact(manifest=manifest, folder=folder)


def open_input(place: Path | str | Artifact, role: str) -> Artifact:
    """Open the artifact that a user named for a role, "flow" or "dataset".

    Raises:
        MissingError: there is none, or another stage made it.
        LsmixError: as ``open_artifact``.
    """
    artifact = open_flow_artifact(place) if role == "flow" else open_artifact(place)
    (stage, what), found = _STAGES[role], artifact.manifest.stage
    if found != stage:
        advice = "Check 'flow.path'." if role == "flow" else f"Name the one of {stage!r}."
        raise MissingError(f"{artifact.location!r} is no {what} but the result of stage {found!r}. {advice}")
    return artifact


def local_folder(place: Path | str) -> Path | None:
    """Return the local folder that a path or a ``file://`` URL names; None for other URLs.

    Raises:
        RecipeError: it is a URL that ``checked_url`` refuses.

    Example:
        >>> from lsmix.data.store import local_folder
        >>> local_folder("runs/mix"), local_folder("file:///tmp/pool"), local_folder("s3://bucket/pool")
        (PosixPath('runs/mix'), PosixPath('/tmp/pool'), None)
    """
    if isinstance(place, Path) or "://" not in place:
        return Path(place)
    from lsmix.data.web import file_path  # which loads urllib

    return file_path(place)


def local_target(place: Path | str, what: str) -> Path:
    """Return the local path that a result is to be written to.

    Raises:
        RecipeError: it is a URL; ``what`` begins the message, such as "an export".
    """
    folder = local_folder(place)
    if folder is None:
        raise RecipeError(
            f"{what} is written to this machine, not to the URL {place!r}. Name a path here; "
            "'lsmix push' sends artifacts on, and the place's own tools other files."
        )
    return folder


def trim_location(url: str) -> str:
    """Return a URL without the part of an artifact that it may end in, such as "pool.zarr"."""
    url = url if url.endswith("://") else url.rstrip("/")
    home, _, name = url.rpartition("/")
    return home if name in _PARTS else url


_JOBS = 4  # metadata files on their way at a time
_MOST_METADATA_BYTES = GROUP_BYTES + MOST_COLUMNS * ARRAY_BYTES


class _RemoteShards:
    """The shards of a column store at a URL."""

    def __init__(self, artifact: Artifact, files: "FileCache", name: str) -> None:
        self._artifact = artifact
        self._name = name
        sizes = [record.bytes for path, record in artifact.records.items() if path.startswith(f"{name}/")]
        self.most_open = files.most_open(max(sizes, default=1))

    def where(self, name: str) -> str:
        """Return what to call a shard in messages; the store itself for ""."""
        return self._artifact.where(f"{self._name}/{name}")

    def open(self, name: str) -> IO[bytes]:
        """Return a shard's file."""
        return self._artifact.open(f"{self._name}/{name}")

    def prefetch(self, names: Sequence[str]) -> None:
        """Download shards that will be opened next."""
        self._artifact.prefetch([f"{self._name}/{name}" for name in names])


def open_remote_columns(artifact: Artifact, name: str, *, check_crc: bool) -> ColumnReader:
    """Return the columns called ``name`` of an artifact at a URL.

    Raises:
        MissingError: the artifact has no such columns.
        FormatError: they are of a format that this version does not read.
        CorruptError: their metadata is damaged, or does not fit the manifest.
        DownloadError: the URL cannot be reached.
    """
    from lsmix.data.cache import FileCache

    files = artifact.files
    if not isinstance(files, FileCache):
        raise TypeError("only artifacts that open_artifact opened at a URL have their columns there")
    for path, record in artifact.records.items():
        if path.startswith(f"{name}/"):
            files.check_limit(record)
    store, attributes = _open_metadata(artifact, name)
    for column in store.columns:
        for shard in range(store.shards):
            where = f"{name}/{column.shard_name(shard)}"
            own = artifact.records.get(where)
            # Before anything is allocated: metadata may claim any number of rows, but only listed files can back them.
            if own is None:
                raise CorruptError(
                    f"{artifact.where(where)!r} is not in the manifest. Ask its owner to send the artifact again."
                )
            least = shard_bytes(
                len(store.shard_range(shard)),
                row_bytes=column.row_bytes,
                chunk_rows=column.chunk_rows,
                shard_rows=store.shard_rows,
            )
            if own.bytes < least:
                raise CorruptError(
                    f"{artifact.where(where)!r} is damaged: expected {least} bytes or more, the manifest lists {own.bytes}."
                )
    return ColumnReader(store, attributes, check_crc=check_crc, files=_RemoteShards(artifact, files, name))


def _open_metadata(artifact: Artifact, name: str) -> tuple[ColumnStore, dict[str, Any]]:
    where = artifact.where(name)
    paths = [path for path in artifact.records if path.startswith(f"{name}/") and path.endswith(f"/{METADATA_NAME}")]
    if f"{name}/{METADATA_NAME}" not in paths:
        raise MissingError(f"no columns at {where!r}: {METADATA_NAME} is not listed.")
    if (size := sum(artifact.records[path].bytes for path in paths)) > _MOST_METADATA_BYTES:
        raise CorruptError(
            f"the metadata at {where!r} has {size} bytes, and lsmix reads at most {_MOST_METADATA_BYTES}. Do not use it."
        )
    from concurrent.futures import ThreadPoolExecutor  # which readers of local files need not load

    with tempfile.TemporaryDirectory(prefix="lsmix-") as folder:
        with ThreadPoolExecutor(_JOBS, thread_name_prefix="lsmix-fetch") as pool:
            for path, stream in zip(paths, pool.map(artifact.open, paths), strict=True):
                target = Path(folder, path)
                target.parent.mkdir(parents=True, exist_ok=True)
                with stream:
                    target.write_bytes(stream.read())
        try:
            store, attributes = open_store(Path(folder, name))
        except LsmixError as error:  # which names the copy
            raise type(error)(str(error).replace(f"{folder}/{name}", where)) from error
    return replace(store, folder=Path(where)), attributes
