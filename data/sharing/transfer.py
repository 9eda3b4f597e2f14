"""Sending an artifact to a place and fetching it from there; only what is missing, several files at a time.

The manifest goes last in both directions, so that what is half sent or half fetched is never taken for an
artifact; and a fetched folder gets its name only when every byte in it is the listed one.
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

_JOBS = 4  # files on their way at a time
_MOST_BATCH_BYTES = 1 << 30  # of files that are sent together
_MOST_ADDED_BYTES = 1 << 20  # that an owner may add to a description at a URL
_COPIES = "copies"  # in the cache: temporary copies
_BEGUN = f"{WORK_FOLDER}/push.json"  # at a place until the manifest is there: which artifact is being sent


class Transfer(msgspec.Struct, frozen=True, kw_only=True):
    """What a push or a pull did."""

    url: str  # the place at the other end
    folder: str  # the artifact here
    stage: str  # what made the artifact
    name: str
    cache_key: str
    content_digest: str  # digest of its payload
    files: int  # in the artifact, the manifest not counted
    bytes: int  # size of these
    moved_files: int  # how many of them had to be sent or fetched
    moved_bytes: int  # what was sent or fetched


def push_artifact(
    artifact: Artifact | Path, url: str, progress: Progress, *, owned: bool = False, card: Path | None = None
) -> Transfer:
    """Send an artifact to ``url``; complete, correct files are not sent again.

    Descriptions are sent as they are now, and the manifest that is sent lists them so; those at ``url`` are replaced.

    Args:
        artifact: the artifact or its folder.
        url: an empty folder, one that is not there yet, or one to which the same artifact was sent, perhaps in part.
        progress: counts bytes.
        owned: whether the folder at ``url`` is this artifact's own in a workspace, so that it may hold shards already.
        card: folder with the descriptions to send in place of the artifact's.

    Raises:
        MissingError: there is no artifact in the folder.
        CorruptError: a file here is damaged, or arrives damaged, twice.
        RecipeError: ``url`` holds something else, or nothing can be sent there.
        DownloadError: the place cannot be reached; what was sent counts the next time.
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
    place = open_target(url)
    found = place.entries("")  # which web servers refuse
    there = _manifest_there(place)
    if there is not None and set(_strict(there)) != set(strict):
        raise RecipeError(
            f"{place.url!r} holds another artifact: {there.stage} {there.name!r} with content digest {there.content_digest[:12]}, not "
            f"{manifest.content_digest[:12]}. Choose another URL, or remove it there first."
        )

    own = {_BEGUN: _note(manifest), MANIFEST_NAME: dump_checksummed(manifest)}
    note, listing = (_record(path, content) for path, content in own.items())
    claimed = there is None and not owned
    if claimed:
        _check_free(place, own[_BEGUN], found)
    changed = there is None or set(there.files) != set(manifest.files)
    files = [*manifest.files, *([listing] if changed else [])]
    batches = _batches(files, place.files_at_once)
    claimed = claimed and len(batches) > 1  # one batch arrives as a whole or not at all
    if claimed:
        batches = _batches([note, *files], place.files_at_once)
    with tempfile.TemporaryDirectory(prefix="lsmix-") as scratch:

        def source(record: FileRecord) -> Path:
            if record.path in own:
                path = Path(scratch, record.sha256)
                path.write_bytes(own[record.path])
                return path
            return home / record.path if home and is_description(record) else artifact.file(record.path)

        def send(batch: Sequence[FileRecord], advance: Callable[[int], None]) -> list[int]:
            files = {record.path: LocalFile(source(record), record.sha256) for record in batch}
            remove = [] if owned or batch is not batches[-1] else [_BEGUN]
            sent = _send(place, files, remove)
            advance(sum(record.bytes for record in batch))
            return [record.bytes if record.path in sent and record.path not in own else 0 for record in batch]

        with _counted(progress, f"push {manifest.name}", batches):
            threads = _JOBS if place.files_at_once == 1 else 1
            moved = _in_parallel(batches[:1], send, progress)
            if claimed:
                _check_begun(place, own[_BEGUN])  # another push may have begun at the same time
            moved += _in_parallel(batches[1:-1], send, progress, threads)
            if claimed:
                _check_begun(place, own[_BEGUN])
            moved += _in_parallel(batches[1:][-1:], send, progress)
    return _result(manifest, artifact.location, place.url, moved)


def _record(path: str, content: bytes) -> FileRecord:
    return FileRecord(path=path, bytes=len(content), sha256=hashlib.sha256(content).hexdigest(), payload=False)


def _batches(records: Sequence[FileRecord], most_files: int) -> list[list[FileRecord]]:
    """Divide files, in their order, into what is sent together."""
    batches: list[list[FileRecord]] = [[]]
    for record in records:
        size = sum(other.bytes for other in batches[-1])
        if batches[-1] and (len(batches[-1]) == most_files or size + record.bytes > _MOST_BATCH_BYTES):
            batches.append([])
        batches[-1].append(record)
    return batches


def _note(manifest: Manifest) -> bytes:
    """Return a note that identifies an artifact, its descriptions excepted."""
    everything = content_digest([msgspec.structs.replace(file, payload=True) for file in _strict(manifest)])
    return msgspec.json.encode({"content_digest": manifest.content_digest, "files": everything}) + b"\n"


def _check_free(place: RemoteFS, note: bytes, found: dict[str, bool]) -> None:
    """Raise RecipeError unless a place is empty, or has the note of an earlier push of the same artifact."""
    if WORK_FOLDER in found and place.size(_BEGUN) is not None:
        _check_begun(place, note)
    elif others := found.keys() - {WORK_FOLDER} - STRAY_NAMES:
        raise RecipeError(
            f"{place.url!r} is not empty: it holds {min(others)!r}, which no push of this artifact put there. Choose an empty "
            "folder."
        )


def _check_begun(place: RemoteFS, note: bytes) -> None:
    with tempfile.NamedTemporaryFile(prefix="lsmix-") as file:
        file.write(note)
        file.flush()
        local = LocalFile(Path(file.name), hashlib.sha256(note).hexdigest())
        same = not place.missing({_BEGUN: local})
    if not same:
        raise RecipeError(
            f"another artifact is being pushed to {place.url!r}, or was in part. Choose another URL, or remove it there first."
        )


def pull_artifact(url: str, target: Path | None, progress: Progress) -> Transfer:
    """Fetch the artifact at ``url`` to the folder ``target``, going on with what an earlier pull left.

    Until all files are there they are in a folder beside it, named like ``target`` with ".part" at the end.

    Args:
        url: the artifact's folder at a place.
        target: a folder that is not there yet, is empty, or holds the same artifact; None for one in the current folder,
            named as the last part of the URL.
        progress: counts bytes.

    Raises:
        MissingError: there is no complete artifact at ``url``.
        FormatError: it is of a version that this lsmix does not read.
        CorruptError: it is damaged, or its manifest would write to where it must not; or what is in ``target`` is damaged.
        RecipeError: something else is in ``target``.
        DiskSpaceError: it does not fit on the disk.
        DownloadError: the place cannot be reached; what came is kept.
        LockedError: another pull writes to ``target``.
    """
    place = open_remote(url)
    folder = target or Path(folder_name(url))
    manifest, content = fetch_manifest(place)
    if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
        return _already_there(folder, manifest, place.url)
    folder.parent.mkdir(parents=True, exist_ok=True)
    moved = _pull(place, manifest, content, folder, progress)
    return _result(manifest, str(folder), place.url, moved)


@contextmanager
def temporary_copy(url: str, progress: Progress) -> Iterator[Path]:
    """Yield the folder of a new copy of what is stored at a URL now; it may be changed, and is removed at the end.

    Args:
        url: of an artifact.
        progress: counts bytes.

    Raises:
        LsmixError: as ``pull_artifact``.
    """
    place = open_remote(url)
    manifest, content = fetch_manifest(place)
    home = private_folder(cache_folder().absolute(), _COPIES)
    for left in home.glob("*.lock"):  # by killed processes
        with contextlib.suppress(LockedError), locked_file(left):
            _remove_copy(left)
    lock = home / f"{secrets.token_hex(8)}.lock"
    with locked_file(lock):
        try:
            folder = lock.with_suffix("")
            _pull(place, manifest, content, folder, progress)
            yield folder
        finally:
            _remove_copy(lock)


def _remove_copy(lock: Path) -> None:
    for folder in (lock.with_suffix(""), lock.with_suffix(".part")):
        shutil.rmtree(folder, ignore_errors=True)
    lock.unlink(missing_ok=True)


def _pull(place: RemoteFS, manifest: Manifest, content: bytes, folder: Path, progress: Progress) -> list[int]:
    """Fetch an artifact to a new folder; return how many bytes of each file were fetched."""
    with atomic_folder(folder, resume=True) as part:
        _sweep(part, manifest)
        needed = sum(record.bytes for record in manifest.files) - folder_bytes(part)
        check_room(part, needed, f"the artifact at {place.url!r}")

        def fetch(batch: Sequence[FileRecord], advance: Callable[[int], None]) -> list[int]:
            return [_fetch(place, part / record.path, record, advance) for record in batch]

        batches = _batches(manifest.files, 1)
        with _counted(progress, f"pull {manifest.name}", batches):
            moved = _in_parallel(batches, fetch, progress, _JOBS)
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
    """Do the work on all batches, and return how many bytes of each file moved; raise the first error when all have stopped."""
    moves: queue.SimpleQueue[int | None] = queue.SimpleQueue()  # bytes, and None for each batch that is through
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
            stop.set()  # so that leaving the block does not wait for all that was asked for
            raise
    for error in (result.exception() for result in results):
        if error and not isinstance(error, Stopped):
            raise error
    return [moved for result in results for moved in result.result()]


def _send(place: RemoteFS, files: dict[str, LocalFile], remove: Iterable[str]) -> set[str]:
    """Send those of some files that are missing or differ, and remove others; return the paths of those that were sent."""
    for source, sha256 in files.values():
        stop_point()
        if (got := sha256_file(source)) != sha256:
            raise CorruptError(
                f"{str(source)!r} is damaged: expected sha256 {sha256[:12]}…, got {got[:12]}…. It was not sent; "
                "fetch or make the artifact again."
            )
    missing = sent = place.missing(files)
    for _ in range(2):
        if missing or remove:
            place.update({path: file for path, file in files.items() if path in missing}, remove)
            missing, remove = place.missing({path: files[path] for path in missing}), ()
    if missing:
        where = f"{place.url}/{min(missing)}"
        raise CorruptError(f"{where!r} is damaged after it was sent, twice. Check the place, or choose another.")
    return sent


def _fetch(place: RemoteFS, target: Path, record: FileRecord, advance: Callable[[int], None]) -> int:
    """Complete a file, of which an earlier pull may have left the beginning, or all of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with target.open("a+b", buffering=0) as stream:
            have = os.fstat(stream.fileno()).st_size
            advance(have if have <= record.bytes else 0)
            return fetch_file(place, record.path, record.bytes, record.sha256, stream, advance)
    except (CorruptError, MissingError):
        if not is_description(record):
            raise
    return _fetch_edited(place, target, record)


def _fetch_edited(place: RemoteFS, target: Path, record: FileRecord) -> int:
    """Fetch a description whose bytes are not the listed ones; one that is missing is left out."""
    try:
        content = place.read(record.path, 2 * record.bytes + _MOST_ADDED_BYTES)
    except MissingError:
        target.unlink(missing_ok=True)
        return 0
    target.write_bytes(content)
    return len(content)


def _sweep(part: Path, manifest: Manifest) -> None:
    """Remove what an earlier pull left there that is not listed, and all links."""
    wanted = {record.path for record in manifest.files}
    for path in sorted(part.rglob("*"), reverse=True):  # what is in a folder before the folder
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):  # it holds something
                path.rmdir()
        elif path.is_symlink() or path.relative_to(part).as_posix() not in wanted:
            path.unlink()


def _already_there(folder: Path, manifest: Manifest, url: str) -> Transfer:
    try:
        same = folder.is_dir() and set(_strict(read_manifest(folder))) == set(_strict(manifest))
    except LsmixError:
        same = False
    if not same:
        raise RecipeError(f"{str(folder)!r} holds something else. Choose another folder, or move it away.")
    try:
        verify_files(folder, manifest)
    except CorruptError as error:
        raise CorruptError(
            f"{str(folder)!r} is there already, and damaged: {error} Remove it and pull again."
        ) from error
    return _result(manifest, str(folder), url, [0] * len(manifest.files))


def _manifest_there(place: RemoteFS) -> Manifest | None:
    try:
        return fetch_manifest(place)[0]
    except MissingError:
        return None


def _strict(manifest: Manifest) -> list[FileRecord]:
    """Return the files that make an artifact what it is; its descriptions may differ."""
    return [file for file in manifest.files if not is_description(file)]


def folder_name(url: str) -> str:
    """Return the name of a folder for the artifact at a URL: the URL's last part.

    Raises:
        RecipeError: that is no name for a folder.
    """
    name = unquote(urlsplit(url).path.rstrip("/").rpartition("/")[2] or urlsplit(url).netloc)
    if name in ("", ".", "..") or "/" in name or not name.isprintable():
        raise RecipeError(f"{url!r} does not end in a name that a folder could have. Say where to put the artifact.")
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
