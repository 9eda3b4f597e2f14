"""Functions that open artifacts by path or URL. Everything else in lsmix reads files through the opened artifact."""

import contextlib
from pathlib import Path
from typing import Any, Final

import msgspec

from lsmix.data.artifact import (
    MANIFEST_NAME,
    Artifact,
    Manifest,
    check_sizes,
    content_digest,
    read_manifest,
    record_file,
)
from lsmix.data.atomic import DECODE_ERRORS
from lsmix.data.errors import MissingError, RecipeError

__all__ = [
    "CACHE_BYTES",
    "NATURAL_32",
    "local_folder",
    "local_target",
    "open_artifact",
    "open_flow_artifact",
    "open_input",
    "shipped_flow",
    "trim_location",
]

CACHE_BYTES: Final = 10 << 30  # default limit of the cache, for the files of all artifacts
NATURAL_32: Final = "natural-32"  # the flow that comes with lsmix
_FLOWS = Path(__file__).parent / "flows"  # one folder per flow that comes with lsmix
_PARTS = ("pool.zarr", "latents.zarr", "dataset.h5")  # users may also name an artifact by one of these parts
_FLOW_FILES = ("glow.json", "glow.safetensors")
_MOST_JSON_BYTES = 1 << 20
_STAGES = {"flow": ("train-glow", "flow"), "dataset": ("ingest", "data set")}  # role -> stage, name in messages


class _FlowFile(msgspec.Struct):
    config: dict[str, Any] = {}


def open_artifact(
    place: Path | str | Artifact, *, cache: Path | str | None = None, cache_bytes: int = CACHE_BYTES
) -> Artifact:
    """Open the artifact in a folder or at a URL.

    From a URL only the manifest is downloaded immediately. Other files are downloaded on first use, verified against their
    SHA-256, and kept in a cache that all processes share.

    Args:
        place: Path or URL of the artifact, or of its "pool.zarr", "latents.zarr" or "dataset.h5".
        cache: Folder of the cache; None for LSMIX_CACHE, else "~/.cache/lsmix".
        cache_bytes: Limit of the cache for the files of all artifacts; the least recently used files are evicted first.

    Raises:
        MissingError: There is no artifact, or it is unfinished.
        FormatError: This version of lsmix does not support the artifact's version.
        CorruptError: The manifest is damaged, or a file in the folder is missing or has another size.
        RecipeError: lsmix does not support URLs of this kind.
        DownloadError: The URL cannot be reached.
    """
    if isinstance(place, Artifact):
        return place
    folder = local_folder(place)
    if folder is None:
        from lsmix.data.cache import RemoteArtifact, cache_folder, fetch_manifest
        from lsmix.data.remote import open_remote

        remote = open_remote(trim_location(str(place)))
        manifest, _ = fetch_manifest(remote)
        return RemoteArtifact(manifest, remote, Path(cache) if cache else cache_folder(), cache_bytes)
    folder = folder.parent if folder.name in _PARTS else folder
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    return Artifact(manifest=manifest, folder=folder)


def open_flow_artifact(place: Path | str | Artifact) -> Artifact:
    """Open the artifact of a flow, a folder that ``save_flow`` wrote without a manifest, or NATURAL_32.

    Raises:
        MissingError: There is no flow.
        LsmixError: As for ``open_artifact``.
    """
    if place == NATURAL_32:
        place = _FLOWS / NATURAL_32
    folder = None if isinstance(place, Artifact) else local_folder(place)
    if folder is None or not folder.is_dir() or (folder / MANIFEST_NAME).is_file():
        return open_artifact(place)
    config, weights = _FLOW_FILES
    if not (folder / config).is_file():
        raise MissingError(
            f"no flow at {str(folder)!r}: {config} is missing. Name a folder written by 'lsmix train-glow'."
        )
    if not (folder / weights).is_file():
        raise MissingError(f"{str(folder / weights)!r} is missing; a flow needs it and {config}. Download both.")
    files = [record_file(folder, name, payload=True) for name in _FLOW_FILES]
    flow = _FlowFile()
    with contextlib.suppress(*DECODE_ERRORS):  # raised later, when the flow is loaded
        if files[0].bytes <= _MOST_JSON_BYTES:
            flow = msgspec.json.decode((folder / config).read_bytes(), type=_FlowFile)
    manifest = Manifest(
        stage="train-glow",
        stage_version=0,  # unknown
        name=folder.name,
        cache_key="",
        content_digest=content_digest(files),
        config=flow.config,
        inputs=[],
        files=files,
    )
    return Artifact(manifest=manifest, folder=folder)


def shipped_flow(digest: str | None) -> Artifact | None:
    """Return the flow that comes with lsmix if ``digest`` is its content digest, else None."""
    artifact = open_flow_artifact(NATURAL_32) if digest else None
    return artifact if artifact and artifact.manifest.content_digest == digest else None


def open_input(place: Path | str | Artifact, role: str) -> Artifact:
    """Open the artifact that a user named for a role, "flow" or "dataset".

    Raises:
        MissingError: There is no artifact, or it belongs to another stage.
        LsmixError: As for ``open_artifact``.
    """
    artifact = open_flow_artifact(place) if role == "flow" else open_artifact(place)
    (stage, what), found = _STAGES[role], artifact.manifest.stage
    if found != stage:
        raise MissingError(
            f"{artifact.location!r} is not a {what}: it is an artifact of the stage {found!r}. Name one of {stage!r}."
        )
    return artifact


def local_folder(place: Path | str) -> Path | None:
    """Return the local folder that a path or a ``file://`` URL names; None for other URLs.

    Raises:
        RecipeError: The URL is not supported or not valid, see ``checked_url``.

    Example:
        >>> from lsmix.data.store import local_folder
        >>> local_folder("runs/mix"), local_folder("file:///tmp/pool"), local_folder("s3://bucket/pool")
        (PosixPath('runs/mix'), PosixPath('/tmp/pool'), None)
    """
    if isinstance(place, Path) or "://" not in place:
        return Path(place)
    from lsmix.data.web import file_path  # here because it loads urllib

    return file_path(place)


def local_target(place: Path | str, what: str) -> Path:
    """Return the local path to which a result will be written.

    Raises:
        RecipeError: It is a URL; ``what`` begins the message, such as "an export".
    """
    folder = local_folder(place)
    if folder is None:
        raise RecipeError(
            f"{what} cannot be written to the URL {place!r}. Name a local path. Upload artifacts with 'lsmix push', and "
            "other files with the tools of the service."
        )
    return folder


def trim_location(url: str) -> str:
    """Return the URL of an artifact, given its URL or the URL of one of its parts, such as "pool.zarr"."""
    url = url if url.endswith("://") else url.rstrip("/")
    home, _, name = url.rpartition("/")
    return home if name in _PARTS else url
