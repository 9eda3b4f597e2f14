"""Which files an artifact of each stage, and an export in each format, can hold.

Code in an artifact would run as soon as somebody started Python in its folder, so nothing but these files is accepted.
"""

import re
from typing import Final

__all__ = ["ARTIFACT_FILES", "EXPORT_FILES", "is_expected_export_path", "is_expected_path"]


def _columns(store: str) -> str:
    """Return the pattern of the files of a Zarr group whose arrays are sharded along their first axis."""
    return rf"{re.escape(store)}/([a-z][a-z0-9_]*/)?zarr\.json|{re.escape(store)}/[a-z][a-z0-9_]*/c/[0-9]+(/0)*"


_CARD = r"README\.md|card\.(png|json)|samples\.csv|croissant\.json|LICENSES/(images|lsmix)\.txt"

# By stage: a regular expression that a whole path must match.
ARTIFACT_FILES: Final = {
    "ingest": r"dataset\.h5",
    "train-glow": r"glow\.(json|safetensors)|log\.jsonl|samples\.png",
    "encode": _columns("latents.zarr"),
    "mix": rf"{_columns('pool.zarr')}|plan\.json|{_CARD}",
    "train": r"metrics\.json|classifier\.safetensors",
    "naturalness": r"naturalness\.json|sheet\.png",
    "report": r"report\.(html|md)|figures/[A-Za-z0-9][A-Za-z0-9._-]*\.(svg|png)",
}

# By format, besides README.md, SHA256SUMS and the record.
EXPORT_FILES: Final = {
    "hdf5": r"pool-[0-9]+\.h5",
    "parquet": r"pool-[0-9]+\.parquet",
    "webdataset": r"pool-[0-9]+\.tar",
    "npz": r"pool-[0-9]+\.npz",
    "folder": r"metadata\.jsonl|images/[0-9]+(-[A-Za-z0-9_-]+)?/[0-9]+/[0-9]+\.(png|webp)",
}


def is_expected_path(stage: str, path: str) -> bool:
    """Tell whether an artifact of a stage can hold a file at a path, relative to its folder.

    Example:
        >>> from lsmix.data.artifact_files import is_expected_path
        >>> is_expected_path("mix", "pool.zarr/image/c/0/0/0/0"), is_expected_path("mix", "lsmix.py")
        (True, False)
    """
    return stage in ARTIFACT_FILES and re.fullmatch(ARTIFACT_FILES[stage], path) is not None


def is_expected_export_path(form: str, path: str) -> bool:
    """Tell whether ``SHA256SUMS`` of an export in a format can list a file at a path."""
    return path == "README.md" or (form in EXPORT_FILES and re.fullmatch(EXPORT_FILES[form], path) is not None)
