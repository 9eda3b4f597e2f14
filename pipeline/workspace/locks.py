"""Kernel locks on artifacts.

A run that makes or removes an artifact takes an exclusive lock; the tasks of a job array take a shared lock. Runs also
lock their inputs, so that no other process removes them. The kernel releases a lock when its process ends.
"""

import contextlib
import hashlib
import os
import re
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Annotated, Any

import msgspec

from lsmix.data.artifact import MANIFEST_NAME, Artifact
from lsmix.data.atomic import DECODE_ERRORS, locked_file
from lsmix.data.cache import cache_folder, private_folder
from lsmix.data.errors import LockedError, MissingError, escape_terminal

__all__ = ["InputLocks", "LockInfo", "Owner", "artifact_lock", "removal_lock", "work_root", "working_owners"]

_FOLDER = ".locks"
_NOTE_BYTES = 4096


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """The process that works on an artifact, and its progress; stored in a note next to the lock."""

    user: str
    host: str
    process: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]  # PID; numbers below 1 would mean process groups
    since: str  # ISO 8601
    done: int = 0  # units of work
    total: int = 0  # 0 if nothing is being counted
    unit: str = ""  # "image", "iteration", …
    per_second: float = 0.0
    seconds_left: float | None = None

    def __str__(self) -> str:
        text = f"user {self.user[:50]}, host {self.host[:100]}, process {self.process}, since {self.since[:50]}"
        return escape_terminal(text)  # other users may have written the note


class LockInfo:
    """The note of this process next to its lock. It is informative only, so errors while writing it are ignored."""

    def __init__(self, path: Path) -> None:
        self._path = path
        user = os.environ.get("USER") or os.environ.get("LOGNAME") or str(os.getuid())
        since = datetime.now(UTC).isoformat(timespec="seconds")
        self._owner = Owner(user=user, host=socket.gethostname(), process=os.getpid(), since=since)

    def write(self, **facts: int | float | str | None) -> None:
        """Write the note with the current progress."""
        temporary = self._path.with_suffix(".new")
        with contextlib.suppress(OSError):
            temporary.write_bytes(msgspec.json.encode(msgspec.structs.replace(self._owner, **facts)))
            temporary.replace(self._path)

    def remove(self) -> None:
        """Remove the note."""
        for path in (self._path, self._path.with_suffix(".new")):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def work_root(url: str) -> Path:
    """Return the local cache folder for the locks and unfinished work of the workspace at a URL."""
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", url)[-40:].strip("-.")
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    return private_folder(cache_folder(), "workspaces") / f"{name}-{digest}"


@contextmanager
def artifact_lock(workspace: Path, key: str, label: str, *, shared: bool = False) -> Iterator[LockInfo]:
    """Hold the lock of the artifact with this key; messages call the artifact ``label``.

    Array tasks, which write the same bytes, hold it together with ``shared=True``.

    Raises:
        LockedError: Another run holds the lock; the message names its user, host, process and start.
    """
    folder = workspace / _FOLDER
    with ExitStack() as stack:
        try:
            lock = stack.enter_context(_lock(workspace, f"{key}.lock", shared=shared))
        except LockedError as error:
            owners = "; ".join(map(str, working_owners(workspace, key))) or "owner unknown"
            raise LockedError(
                f"{label} in {str(workspace)!r} is being made by another run ({owners}). Wait for it to end, or stop it."
            ) from error
        if not shared:  # no other process works on it, so these notes are left by killed processes
            for other in folder.glob(f"{key}.*owner.json"):
                with contextlib.suppress(OSError):
                    other.unlink(missing_ok=True)
        note = LockInfo(folder / f"{key}.{socket.gethostname()}.{os.getpid()}-{lock.fileno()}.owner.json")
        stack.callback(note.remove)
        note.write()
        yield note


def _lock(workspace: Path, name: str, **options: Any) -> AbstractContextManager[IO[bytes]]:
    folder = workspace / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    return locked_file(folder / name, **options)  # never removed


def removal_lock(workspace: Path, key: str, label: str) -> AbstractContextManager[IO[bytes]]:
    """Return the lock for removing an artifact; entering it raises LockedError while a run reads the artifact."""
    message = f"{label} in {str(workspace)!r} is being read by another run. Wait for it to end, or stop it."
    return _lock(workspace, f"{key}.inuse.lock", message=message)


class InputLocks(ExitStack):
    """Locks on the artifacts that a run reads, held until the run ends, so that no other process removes them."""

    def __init__(self) -> None:
        super().__init__()
        self._held: set[str] = set()

    def hold(self, artifact: Artifact) -> None:
        """Prevent processes on this machine from removing an artifact.

        Does nothing for artifacts outside workspaces or in read-only workspaces.

        Raises:
            LockedError: The artifact is being removed.
            MissingError: The artifact was removed.
        """
        manifest = artifact.manifest
        home, stage, name = (str(artifact.folder.resolve()) if artifact.is_local else artifact.url).rsplit("/", 2)
        if artifact.location in self._held or stage != manifest.stage or not name.endswith(f"-{manifest.cache_key}"):
            return
        message = f"{artifact.location!r} is being removed by another process. Run this command again."
        try:
            root = Path(home) if artifact.is_local else work_root(home)
            lock = _lock(root, f"{manifest.cache_key}.inuse.lock", shared=True, message=message)
            self.enter_context(lock)
        except LockedError:
            raise
        except OSError:  # the workspace is not writable, so nothing can be removed
            return
        self._held.add(artifact.location)
        if artifact.is_local and not (artifact.folder / MANIFEST_NAME).is_file():
            raise MissingError(f"{artifact.location!r} was removed by another process. Run this command again.")


def working_owners(workspace: Path, key: str) -> list[Owner]:
    """Return the processes that seem to work on the artifact with this key, without touching the lock.

    Processes on other hosts cannot be checked; they count as working while their notes exist.
    """
    owners = []
    for path in sorted((workspace / _FOLDER).glob(f"{key}.*owner.json")):
        try:
            with path.open("rb") as file:
                owner = msgspec.json.decode(file.read(_NOTE_BYTES), type=Owner)
        except (OSError, *DECODE_ERRORS):
            continue  # removed in between, or damaged; it is informative only
        if owner.host != socket.gethostname() or _is_alive(owner.process):  # killed processes leave their notes
            owners.append(owner)
    return owners


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)  # signal 0 only checks that the process exists
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # the process belongs to another user
    return True
