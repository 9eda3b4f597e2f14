"""Opening the columns of a finished artifact.

The one rule: the manifest is asked first, and only files that it lists, in the size that it lists, are read.
"""

from pathlib import Path

from lsmix.data.column_reader import ColumnReader, open_columns
from lsmix.data.columns import METADATA_NAME
from lsmix.data.errors import CorruptError
from lsmix.data.manifest import MANIFEST_NAME, Manifest, check_sizes, read_manifest

__all__ = ["open_artifact_columns"]


def open_artifact_columns(folder: Path, name: str, *, check_crc: bool = True) -> tuple[Manifest, ColumnReader]:
    """Return the manifest and the columns called ``name`` of the artifact in ``folder``.

    Raises:
        MissingError: there is no artifact, no such columns in it, or it is not finished.
        FormatError: the artifact or the columns are of a format that this version does not read.
        CorruptError: a file is missing, altered in size, damaged, or not in the manifest.
    """
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    columns = open_columns(folder / name, check_crc=check_crc)
    listed = {file.path for file in manifest.files}
    metadata = [METADATA_NAME, *(f"{column}/{METADATA_NAME}" for column in columns)]
    for path in (*metadata, *columns.shard_names()):
        if f"{name}/{path}" not in listed:
            raise CorruptError(
                f"{str(folder / name / path)!r} is not listed in {MANIFEST_NAME}: it was put there later. "
                "Fetch or make the artifact again."
            )
    return manifest, columns
