"""Kernel locks on artifacts: one run alone makes or removes one, or parts of a job array fill it together.

Runs also lock what they read, so that it is not removed under them.

A lock goes with the process that holds it, so a dead owner's lock frees itself.
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
    """Who works on an artifact, and how far the work is: the content of a note beside the lock."""

    user: str
    host: str
    process: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]  # its number; others would mean groups of processes
    since: str  # ISO 8601
    done: int = 0  # units of what is counted now
    total: int = 0  # 0 while nothing is counted
    unit: str = ""  # "image", "iteration", …
    per_second: float = 0.0
    seconds_left: float | None = None

    def __str__(self) -> str:
        text = f"user {self.user[:50]}, host {self.host[:100]}, process {self.process}, since {self.since[:50]}"
        return escape_terminal(text)  # other users may write notes there


class LockInfo:
    """The note of this process beside the lock that it holds; it only informs, so that it can't be written is no error."""

    def __init__(self, path: Path) -> None:
        self._path = path
        user = os.environ.get("USER") or os.environ.get("LOGNAME") or str(os.getuid())
        since = datetime.now(UTC).isoformat(timespec="seconds")
        self._owner = Owner(user=user, host=socket.gethostname(), process=os.getpid(), since=since)

    def write(self, **facts: int | float | str | None) -> None:
        """Write the note, with how far the work is."""
        beside = self._path.with_suffix(".new")
        with contextlib.suppress(OSError):
            beside.write_bytes(msgspec.json.encode(msgspec.structs.replace(self._owner, **facts)))
            beside.replace(self._path)

    def remove(self) -> None:
        """Take the note away."""
        for path in (self._path, self._path.with_suffix(".new")):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def work_root(url: str) -> Path:
    """Return the folder of this machine's cache for the locks and the unfinished work of the workspace at a URL."""
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", url)[-40:].strip("-.")
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    return private_folder(cache_folder(), "workspaces") / f"{name}-{digest}"


@contextmanager
def artifact_lock(workspace: Path, key: str, label: str, *, shared: bool = False) -> Iterator[LockInfo]:
    """Hold the lock of the artifact with this key, which messages call ``label``.

    Others may hold a shared lock, too, if they ask for it shared: array jobs, which write the same bytes.

    Raises:
        LockedError: another run holds it; the message names owner, host, process and since when.
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
        if not shared:  # no other process works on it, so these notes are of killed ones
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
    """Return the lock that allows an artifact to be removed, while no run reads it; entering it may raise LockedError."""
    message = f"{label} in {str(workspace)!r} is read by another run. Wait for that to end, or stop it."
    return _lock(workspace, f"{key}.inuse.lock", message=message)


class InputLocks(ExitStack):
    """Locks on artifacts that a run reads, so that no other process removes them; each is held until the end of the run."""

    def __init__(self) -> None:
        super().__init__()
        self._held: set[str] = set()

    def hold(self, artifact: Artifact) -> None:
        """Keep an artifact from being removed by this machine, unless it is in no workspace, or in a read-only one.

        Raises:
            LockedError: it is being removed.
            MissingError: it was removed.
        """
        manifest = artifact.manifest
        home, stage, name = (str(artifact.folder.resolve()) if artifact.is_local else artifact.url).rsplit("/", 2)
        if artifact.location in self._held or stage != manifest.stage or not name.endswith(f"-{manifest.cache_key}"):
            return
        message = f"{artifact.location!r} is being removed by another process. Run this again."
        try:
            root = Path(home) if artifact.is_local else work_root(home)
            lock = _lock(root, f"{manifest.cache_key}.inuse.lock", shared=True, message=message)
            self.enter_context(lock)
        except LockedError:
            raise
        except OSError:  # it cannot be written to, so nothing is removed there
            return
        self._held.add(artifact.location)
        if artifact.is_local and not (artifact.folder / MANIFEST_NAME).is_file():
            raise MissingError(f"{artifact.location!r} was removed by another process. Run this again.")


def working_owners(workspace: Path, key: str) -> list[Owner]:
    """Return who seems to work on the artifact with this key; without touching the lock.

    A process on another host cannot be asked, so it counts as working as long as its note exists.
    """
    owners = []
    for path in sorted((workspace / _FOLDER).glob(f"{key}.*owner.json")):
        try:
            with path.open("rb") as file:
                owner = msgspec.json.decode(file.read(_NOTE_BYTES), type=Owner)
        except (OSError, *DECODE_ERRORS):
            continue  # gone in between, or damaged: it only informs
        if owner.host != socket.gethostname() or _is_alive(owner.process):  # else killed before it took its note away
            owners.append(owner)
    return owners


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)  # signal 0 only asks
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # another user's
    return True
