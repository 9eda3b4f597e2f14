"""Push and pull: transfer the missing files of an artifact to or from a remote, several in parallel.

The manifest is transferred last in both directions, so a partial transfer is never mistaken for an artifact. A pulled
folder gets its final name only after every byte has been verified.
"""

import contextlib
import hashlib
import os
import queue
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import msgspec

from lsmix.data.artifact import (
    MANIFEST_NAME,
    STRAY_NAMES,
    WORK_FOLDER,
    Artifact,
    FileRecord,
    Manifest,
    content_digest,
    is_description,
    read_manifest,
    verify_files,
)
from lsmix.data.atomic import (
    atomic_folder,
    check_room,
    dump_checksummed,
    folder_bytes,
    locked_file,
    sha256_file,
    write_atomic,
)
from lsmix.data.cache import cache_folder, fetch_file, fetch_manifest, private_folder
from lsmix.data.errors import CorruptError, LockedError, LsmixError, MissingError, RecipeError
from lsmix.data.progress import Progress, Stopped, stop_point, stopping
from lsmix.data.remote import LocalFile, RemoteFS, open_remote
from lsmix.data.sharing.descriptions import description_records
from lsmix.data.sharing.hub import open_target
from lsmix.data.store import open_artifact

__all__ = [
    "Transfer",
    "folder_name",
    "pull_artifact",
    "push_artifact",
    "temporary_copy",
]

_JOBS = 4  # parallel transfers
_MOST_BATCH_BYTES = 1 << 30  # size of files that are sent together
_MOST_ADDED_BYTES = 1 << 20  # by which an edited description may grow
_COPIES = "copies"  # folder of temporary copies in the cache
_CLAIM = f"{WORK_FOLDER}/push.json"  # identifies the artifact at the remote until its manifest is there


class Transfer(msgspec.Struct, frozen=True, kw_only=True):
    """Result of a push or a pull."""

    url: str  # URL of the remote artifact
    folder: str  # local folder, or URL of the source of a push
    stage: str  # stage of the artifact
    name: str
    cache_key: str
    content_digest: str  # digest of the payload
    files: int  # number of files in the artifact, without the manifest
    bytes: int  # their total size
    moved_files: int  # number of files transferred
    moved_bytes: int  # bytes transferred


def push_artifact(
    artifact: Artifact | Path, url: str, progress: Progress, *, owned: bool = False, card: Path | None = None
) -> Transfer:
    """Push an artifact to ``url``. Files that the remote already has are not sent again.

    Descriptions are sent in their current state and replace those at ``url``; the pushed manifest lists this state.

    Args:
        artifact: The artifact or its folder.
        url: A folder that is empty, does not exist, or contains the same artifact or a partial push of it.
        progress: Progress reporter, counts bytes.
        owned: Whether ``url`` is the artifact's folder in a workspace, which may already contain shards.
        card: Folder with descriptions to send instead of the artifact's own.

    Raises:
        MissingError: There is no artifact in the folder.
        CorruptError: A local file is damaged, or a file was damaged in both attempts to send it.
        RecipeError: ``url`` contains something else, or it is read-only.
        DownloadError: The remote cannot be reached. The next call resumes the push.
    """
    artifact = open_artifact(artifact)
    manifest = artifact.manifest
    strict = _strict(manifest)
    home = card or (artifact.folder if artifact.is_local else None)  # of the descriptions
    if home:
        listed = {(file.path, file.sha256) for file in manifest.files}
        descriptions = description_records(home, manifest.stage, {file.path for file in strict}, listed)
        files = sorted([*strict, *descriptions], key=lambda file: file.path.split("/"))
        manifest = msgspec.structs.replace(manifest, files=files)
    remote = open_target(url)
    found = remote.entries("")  # raises RecipeError for web servers
    existing = _existing_manifest(remote)
    if existing is not None and set(_strict(existing)) != set(strict):
        raise RecipeError(
            f"{remote.url!r} contains another artifact: {existing.stage} {existing.name!r} with content digest "
            f"{existing.content_digest[:12]}, not {manifest.content_digest[:12]}. Choose another URL, or remove it first."
        )

    own = {_CLAIM: _claim_of(manifest), MANIFEST_NAME: dump_checksummed(manifest)}
    claim, listing = (_record(path, content) for path, content in own.items())
    claimed = existing is None and not owned
    if claimed:
        _check_free(remote, own[_CLAIM], found)
    changed = existing is None or set(existing.files) != set(manifest.files)
    files = [*manifest.files, *([listing] if changed else [])]
    batches = _batches(files, remote.files_at_once)
    claimed = claimed and len(batches) > 1  # a single batch is atomic and needs no claim
    if claimed:
        batches = _batches([claim, *files], remote.files_at_once)
    with tempfile.TemporaryDirectory(prefix="lsmix-") as scratch:

        def source(record: FileRecord) -> Path:
            if record.path in own:
                path = Path(scratch, record.sha256)
                path.write_bytes(own[record.path])
                return path
            return home / record.path if home and is_description(record) else artifact.file(record.path)

        def send(batch: Sequence[FileRecord], advance: Callable[[int], None]) -> list[int]:
            files = {record.path: LocalFile(source(record), record.sha256) for record in batch}
            remove = [] if owned or batch is not batches[-1] else [_CLAIM]
            sent = _send(remote, files, remove)
            advance(sum(record.bytes for record in batch))
            return [record.bytes if record.path in sent and record.path not in own else 0 for record in batch]

        with _counted(progress, f"push {manifest.name}", batches):
            threads = _JOBS if remote.files_at_once == 1 else 1
            moved = _in_parallel(batches[:1], send, progress)
            if claimed:
                _check_claim(remote, own[_CLAIM])  # another push may have started at the same time
            moved += _in_parallel(batches[1:-1], send, progress, threads)
            if claimed:
                _check_claim(remote, own[_CLAIM])
            moved += _in_parallel(batches[1:][-1:], send, progress)
    return _result(manifest, artifact.location, remote.url, moved)


def _record(path: str, content: bytes) -> FileRecord:
    return FileRecord(path=path, bytes=len(content), sha256=hashlib.sha256(content).hexdigest(), payload=False)


def _batches(records: Sequence[FileRecord], most_files: int) -> list[list[FileRecord]]:
    """Divide files, in order, into batches that are sent together."""
    batches: list[list[FileRecord]] = [[]]
    for record in records:
        size = sum(other.bytes for other in batches[-1])
        if batches[-1] and (len(batches[-1]) == most_files or size + record.bytes > _MOST_BATCH_BYTES):
            batches.append([])
        batches[-1].append(record)
    return batches


def _claim_of(manifest: Manifest) -> bytes:
    """Return the content of the claim file, which identifies an artifact except for its descriptions."""
    everything = content_digest([msgspec.structs.replace(file, payload=True) for file in _strict(manifest)])
    return msgspec.json.encode({"content_digest": manifest.content_digest, "files": everything}) + b"\n"


def _check_free(remote: RemoteFS, claim: bytes, found: dict[str, bool]) -> None:
    """Raise RecipeError unless a remote is empty or has the claim of an earlier push of the same artifact."""
    if WORK_FOLDER in found and remote.size(_CLAIM) is not None:
        _check_claim(remote, claim)
    elif others := found.keys() - {WORK_FOLDER} - STRAY_NAMES:
        raise RecipeError(
            f"{remote.url!r} is not empty: it contains {min(others)!r}, which is not part of an earlier push of this artifact. "
            "Choose an empty folder."
        )


def _check_claim(remote: RemoteFS, claim: bytes) -> None:
    with tempfile.NamedTemporaryFile(prefix="lsmix-") as file:
        file.write(claim)
        file.flush()
        local = LocalFile(Path(file.name), hashlib.sha256(claim).hexdigest())
        same = not remote.missing({_CLAIM: local})
    if not same:
        raise RecipeError(
            f"{remote.url!r} contains an unfinished push of another artifact. Choose another URL, or remove it first."
        )


def pull_artifact(url: str, target: Path | None, progress: Progress) -> Transfer:
    """Download the artifact at ``url`` to the folder ``target``, resuming an earlier, interrupted pull.

    Until the download is complete, the files are in a folder next to it that has the suffix ".part".

    Args:
        url: URL of the artifact's folder.
        target: A folder that does not exist, is empty, or contains the same artifact; None for a folder in the current
            one, named after the last part of the URL.
        progress: Progress reporter, counts bytes.

    Raises:
        MissingError: There is no complete artifact at ``url``.
        FormatError: This version of lsmix does not support the artifact's version.
        CorruptError: The remote or an existing local artifact is damaged, or the manifest lists paths that are not allowed.
        RecipeError: ``target`` contains something else.
        DiskSpaceError: The artifact does not fit on the disk.
        DownloadError: The remote cannot be reached. The next call resumes the download.
        LockedError: Another pull is writing to ``target``.
    """
    remote = open_remote(url)
    folder = target or Path(folder_name(url))
    manifest, content = fetch_manifest(remote)
    if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
        return _verify_existing(folder, manifest, remote.url)
    folder.parent.mkdir(parents=True, exist_ok=True)
    moved = _pull(remote, manifest, content, folder, progress)
    return _result(manifest, str(folder), remote.url, moved)


@contextmanager
def temporary_copy(url: str, progress: Progress) -> Iterator[Path]:
    """Download an artifact to a temporary folder and yield the folder, which may be modified; it is removed at the end.

    Args:
        url: URL of the artifact.
        progress: Progress reporter, counts bytes.

    Raises:
        LsmixError: As for ``pull_artifact``.
    """
    remote = open_remote(url)
    manifest, content = fetch_manifest(remote)
    home = private_folder(cache_folder().absolute(), _COPIES)
    for stale in home.glob("*.lock"):  # copies of killed processes
        with contextlib.suppress(LockedError), locked_file(stale):
            _remove_copy(stale)
    lock = home / f"{secrets.token_hex(8)}.lock"
    with locked_file(lock):
        try:
            folder = lock.with_suffix("")
            _pull(remote, manifest, content, folder, progress)
            yield folder
        finally:
            _remove_copy(lock)


def _remove_copy(lock: Path) -> None:
    for folder in (lock.with_suffix(""), lock.with_suffix(".part")):
        shutil.rmtree(folder, ignore_errors=True)
    lock.unlink(missing_ok=True)


def _pull(remote: RemoteFS, manifest: Manifest, content: bytes, folder: Path, progress: Progress) -> list[int]:
    """Download an artifact to a new folder, and return the number of downloaded bytes of each file."""
    with atomic_folder(folder, resume=True) as part:
        _remove_unlisted(part, manifest)
        needed = sum(record.bytes for record in manifest.files) - folder_bytes(part)
        check_room(part, needed, f"the artifact at {remote.url!r}")

        def download(batch: Sequence[FileRecord], advance: Callable[[int], None]) -> list[int]:
            return [_download(remote, part / record.path, record, advance) for record in batch]

        batches = _batches(manifest.files, 1)
        with _counted(progress, f"pull {manifest.name}", batches):
            moved = _in_parallel(batches, download, progress, _JOBS)
        write_atomic(part / MANIFEST_NAME, content)
    return moved


@contextmanager
def _counted(progress: Progress, label: str, batches: list[list[FileRecord]]) -> Iterator[None]:
    progress.start(label, sum(record.bytes for batch in batches for record in batch), "byte")
    try:
        yield
    finally:
        progress.finish()


def _in_parallel(
    batches: list[list[FileRecord]],
    work: Callable[[Sequence[FileRecord], Callable[[int], None]], list[int]],
    progress: Progress,
    threads: int = 1,
) -> list[int]:
    """Process batches in threads and return the transferred bytes of each file; an error stops all threads."""
    moves: queue.SimpleQueue[int | None] = queue.SimpleQueue()  # numbers of bytes, and None for each finished batch
    stop = threading.Event()

    def one(batch: Sequence[FileRecord]) -> list[int]:
        try:
            with stopping(stop.is_set):
                stop_point()
                return work(batch, moves.put)
        except BaseException:
            stop.set()
            raise
        finally:
            moves.put(None)

    with ThreadPoolExecutor(threads, thread_name_prefix="lsmix-transfer") as pool:
        try:
            results = [pool.submit(one, batch) for batch in batches]
            left = len(batches)
            while left:
                count = moves.get()
                if count is None:
                    left -= 1
                else:
                    progress.advance(count)
        except BaseException:
            stop.set()  # otherwise leaving the block would wait for all batches
            raise
    for error in (result.exception() for result in results):
        if error and not isinstance(error, Stopped):
            raise error
    return [moved for result in results for moved in result.result()]


def _send(remote: RemoteFS, files: dict[str, LocalFile], remove: Iterable[str]) -> set[str]:
    """Send the files that are missing or differ, then remove the files in ``remove``; return the paths of sent files."""
    for source, sha256 in files.values():
        stop_point()
        if (got := sha256_file(source)) != sha256:
            raise CorruptError(
                f"{str(source)!r} is damaged: expected sha256 {sha256[:12]}…, got {got[:12]}…. It was not sent. "
                "Download or rebuild the artifact."
            )
    missing = sent = remote.missing(files)
    for _ in range(2):
        if missing or remove:
            remote.update({path: file for path, file in files.items() if path in missing}, remove)
            missing, remove = remote.missing({path: files[path] for path in missing}), ()
    if missing:
        where = f"{remote.url}/{min(missing)}"
        raise CorruptError(
            f"{where!r} was damaged in two attempts to send it. Check the remote, or choose another URL."
        )
    return sent


def _download(remote: RemoteFS, target: Path, record: FileRecord, advance: Callable[[int], None]) -> int:
    """Download a file, resuming an earlier pull, and return the number of downloaded bytes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with target.open("a+b", buffering=0) as stream:
            have = os.fstat(stream.fileno()).st_size
            advance(have if have <= record.bytes else 0)
            return fetch_file(remote, record.path, record.bytes, record.sha256, stream, advance)
    except (CorruptError, MissingError):
        if not is_description(record):
            raise
    return _download_edited(remote, target, record)


def _download_edited(remote: RemoteFS, target: Path, record: FileRecord) -> int:
    """Download a description that its owner has edited; if it was removed, remove the local one."""
    try:
        content = remote.read(record.path, 2 * record.bytes + _MOST_ADDED_BYTES)
    except MissingError:
        target.unlink(missing_ok=True)
        return 0
    target.write_bytes(content)
    return len(content)


def _remove_unlisted(part: Path, manifest: Manifest) -> None:
    """Remove all links, files that are not listed, and empty folders."""
    listed = {record.path for record in manifest.files}
    for path in sorted(part.rglob("*"), reverse=True):  # the files of a folder before the folder
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):  # it is not empty
                path.rmdir()
        elif path.is_symlink() or path.relative_to(part).as_posix() not in listed:
            path.unlink()


def _verify_existing(folder: Path, manifest: Manifest, url: str) -> Transfer:
    try:
        same = folder.is_dir() and set(_strict(read_manifest(folder))) == set(_strict(manifest))
    except LsmixError:
        same = False
    if not same:
        raise RecipeError(f"{str(folder)!r} already contains something else. Choose another folder, or move it away.")
    try:
        verify_files(folder, manifest)
    except CorruptError as error:
        raise CorruptError(
            f"{str(folder)!r} already exists and is damaged: {error} Remove and pull it again."
        ) from error
    return _result(manifest, str(folder), url, [0] * len(manifest.files))


def _existing_manifest(remote: RemoteFS) -> Manifest | None:
    try:
        return fetch_manifest(remote)[0]
    except MissingError:
        return None


def _strict(manifest: Manifest) -> list[FileRecord]:
    """Return the files that must be identical in two copies of an artifact, i.e. all except descriptions."""
    return [file for file in manifest.files if not is_description(file)]


def folder_name(url: str) -> str:
    """Return the last part of a URL as the name of a folder.

    Raises:
        RecipeError: It is not a valid name of a folder.
    """
    name = unquote(urlsplit(url).path.rstrip("/").rpartition("/")[2] or urlsplit(url).netloc)
    if name in ("", ".", "..") or "/" in name or not name.isprintable():
        raise RecipeError(f"{url!r} does not end in a valid folder name. Name the folder to download the artifact to.")
    return name


def _result(manifest: Manifest, folder: str, url: str, moved: list[int]) -> Transfer:
    return Transfer(
        url=url,
        folder=folder,
        stage=manifest.stage,
        name=manifest.name,
        cache_key=manifest.cache_key,
        content_digest=manifest.content_digest,
        files=len(manifest.files),
        bytes=sum(record.bytes for record in manifest.files),
        moved_files=sum(count > 0 for count in moved),
        moved_bytes=sum(moved),
    )
