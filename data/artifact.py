"""Artifacts: the manifest, with what one is, what it was made from and a checksum of every file, and access to its files.

``manifest.json`` is written last, so its presence means that the artifact is complete; a folder without
one is unfinished work and is never read.
"""

import hashlib
import os
import re
import stat
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Annotated, Any, Final

import msgspec

from lsmix.data.atomic import DECODE_ERRORS, dump_checksummed, fsync_tree, load_checksummed, sha256_file, write_atomic
from lsmix.data.errors import CorruptError, FormatError, LsmixError, MissingError, unreadable

__all__ = [
    "ARTIFACT_FILES",
    "DESCRIPTION_FILES",
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "MOST_MANIFEST_BYTES",
    "STRAY_NAMES",
    "WORK_FOLDER",
    "Artifact",
    "FileRecord",
    "InputRecord",
    "Manifest",
    "check_listing",
    "check_sizes",
    "content_digest",
    "is_description",
    "is_expected_path",
    "is_stray",
    "parse_manifest",
    "read_manifest",
    "record_file",
    "record_files",
    "verify_files",
    "write_manifest",
]

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
WORK_FOLDER = "work"  # checkpoints and the ledger of an artifact in the making; never part of it
MOST_MANIFEST_BYTES = 64 << 20  # some 300,000 files
STRAY_NAMES: Final = frozenset(
    {".DS_Store", ".cache", ".gitattributes", "Thumbs.db"}
)  # ignored in an artifact's folder
_MOST_DEPTH = 32  # of a configuration; ours have four levels
_MOST_SECONDS = 1e10  # three hundred years
_MOST_BYTES = 2**48  # of a file
_MOST_NAME_BYTES = 255  # of a file's path, and of what file systems allow for each part of it
_Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]  # SHA-256, hex
_Key = Annotated[str, msgspec.Meta(pattern=r"\A([0-9a-f]{12})?\Z")]


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One file of an artifact."""

    path: str  # relative to the artifact's folder, with forward slashes
    bytes: Annotated[int, msgspec.Meta(ge=0, le=_MOST_BYTES)]  # size
    sha256: _Digest
    payload: bool  # whether the next stage reads it, so that it counts in the content digest


class InputRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One input of an artifact."""

    role: str  # what the stage calls it: "dataset", "flow", "latents", ...
    cache_key: _Key  # of the input artifact; "" for source files
    content_digest: _Digest  # content digest of its payload


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known of a complete artifact."""

    format_version: int = FORMAT_VERSION
    stage: str
    stage_version: int
    name: str
    cache_key: _Key  # 12 hex digits, see pipeline/workspace/cache_key.py
    content_digest: _Digest  # digest over the payload files
    config: dict[str, Any]  # full configuration of the stage
    inputs: list[InputRecord]
    files: list[FileRecord]
    counts: dict[str, Any] = {}  # facts such as the number of images, of failed decodes, of shards
    seconds: Annotated[float, msgspec.Meta(ge=0, le=_MOST_SECONDS)] = 0.0  # time of work, all sessions together
    environment: dict[str, Any] = {}  # versions, device, determinism flags


class _Environment(msgspec.Struct):
    """What is read again of an artifact's environment."""

    versions: dict[str, str] = {}
    device: str = ""


def content_digest(files: list[FileRecord]) -> str:
    """Return the SHA-256 over path and checksum of all payload files, in order of their paths."""
    lines = [f"{file.sha256} {file.path}\n" for file in files if file.payload]
    return hashlib.sha256("".join(sorted(lines, key=lambda line: line[65:])).encode()).hexdigest()


def record_file(folder: Path, path: str, *, payload: bool, sha256: str = "") -> FileRecord:
    """Return the record of a file in a folder; ``sha256`` is its checksum, if it is known."""
    size = (folder / path).stat().st_size
    return FileRecord(path=path, bytes=size, sha256=sha256 or sha256_file(folder / path), payload=payload)


def record_files(
    folder: Path, payload: set[str] | None = None, known: dict[str, str] | None = None
) -> list[FileRecord]:
    """List the files below ``folder`` with size and checksum, without the manifest and the work folder.

    ``payload`` names the payload: paths, or first parts of paths such as "pool.zarr"; None takes every file. Zarr's metadata
    is never part of it, since other versions of zarr-python write other bytes.
    ``known`` gives checksums that were taken while writing, by path, so that big shards are not read again.
    """
    records = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder).as_posix()
        first = relative.split("/", 1)[0]
        if path.is_dir() or relative == MANIFEST_NAME or first == WORK_FOLDER or is_stray(relative):
            continue
        read = path.name != "zarr.json" and (payload is None or first in payload or relative in payload)
        records.append(record_file(folder, relative, payload=read, sha256=(known or {}).get(relative, "")))
    return records


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Flush everything in ``folder`` to disk, then write the manifest, which makes the artifact complete.

    Raises:
        CorruptError: the folder holds a file that no artifact of this stage has, or too many for a manifest.
    """
    path, content = folder / MANIFEST_NAME, dump_checksummed(manifest)
    for file in manifest.files:
        if not is_expected_path(manifest.stage, file.path):
            where = f"{folder}/{file.path}"
            raise CorruptError(
                f"{where!r} was not made by the stage {manifest.stage!r}. Move it elsewhere, and run again."
            )
    _check_size(path, len(content))
    fsync_tree(folder)
    write_atomic(path, content)


def read_manifest(folder: Path | str) -> Manifest:
    """Return the manifest of the artifact in ``folder``.

    Raises:
        MissingError: there is no such folder, or it is unfinished.
        FormatError: the manifest is of a version that this lsmix does not read.
        CorruptError: the manifest is not what a manifest must be.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingError(f"no artifact at {str(folder)!r}: there is no such folder. 'lsmix ls' lists all.")
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise MissingError(
            f"{str(folder)!r} has no {MANIFEST_NAME}: it is unfinished work or no artifact at all. "
            "Run its recipe again to finish it."
        )
    try:
        _check_size(path, path.stat().st_size)
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise MissingError(f"{str(folder)!r} was removed by another process.") from error
    except OSError as error:
        raise unreadable(str(path), error) from error
    return parse_manifest(content, str(folder))


def parse_manifest(content: bytes, where: str) -> Manifest:
    """Return the manifest that ``content`` holds; ``where`` is the artifact's folder or URL, for messages.

    Manifests come from strangers: every path in the result is one that the stage makes, no two collide, and every size and
    checksum is possible, so that files may be written by it.

    Raises:
        FormatError: it is of a version or a stage that this lsmix does not read.
        CorruptError: it is not what a manifest must be.
    """
    path = f"{where.rstrip('/')}/{MANIFEST_NAME}"
    try:
        remedy = "Use a newer lsmix, or make the artifact again."
        manifest = load_checksummed(content, Manifest, FORMAT_VERSION, what=f"artifact {where!r} has", remedy=remedy)
    except DECODE_ERRORS as error:
        raise CorruptError(f"{path!r} is damaged: {error}. Fetch or make the artifact again.") from error
    if wrong := _wrong_facts(manifest):
        raise CorruptError(f"{path!r} is no manifest of ours: {wrong}. Do not use this artifact.")
    if manifest.stage not in ARTIFACT_FILES:
        raise FormatError(f"{path!r} is of the unknown stage {manifest.stage!r}. Use a newer lsmix.")
    check_listing(path, manifest.stage, manifest.files)
    return manifest


def _check_size(manifest_path: Path, size: int) -> None:
    if size > MOST_MANIFEST_BYTES:
        raise CorruptError(
            f"{str(manifest_path)!r} has {size} bytes; lsmix reads manifests of at most {MOST_MANIFEST_BYTES} bytes. "
            "Do not use this artifact; make its shards larger if it is yours."
        )


def _wrong_facts(manifest: Manifest) -> str:
    """Return what in a manifest cannot be, or ""."""
    named = [("stage", manifest.stage), ("name", manifest.name), *(("role", one.role) for one in manifest.inputs)]
    for what, text in named:
        if not 0 < len(text) <= _MOST_NAME_BYTES or not text.isprintable():
            return f"its {what} is {text[:80]!r}"
    try:
        msgspec.convert(manifest.environment, _Environment)
    except msgspec.ValidationError as error:
        return f"its environment is wrong ({error})"
    for what in ("config", "counts", "environment"):
        if not _is_modest(getattr(manifest, what), _MOST_DEPTH):
            return f"its {what} is nested too deeply, or holds a number beyond 64 bits"
    return ""


def _is_modest(value: Any, depth: int) -> bool:
    """Tell whether a value can be gone through and written again: few levels, numbers of 64 bits."""
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return depth > 0 and all(_is_modest(part, depth - 1) for part in parts)
    return not isinstance(value, int) or abs(value) < 2**63


def check_listing(where: str, stage: str, files: list[FileRecord]) -> None:
    """Raise CorruptError unless files may be written by a list of them: paths that the stage makes, no two alike.

    Args:
        where: the file with the list, for messages.
        stage: that made the files.
        files: the list, from a stranger.
    """
    names: set[str] = set()
    folders: set[str] = set()
    for file in files:
        if not is_expected_path(stage, file.path):
            raise CorruptError(
                f"{where!r} lists the file {file.path[:200]!r}, which no artifact of the stage {stage!r} has. "
                "Do not use this artifact."
            )
        if file.path in names:
            raise CorruptError(f"{where!r} lists the file {file.path!r} twice. Do not use this artifact.")
        names.add(file.path)
        parts = file.path.split("/")
        folders.update("/".join(parts[:depth]) for depth in range(1, len(parts)))
    if both := names & folders:
        raise CorruptError(f"{where!r} lists {min(both)!r} as a file and a folder. Do not use this artifact.")


def check_sizes(folder: Path | str, manifest: Manifest, where: str = "") -> None:
    """Raise CorruptError on the first file that is missing, no regular file, or of another size than recorded.

    Descriptions may be missing or of another size, see ``DESCRIPTION_FILES``. Links to regular files count as these.
    ``where`` is how messages call the folder; "" for its path.
    """
    where = where or str(folder)
    _check_folders(folder, manifest, where)
    for file in manifest.files:
        path = f"{folder}/{file.path}"  # a Path for each of some hundred thousand files would take most of the time
        editable = is_description(file)
        try:
            found = os.lstat(path)
            if stat.S_ISLNK(found.st_mode):
                found, editable = os.stat(path), False  # noqa: PTH116 - as above, no Path for each
        except (FileNotFoundError, NotADirectoryError):
            if editable:
                continue
            listed = f"is missing; {MANIFEST_NAME} lists it with {file.bytes} bytes"
            raise CorruptError(f"{f'{where}/{file.path}'!r} {listed}. Fetch or make the artifact again.") from None
        except OSError as error:
            raise unreadable(f"{where}/{file.path}", error) from error
        got = str(found.st_size) if stat.S_ISREG(found.st_mode) else "no regular file"
        if got != str(file.bytes) and not (editable and stat.S_ISREG(found.st_mode)):
            raise _damage(f"{where}/{file.path}", f"{file.bytes} bytes", got)


def _damage(where: str, expected: str, got: str) -> CorruptError:
    return CorruptError(f"{where!r} is damaged: expected {expected}, got {got}. Fetch or make the artifact again.")


def _check_folders(folder: Path | str, manifest: Manifest, where: str) -> None:
    """Refuse links in place of folders, which would lead out of the artifact, or round in it."""
    known: set[str] = set()
    for file in manifest.files:
        parent = file.path.rpartition("/")[0]
        while parent and parent not in known:
            known.add(parent)
            if os.path.islink(f"{folder}/{parent}"):  # noqa: PTH114 - as above, no Path for each
                raise CorruptError(
                    f"{f'{where}/{parent}'!r} is a link; artifacts hold their own files. Fetch or make the artifact again."
                )
            parent = parent.rpartition("/")[0]


def verify_files(folder: Path, manifest: Manifest, where: str = "") -> int:
    """Check every byte of every file in a folder against the manifest; return the number of bytes listed.

    Descriptions may differ, be missing or be added; ``edited_descriptions`` lists these. ``where`` is how messages call
    the folder; "" for its path.

    Raises:
        CorruptError: on the first file that is missing, altered or not listed, or if the content digest does not fit.
    """
    where = where or str(folder)
    check_sizes(folder, manifest, where)
    if manifest.content_digest != content_digest(manifest.files):
        raise CorruptError(
            f"{f'{where}/{MANIFEST_NAME}'!r} was altered: its content digest does not fit its list of files."
        )
    for file in manifest.files:
        path = folder / file.path
        if is_description(file) and not path.is_symlink():
            continue
        try:
            digest = sha256_file(path)
        except OSError as error:
            raise unreadable(f"{where}/{file.path}", error) from error
        if digest != file.sha256:
            raise _damage(f"{where}/{file.path}", f"sha256 {file.sha256[:12]}…", f"{digest[:12]}…")
    listed = {file.path for file in manifest.files} | {MANIFEST_NAME}
    editable = {path for path in DESCRIPTION_FILES if is_expected_path(manifest.stage, path)}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder).as_posix()
        if relative in listed or relative.split("/", 1)[0] == WORK_FOLDER or is_stray(relative):
            continue
        if path.is_symlink() or not (path.is_dir() or relative in editable):
            raise CorruptError(
                f"{f'{where}/{relative}'!r} is not listed in {MANIFEST_NAME}: it was put there later. Remove it."
            )
    return sum(file.bytes for file in manifest.files)


def is_stray(path: str) -> bool:
    """Tell whether file managers or hubs put a file beside those of an artifact."""
    return not STRAY_NAMES.isdisjoint(path.split("/"))


def is_description(file: FileRecord) -> bool:
    """Tell whether owners of an artifact may edit or remove a file of it."""
    return file.path in DESCRIPTION_FILES and not file.payload


def _columns(store: str) -> str:
    """Return the pattern of the files of a Zarr group whose arrays are chunked along their first axis."""
    return rf"{re.escape(store)}/([a-z][a-z0-9_]*/)?zarr\.json|{re.escape(store)}/[a-z][a-z0-9_]*/c/[0-9]+(/0)*"


# What describes a pool, an export or a card for people and search engines. Owners may edit these files unless they are
# payload: an artifact whose descriptions differ from its manifest is still complete.
DESCRIPTION_FILES: Final = (
    "LICENSES/images.txt",
    "LICENSES/lsmix.txt",
    "README.md",
    "card.png",
    "croissant.json",
    "samples.csv",
)
_DESCRIPTIONS = "|".join(map(re.escape, DESCRIPTION_FILES))
# The naming of export formats, those of other packages too: data, never what Python or a shell would run.
_EXPORT = (
    r"pool-[0-9]+(\.[a-z0-9_]{1,32})?\.(?!py|so|sh|pkl|pickle)[a-z0-9]{1,16}|metadata\.(jsonl|parquet)|"
    r"images/[0-9]+(-[A-Za-z0-9_-]+)?/[0-9]+/[0-9]+\.(png|webp)"
)

# By stage: a regular expression that a whole path must match. None lets a path out of the folder.
ARTIFACT_FILES: Final = {
    "ingest": r"dataset\.h5",
    "train-glow": r"glow\.(json|safetensors)|log\.jsonl|samples\.png",
    "encode": _columns("latents.zarr"),
    "mix": rf"{_columns('pool.zarr')}|plan\.json|{_DESCRIPTIONS}",
    "train": r"metrics\.json|predictions\.json|classifier\.safetensors",
    "naturalness": r"naturalness\.json|sheet\.png",
    "report": r"report\.html|figures/[A-Za-z0-9][A-Za-z0-9._-]*\.(svg|png)",
    "export": rf"{_EXPORT}|plan\.json|SHA256SUMS|{_DESCRIPTIONS}",
    "card": _DESCRIPTIONS,
}


def is_expected_path(stage: str, path: str) -> bool:
    """Tell whether an artifact of a stage can hold a file at a path, relative to its folder.

    Example:
        >>> from lsmix.data.artifact import is_expected_path
        >>> is_expected_path("mix", "pool.zarr/image/c/0/0/0/0"), is_expected_path("mix", "lsmix.py")
        (True, False)
    """
    pattern = ARTIFACT_FILES.get(stage)
    return pattern is not None and len(path) <= _MOST_NAME_BYTES and re.fullmatch(pattern, path) is not None


class Artifact:
    """A complete artifact in a folder on this machine: its manifest, and its files.

    Args:
        manifest: what it holds.
        folder: the folder that holds all of its files.
        url: where it is stored, if this is a copy; errors name it.
    """

    def __init__(self, *, manifest: Manifest, folder: Path, url: str = "") -> None:
        self.manifest = manifest
        self.url = url
        self._folder: Path | None = folder

    @property
    def location(self) -> str:
        """Its URL if it has one, else its folder."""
        return self.url or str(self._folder)

    @property
    def is_local(self) -> bool:
        """Whether a folder on this machine holds all of its files."""
        return self._folder is not None

    @property
    def folder(self) -> Path:
        """The folder on this machine that holds all of its files.

        Raises:
            MissingError: it is stored at a URL; use ``file``.
        """
        if self._folder is None:
            raise MissingError(f"{self.location!r} is not on this machine. Fetch it first: lsmix pull {self.location}")
        return self._folder

    @cached_property
    def records(self) -> dict[str, FileRecord]:
        """The listed files by their path."""
        return {record.path: record for record in self.manifest.files}

    def record(self, path: str) -> FileRecord:
        """Return the record of a listed file.

        Raises:
            MissingError: it is not listed.
        """
        if path not in self.records:
            raise MissingError(f"{self.where(path)!r} is not listed in {MANIFEST_NAME}. Is this the right artifact?")
        return self.records[path]

    def where(self, path: str) -> str:
        """Return how to call a file in messages."""
        return f"{self.location}/{path}"

    def file(self, path: str) -> Path:
        """Return the path on this machine of a listed file, downloaded if need be; open it at once.

        Raises:
            MissingError: it is not listed.
            CorruptError, DownloadError, DiskSpaceError: as ``RemoteArtifact.open``.
        """
        return self.folder / self.record(path).path

    def open(self, path: str) -> IO[bytes]:
        """Return a listed file, opened to read.

        Raises:
            SystemLimitError: the system does not let it be opened.
            LsmixError: as ``file``.
        """
        try:
            return self.file(path).open("rb")
        except OSError as error:
            if isinstance(error, LsmixError):
                raise
            raise unreadable(self.where(path), error) from error

    def prefetch(self, paths: Sequence[str]) -> None:
        """Download listed files that will be opened next, several at a time."""
