"""The descriptions of an artifact, such as README.md, which owners may edit after the manifest was written."""

from collections.abc import Container
from pathlib import Path

from lsmix.data.artifact import DESCRIPTION_FILES, FileRecord, Manifest, is_description, is_expected_path
from lsmix.data.atomic import sha256_file

__all__ = ["description_records", "edited_descriptions"]


def description_records(folder: Path, stage: str, payload: Container[str] = ()) -> list[FileRecord]:
    """List the descriptions in the folder of an artifact as they are now; ``payload`` are paths that are none."""
    return [
        FileRecord(path=path, bytes=(folder / path).stat().st_size, sha256=sha256_file(folder / path), payload=False)
        for path in DESCRIPTION_FILES
        if path not in payload
        and is_expected_path(stage, path)
        and (folder / path).is_file()
        and not (folder / path).is_symlink()
    ]


def edited_descriptions(folder: Path, manifest: Manifest) -> list[str]:
    """Return the paths of descriptions that were changed, removed or added since the manifest was written."""
    listed = {file.path: file.sha256 for file in manifest.files if is_description(file)}
    payload = {file.path for file in manifest.files if file.payload}
    found = {file.path: file.sha256 for file in description_records(folder, manifest.stage, payload)}
    return sorted(path for path in listed.keys() | found.keys() if listed.get(path) != found.get(path))
