"""Tables with labels of image files: CSV, TSV or JSON lines with a column of file names and a column of labels."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from posixpath import normpath
from typing import Any

import msgspec

from lsmix.data.errors import SourceError
from lsmix.data.readers.images.splits import SPLIT_ROLES, Labelled
from lsmix.data.readers.source_images import ImageConfig, SourceReport
from lsmix.data.readers.trees import FileTree

__all__ = ["METADATA_NAMES", "TABLE_ENDINGS", "read_table", "suggested_fields"]

METADATA_NAMES = ("metadata.csv", "metadata.jsonl")  # of Hugging Face's imagefolder
TABLE_ENDINGS = (".csv", ".tsv", ".jsonl")
_MAX_TABLE_BYTES = 256 << 20
_SPLIT_COLUMN = "split"


def read_table(
    tree: FileTree, table: str, images: Sequence[str], config: ImageConfig, *, required: bool, report: SourceReport
) -> list[Labelled] | None:
    """Return the images that a table lists, in its order.

    File names are relative to the table's folder or to the root. A name without folders, with or without its extension,
    may also refer to an image in any folder if the name is unique. Rows whose image is missing are kept, so that the
    image is later reported as unreadable.

    Args:
        tree: The files.
        table: Name of the table.
        images: Names of all images.
        config: Names of the columns.
        required: Whether missing columns are an error; otherwise None is returned.
        report: Receives the rows without a label.

    Raises:
        SourceError: The table cannot be parsed, or a column is missing.
    """
    columns, rows = _parse(tree, table)
    missing = [name for name in (config.file_column, config.label_column) if name not in columns]
    if missing and not required:
        return None
    if missing:
        raise SourceError(
            f"{tree.label(table)} has no column {missing[0]!r}; it has {columns[:20]}. Set data.file_column and "
            "data.label_column."
        )
    find = _Finder(PurePosixPath(table).parent.as_posix(), images)
    labelled = []
    for row in rows:
        name, label = (_text(row.get(column)) for column in (config.file_column, config.label_column))
        if not label:
            report.leave_out("without a label", name)
            continue
        split = _text(row.get(_SPLIT_COLUMN))
        labelled.append(Labelled(find(name), label, SPLIT_ROLES.get(split.lower(), split)))
    return labelled


def suggested_fields(tree: FileTree, table: str, images: Sequence[str]) -> dict[str, str]:
    """Return the recipe settings that select a table and its columns if it lists images; {} otherwise."""
    try:
        columns, rows = _parse(tree, table)
    except SourceError:
        return {}
    find, known = _Finder(PurePosixPath(table).parent.as_posix(), images), set(images)
    file = next((name for name in columns if rows and find(_text(rows[0].get(name))) in known), None)
    if file is None:
        return {}
    others = [name for name in columns if name != file]
    usual = [name for name in others if name.lower() in ("label", "class", "category", "target")]
    label = {"label_column": (usual or others)[0]} if usual or len(others) == 1 else {}
    return {"labels_file": table, "file_column": file, **label}


class _Finder:
    """Finds images by their file names in a table."""

    def __init__(self, folder: str, images: Sequence[str]) -> None:
        self._folder = folder
        self._known = set(images)
        self._short: dict[str, list[str]] = {}
        for image in images:
            path = PurePosixPath(image)
            for short in {path.name, path.stem}:
                self._short.setdefault(short, []).append(image)

    def __call__(self, name: str) -> str:
        """Return the name in the tree; for a missing image, the expected name."""
        here = normpath(f"{self._folder}/{name}")
        for candidate in (here, normpath(name)):
            if candidate in self._known:
                return candidate
        matches = self._short.get(name, [])
        return matches[0] if len(matches) == 1 else here


def _parse(tree: FileTree, table: str) -> tuple[list[str], list[Mapping[str, Any]]]:
    try:
        text = tree.read(table, _MAX_TABLE_BYTES).decode("utf-8-sig")
        if table.lower().endswith(".jsonl"):
            lines = [msgspec.json.decode(line, type=dict[str, Any]) for line in text.splitlines() if line.strip()]
            return list(dict.fromkeys(name for line in lines for name in line)), list(lines)
        head = text.partition("\n")[0]
        separator = ";" if ";" in head and "," not in head else ","  # spreadsheets write ";" in some languages
        reader = csv.DictReader(io.StringIO(text), delimiter="\t" if table.lower().endswith(".tsv") else separator)
        rows: list[Mapping[str, Any]] = list(reader)
        return list(reader.fieldnames or []), rows
    except (ValueError, csv.Error, msgspec.DecodeError, RecursionError) as error:
        raise SourceError(f"{tree.label(table)} is not a valid table of labels ({error}). Correct it.") from error


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else str(value) if isinstance(value, int | float) else ""
