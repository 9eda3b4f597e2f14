"""Opening an artifact by its path or its URL; the rest of lsmix asks the artifact for the files that it lists."""

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

CACHE_BYTES: Final = 10 << 30  # of downloaded files, of all artifacts together
NATURAL_32: Final = "natural-32"  # the flow that comes with lsmix
_FLOWS = Path(__file__).parent / "flows"  # a folder for each such flow
_PARTS = ("pool.zarr", "latents.zarr", "dataset.h5")  # of an artifact, by which users name it too
_FLOW_FILES = ("glow.json", "glow.safetensors")
_MOST_JSON_BYTES = 1 << 20
_STAGES = {"flow": ("train-glow", "flow"), "dataset": ("ingest", "data set")}  # by role, and its name


class _FlowFile(msgspec.Struct):
    config: dict[str, Any] = {}


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
    """Open the artifact of a flow, a folder in which ``save_flow`` wrote one without a manifest, or NATURAL_32.

    Raises:
        MissingError: it is neither.
        LsmixError: as ``open_artifact``.
    """
    if place == NATURAL_32:
        place = _FLOWS / NATURAL_32
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
    files = [record_file(folder, name, payload=True) for name in _FLOW_FILES]
    described = _FlowFile()
    with contextlib.suppress(*DECODE_ERRORS):  # loading the flow raises them
        if files[0].bytes <= _MOST_JSON_BYTES:
            described = msgspec.json.decode((folder / config).read_bytes(), type=_FlowFile)
    manifest = Manifest(
        stage="train-glow",
        stage_version=0,  # unknown
        name=folder.name,
        cache_key="",
        content_digest=content_digest(files),
        config=described.config,
        inputs=[],
        files=files,
    )
    return Artifact(manifest=manifest, folder=folder)


def shipped_flow(digest: str | None) -> Artifact | None:
    """Return the flow that comes with lsmix if it has this content digest, else None."""
    artifact = open_flow_artifact(NATURAL_32) if digest else None
    return artifact if artifact and artifact.manifest.content_digest == digest else None


def open_input(place: Path | str | Artifact, role: str) -> Artifact:
    """Open the artifact that a user named for a role, "flow" or "dataset".

    Raises:
        MissingError: there is none, or another stage made it.
        LsmixError: as ``open_artifact``.
    """
    artifact = open_flow_artifact(place) if role == "flow" else open_artifact(place)
    (stage, what), found = _STAGES[role], artifact.manifest.stage
    if found != stage:
        raise MissingError(
            f"{artifact.location!r} is no {what} but the result of stage {found!r}. Name the one of {stage!r}."
        )
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
