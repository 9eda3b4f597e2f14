"""Finished artifacts that a run is given, rather than makes: a flow or a data set from elsewhere.

They count by the contents of their payload; a flow that was only saved, without a manifest, by its two files.
"""

from pathlib import Path

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
from lsmix.data.errors import MissingError

__all__ = ["finished_artifact", "outside_artifact"]

_FLOW_FILES = ("glow.json", "glow.safetensors")
_STAGES = {"flow": ("train-glow", "flow"), "dataset": ("ingest", "data set")}  # what a role takes, and its name


def finished_artifact(folder: Path) -> Artifact:
    """Return what is finished in a folder: an artifact, or a flow that was saved without a manifest.

    Raises:
        MissingError: neither is there.
        FormatError, CorruptError: as ``read_manifest``.
    """
    if not (folder / MANIFEST_NAME).is_file() and all((folder / name).is_file() for name in _FLOW_FILES):
        return _saved_flow(folder)
    return Artifact(folder=folder, manifest=read_manifest(folder))


def outside_artifact(folder: Path, role: str) -> Artifact:
    """Return a finished artifact for a role, "flow" or "dataset", with the sizes of its files checked.

    Raises:
        MissingError: there is none, or it is another stage's.
        FormatError, CorruptError: it is of an unknown version, or damaged.
    """
    artifact = finished_artifact(folder)
    stage, what = _STAGES[role]
    if artifact.manifest.stage != stage:
        raise MissingError(
            f"{str(folder)!r} is no {what} but the result of stage {artifact.manifest.stage!r}. Check 'flow.path'."
            if role == "flow"
            else f"{str(folder)!r} is no {what} but the result of stage {artifact.manifest.stage!r}. Name the one of {stage!r}."
        )
    check_sizes(folder, artifact.manifest)
    return artifact


def _saved_flow(folder: Path) -> Artifact:
    files = [
        FileRecord(path=name, bytes=(folder / name).stat().st_size, sha256=sha256_file(folder / name), payload=True)
        for name in _FLOW_FILES
    ]
    manifest = Manifest(
        stage="train-glow",
        stage_version=0,  # nobody knows
        name=folder.name,
        key="",
        root=root_digest(files),
        config={},
        inputs=[],
        files=files,
    )
    return Artifact(folder=folder, manifest=manifest)
