"""Descriptions such as README.md, which owners of an artifact may edit, and stray files of file managers."""

from collections.abc import Container
from pathlib import Path

from lsmix.data.artifact import (
    DESCRIPTION_FILES,
    STRAY_NAMES,
    FileRecord,
    Manifest,
    is_description,
    is_expected_path,
    record_file,
)
from lsmix.data.atomic import sha256_file

__all__ = ["description_records", "edited_descriptions", "stray_files"]


def description_records(
    folder: Path, stage: str, payload: Container[str] = (), listed: Container[tuple[str, str]] = ()
) -> list[FileRecord]:
    """Return records of the current descriptions in the folder of an artifact.

    Args:
        folder: Folder of the artifact.
        stage: Stage of the artifact.
        payload: Paths that are payload and therefore not descriptions.
        listed: (path, checksum) of files to which links are followed; other links may lead to files not to be shared.
    """
    records = []
    for name in DESCRIPTION_FILES:
        path = folder / name
        if name not in payload and is_expected_path(stage, name) and path.is_file():
            digest = sha256_file(path)
            if not path.is_symlink() or (name, digest) in listed:
                records.append(record_file(folder, name, payload=False, sha256=digest))
    return records


def edited_descriptions(folder: Path, manifest: Manifest) -> list[str]:
    """Return the paths of the descriptions that were changed, removed or added after the manifest was written."""
    listed = {(file.path, file.sha256) for file in manifest.files if is_description(file)}
    payload = {file.path for file in manifest.files if file.payload}
    found = {(file.path, file.sha256) for file in description_records(folder, manifest.stage, payload, listed)}
    return sorted({path for path, _ in listed ^ found})


def stray_files(folder: Path) -> list[str]:
    """Return the paths of files that file managers and hubs have added to the folder of an artifact."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.name in STRAY_NAMES)
    return sorted(path.as_posix() for path in found if STRAY_NAMES.isdisjoint(path.parent.parts))
