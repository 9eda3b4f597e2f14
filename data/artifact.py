"""Artifacts: manifests, which record the content, the inputs and the checksum of every file, and access to the files.

``manifest.json`` is written last, so its presence means that the artifact is complete. A folder without one is
unfinished and is never read.
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
WORK_FOLDER = "work"  # checkpoints and shard records of an unfinished artifact; never part of the artifact
MOST_MANIFEST_BYTES = 64 << 20  # about 300,000 files
STRAY_NAMES: Final = frozenset({".DS_Store", ".cache", ".gitattributes", "Thumbs.db"})  # ignored in artifacts
_MOST_DEPTH = 32  # nesting of a configuration; those of lsmix have four levels
_MOST_SECONDS = 1e10  # 300 years
_MOST_BYTES = 2**48  # size of a file
_MOST_NAME_BYTES = 255  # length of a file's path; file systems allow as much for each of its parts
_Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]  # SHA-256, hex
_Key = Annotated[str, msgspec.Meta(pattern=r"\A([0-9a-f]{12})?\Z")]


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One file of an artifact."""

    path: str  # relative to the artifact's folder, with forward slashes
    bytes: Annotated[int, msgspec.Meta(ge=0, le=_MOST_BYTES)]  # size
    sha256: _Digest
    payload: bool  # whether the next stage reads it; only such files count in the content digest


class InputRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One input of an artifact."""

    role: str  # name of the input in the stage: "dataset", "flow", "latents", ...
    cache_key: _Key  # of the input artifact; "" for source files
    content_digest: _Digest  # digest of its payload files


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The content of ``manifest.json``."""

    format_version: int = FORMAT_VERSION
    stage: str
    stage_version: int
    name: str
    cache_key: _Key  # 12 hex digits, see pipeline/workspace/cache_key.py
    content_digest: _Digest  # digest over the payload files
    config: dict[str, Any]  # full configuration of the stage
    inputs: list[InputRecord]
    files: list[FileRecord]
    counts: dict[str, Any] = {}  # statistics such as the numbers of images, failed decodes and shards
    seconds: Annotated[float, msgspec.Meta(ge=0, le=_MOST_SECONDS)] = 0.0  # total running time of all sessions
    environment: dict[str, Any] = {}  # versions, device, determinism flags


class _Environment(msgspec.Struct):
    """The validated part of a manifest's ``environment``."""

    versions: dict[str, str] = {}
    device: str = ""


def content_digest(files: list[FileRecord]) -> str:
    """Return the SHA-256 over the paths and checksums of all payload files, sorted by path."""
    lines = [f"{file.sha256} {file.path}\n" for file in files if file.payload]
    return hashlib.sha256("".join(sorted(lines, key=lambda line: line[65:])).encode()).hexdigest()


def record_file(folder: Path, path: str, *, payload: bool, sha256: str = "") -> FileRecord:
    """Return the record of a file in a folder; ``sha256`` is its checksum if known, else it is computed."""
    size = (folder / path).stat().st_size
    return FileRecord(path=path, bytes=size, sha256=sha256 or sha256_file(folder / path), payload=payload)


def record_files(
    folder: Path, payload: set[str] | None = None, known: dict[str, str] | None = None
) -> list[FileRecord]:
    """List the files below ``folder`` with size and checksum, except the manifest and the work folder.

    Args:
        folder: The artifact.
        payload: Paths of payload files, or their first parts, such as "pool.zarr"; None for every file. Zarr metadata is
            never payload, because versions of zarr-python write different bytes.
        known: Checksums by path that were computed during writing, so that large shards are not read again.
    """
    records = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder).as_posix()
        first = relative.split("/", 1)[0]
        if path.is_dir() or relative == MANIFEST_NAME or first == WORK_FOLDER or is_stray(relative):
            continue
        is_payload = path.name != "zarr.json" and (payload is None or first in payload or relative in payload)
        records.append(record_file(folder, relative, payload=is_payload, sha256=(known or {}).get(relative, "")))
    return records


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Flush everything in ``folder`` to disk, then write the manifest, which completes the artifact.

    Raises:
        CorruptError: The manifest lists a file that artifacts of this stage do not have, or is too large.
    """
    path, content = folder / MANIFEST_NAME, dump_checksummed(manifest)
    for file in manifest.files:
        if not is_expected_path(manifest.stage, file.path):
            where = f"{folder}/{file.path}"
            raise CorruptError(
                f"{where!r} does not belong to an artifact of the stage {manifest.stage!r}. Move it elsewhere and run again."
            )
    _check_size(path, len(content))
    fsync_tree(folder)
    write_atomic(path, content)


def read_manifest(folder: Path | str) -> Manifest:
    """Return the manifest of the artifact in ``folder``.

    Raises:
        MissingError: The folder does not exist, or the artifact is unfinished.
        FormatError: This version of lsmix does not support the manifest's version.
        CorruptError: The manifest is damaged or invalid.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingError(
            f"no artifact at {str(folder)!r}: the folder does not exist. 'lsmix ls' lists all artifacts."
        )
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise MissingError(
            f"{str(folder)!r} has no {MANIFEST_NAME}: it is not an artifact, or it is unfinished. "
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
    """Decode and validate a manifest; ``where`` is the artifact's folder or URL, for messages.

    Manifests are untrusted input. In the result every path is one that the stage writes, no two paths collide, and all
    sizes and checksums are valid, so it is safe to write files by it.

    Raises:
        FormatError: This version of lsmix does not support the manifest's version or stage.
        CorruptError: The manifest is damaged or invalid.
    """
    path = f"{where.rstrip('/')}/{MANIFEST_NAME}"
    try:
        remedy = "Use a newer lsmix, or rebuild the artifact."
        manifest = load_checksummed(content, Manifest, FORMAT_VERSION, what=f"artifact {where!r} has", remedy=remedy)
    except DECODE_ERRORS as error:
        raise CorruptError(f"{path!r} is damaged: {error}. Download or rebuild the artifact.") from error
    if reason := _invalid_field(manifest):
        raise CorruptError(f"{path!r} is not a valid manifest: {reason}. Download or rebuild the artifact.")
    if manifest.stage not in ARTIFACT_FILES:
        raise FormatError(f"{path!r} is of the unknown stage {manifest.stage!r}. Use a newer lsmix.")
    check_listing(path, manifest.stage, manifest.files)
    return manifest


def _check_size(manifest_path: Path, size: int) -> None:
    if size > MOST_MANIFEST_BYTES:
        raise CorruptError(
            f"{str(manifest_path)!r} has {size:,} bytes; lsmix reads at most {MOST_MANIFEST_BYTES:,}. "
            "Rebuild the artifact with larger shards."
        )


def _invalid_field(manifest: Manifest) -> str:
    """Return why a field of a manifest is invalid, or ""."""
    names = [("stage", manifest.stage), ("name", manifest.name), *(("role", one.role) for one in manifest.inputs)]
    for what, text in names:
        if not 0 < len(text) <= _MOST_NAME_BYTES or not text.isprintable():
            return f"its {what} is {text[:80]!r}"
    try:
        msgspec.convert(manifest.environment, _Environment)
    except msgspec.ValidationError as error:
        return f"its environment is wrong ({error})"
    for what in ("config", "counts", "environment"):
        if not _is_encodable(getattr(manifest, what), _MOST_DEPTH):
            return f"its {what} is nested too deeply, or contains a number beyond 64 bits"
    return ""


def _is_encodable(value: Any, depth: int) -> bool:
    """Return whether a value can be traversed and encoded again: at most ``depth`` levels, integers of 64 bits."""
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return depth > 0 and all(_is_encodable(part, depth - 1) for part in parts)
    return not isinstance(value, int) or abs(value) < 2**63


def check_listing(where: str, stage: str, files: list[FileRecord]) -> None:
    """Raise CorruptError unless it is safe to write files by a list: all paths belong to the stage and none collide.

    Args:
        where: The file that contains the list, for messages.
        stage: Stage of the artifact.
        files: The list, untrusted.
    """
    names: set[str] = set()
    folders: set[str] = set()
    for file in files:
        if not is_expected_path(stage, file.path):
            raise CorruptError(
                f"{where!r} lists the file {file.path[:200]!r}, which does not belong to an artifact of the stage {stage!r}. "
                "Download or rebuild the artifact."
            )
        if file.path in names:
            raise CorruptError(f"{where!r} lists the file {file.path!r} twice. Download or rebuild the artifact.")
        names.add(file.path)
        parts = file.path.split("/")
        folders.update("/".join(parts[:depth]) for depth in range(1, len(parts)))
    if both := names & folders:
        raise CorruptError(f"{where!r} lists {min(both)!r} as a file and a folder. Download or rebuild the artifact.")


def check_sizes(folder: Path | str, manifest: Manifest, where: str = "") -> None:
    """Raise CorruptError for the first file that is missing, not a regular file, or of another size than recorded.

    Descriptions may be missing or have another size, see ``DESCRIPTION_FILES``. Links to regular files are accepted.
    ``where`` is the folder's name in messages; "" for its path.
    """
    where = where or str(folder)
    _check_folders(folder, manifest, where)
    for file in manifest.files:
        path = f"{folder}/{file.path}"  # with several 100,000 files, building Path objects would take most of the time
        editable = is_description(file)
        try:
            found = os.lstat(path)
            if stat.S_ISLNK(found.st_mode):
                found, editable = os.stat(path), False  # noqa: PTH116 - as above, no Path objects
        except (FileNotFoundError, NotADirectoryError):
            if editable:
                continue
            listed = f"is missing; {MANIFEST_NAME} lists it with {file.bytes:,} bytes"
            raise CorruptError(f"{f'{where}/{file.path}'!r} {listed}. Download or rebuild the artifact.") from None
        except OSError as error:
            raise unreadable(f"{where}/{file.path}", error) from error
        is_file = stat.S_ISREG(found.st_mode)
        if not is_file or (found.st_size != file.bytes and not editable):
            got = f"{found.st_size:,}" if is_file else "something that is not a regular file"
            raise _damaged(f"{where}/{file.path}", f"{file.bytes:,} bytes", got)


def _damaged(where: str, expected: str, got: str) -> CorruptError:
    return CorruptError(f"{where!r} is damaged: expected {expected}, got {got}. Download or rebuild the artifact.")


def _check_folders(folder: Path | str, manifest: Manifest, where: str) -> None:
    """Reject links to folders, which would lead out of the artifact or form a cycle."""
    known: set[str] = set()
    for file in manifest.files:
        parent = file.path.rpartition("/")[0]
        while parent and parent not in known:
            known.add(parent)
            if os.path.islink(f"{folder}/{parent}"):  # noqa: PTH114 - as in check_sizes, no Path objects
                raise CorruptError(
                    f"{f'{where}/{parent}'!r} is a link; folders of an artifact must not be links. "
                    "Download or rebuild the artifact."
                )
            parent = parent.rpartition("/")[0]


def verify_files(folder: Path, manifest: Manifest, where: str = "") -> int:
    """Check every byte of every file in a folder against the manifest, and return the number of listed bytes.

    Descriptions may differ, be missing or be added; ``edited_descriptions`` lists them. ``where`` is the folder's name in
    messages; "" for its path.

    Raises:
        CorruptError: A file is missing, altered or not listed, or the content digest does not match the list of files.
    """
    where = where or str(folder)
    check_sizes(folder, manifest, where)
    if manifest.content_digest != content_digest(manifest.files):
        raise CorruptError(
            f"{f'{where}/{MANIFEST_NAME}'!r} was altered: its content digest does not match its list of files."
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
            raise _damaged(f"{where}/{file.path}", f"sha256 {file.sha256[:12]}…", f"{digest[:12]}…")
    listed = {file.path for file in manifest.files} | {MANIFEST_NAME}
    editable = {path for path in DESCRIPTION_FILES if is_expected_path(manifest.stage, path)}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder).as_posix()
        if relative in listed or relative.split("/", 1)[0] == WORK_FOLDER or is_stray(relative):
            continue
        if path.is_symlink() or not (path.is_dir() or relative in editable):
            raise CorruptError(
                f"{f'{where}/{relative}'!r} is not listed in {MANIFEST_NAME}: it was added later. Remove it."
            )
    return sum(file.bytes for file in manifest.files)


def is_stray(path: str) -> bool:
    """Return whether file managers or hubs add files of this name to a folder."""
    return not STRAY_NAMES.isdisjoint(path.split("/"))


def is_description(file: FileRecord) -> bool:
    """Return whether owners of an artifact may edit or remove this file of it."""
    return file.path in DESCRIPTION_FILES and not file.payload


def _columns(store: str) -> str:
    """Return a pattern that matches the files of a Zarr group whose arrays are chunked along their first axis."""
    return rf"{re.escape(store)}/([a-z][a-z0-9_]*/)?zarr\.json|{re.escape(store)}/[a-z][a-z0-9_]*/c/[0-9]+(/0)*"


# Files that describe a pool, an export or a card to people and search engines. Owners may edit them unless they are
# payload: an artifact whose descriptions differ from its manifest is still valid.
DESCRIPTION_FILES: Final = (
    "LICENSES/images.txt",
    "LICENSES/lsmix.txt",
    "README.md",
    "card.png",
    "croissant.json",
    "samples.csv",
)
_DESCRIPTIONS = "|".join(map(re.escape, DESCRIPTION_FILES))
# File names of export formats, including those of other packages; names that Python or a shell would run are excluded.
_EXPORT = (
    r"pool-[0-9]+(\.[a-z0-9_]{1,32})?\.(?!py|so|sh|pkl|pickle)[a-z0-9]{1,16}|metadata\.(jsonl|parquet)|"
    r"images/[0-9]+(-[A-Za-z0-9_-]+)?/[0-9]+/[0-9]+\.(png|webp)"
)

# By stage: a regular expression that the entire path of a file must match. No match can leave the folder.
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
    """Return whether an artifact of a stage can have a file at ``path``, relative to its folder.

    Example:
        >>> from lsmix.data.artifact import is_expected_path
        >>> is_expected_path("mix", "pool.zarr/image/c/0/0/0/0"), is_expected_path("mix", "lsmix.py")
        (True, False)
    """
    pattern = ARTIFACT_FILES.get(stage)
    return pattern is not None and len(path) <= _MOST_NAME_BYTES and re.fullmatch(pattern, path) is not None


class Artifact:
    """A complete artifact in a local folder: its manifest and its files.

    Args:
        manifest: The manifest.
        folder: Folder with all of its files.
        url: Source of the folder if it is a copy; messages then name this URL.
    """

    def __init__(self, *, manifest: Manifest, folder: Path, url: str = "") -> None:
        self.manifest = manifest
        self.url = url
        self._folder: Path | None = folder

    @property
    def location(self) -> str:
        """The URL of the artifact if it has one, else its folder."""
        return self.url or str(self._folder)

    @property
    def is_local(self) -> bool:
        """Whether all files are in a local folder."""
        return self._folder is not None

    @property
    def folder(self) -> Path:
        """The local folder with all files.

        Raises:
            MissingError: The artifact is stored at a URL; use ``file``.
        """
        if self._folder is None:
            raise MissingError(f"{self.location!r} is not on this machine. Run: lsmix pull {self.location}")
        return self._folder

    @cached_property
    def records(self) -> dict[str, FileRecord]:
        """The records of all listed files, by path."""
        return {record.path: record for record in self.manifest.files}

    def record(self, path: str) -> FileRecord:
        """Return the record of a listed file.

        Raises:
            MissingError: The file is not listed.
        """
        if path not in self.records:
            raise MissingError(f"{self.where(path)!r} is not listed in {MANIFEST_NAME}. Is this the right artifact?")
        return self.records[path]

    def where(self, path: str) -> str:
        """Return the path or URL of a file, for messages."""
        return f"{self.location}/{path}"

    def file(self, path: str) -> Path:
        """Download a listed file if necessary and return its path; open it immediately, before the cache evicts it.

        Raises:
            MissingError: The file is not listed.
            CorruptError, DownloadError, DiskSpaceError: As for ``RemoteArtifact.open``.
        """
        return self.folder / self.record(path).path

    def open(self, path: str) -> IO[bytes]:
        """Open a listed file for reading.

        Raises:
            SystemLimitError: The system refuses to open the file.
            LsmixError: As for ``file``.
        """
        try:
            return self.file(path).open("rb")
        except OSError as error:
            if isinstance(error, LsmixError):
                raise
            raise unreadable(self.where(path), error) from error

    def prefetch(self, paths: Sequence[str]) -> None:
        """Download listed files that will be opened soon, several in parallel."""
