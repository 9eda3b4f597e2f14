"""Files beside an artifact's data: descriptions such as README.md, which owners may edit, and what file managers add."""

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
    """List the descriptions in the folder of an artifact as they are now.

    Args:
        folder: of the artifact.
        stage: of the artifact.
        payload: paths that are no descriptions.
        listed: paths and checksums for which links are followed; another link may lead to a file that is not to be shared.
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
    """Return the paths of descriptions that were changed, removed or added since the manifest was written."""
    listed = {(file.path, file.sha256) for file in manifest.files if is_description(file)}
    payload = {file.path for file in manifest.files if file.payload}
    found = {(file.path, file.sha256) for file in description_records(folder, manifest.stage, payload, listed)}
    return sorted({path for path, _ in listed ^ found})


def stray_files(folder: Path) -> list[str]:
    """Return the paths of what file managers and hubs put into the folder of an artifact."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.name in STRAY_NAMES)
    return sorted(path.as_posix() for path in found if STRAY_NAMES.isdisjoint(path.parent.parts))
