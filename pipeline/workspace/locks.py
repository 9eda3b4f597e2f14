"""Kernel locks on artifacts: one run alone makes or removes one, or parts of a job array fill it together.

Runs also lock what they read, so that it is not removed under them.

A lock goes with the process that holds it, so a dead owner's lock frees itself.
"""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec

from lsmix.data.artifact import MANIFEST_NAME, Artifact
from lsmix.data.atomic import DECODE_ERRORS
from lsmix.data.errors import LockedError, MissingError, escape_terminal

__all__ = ["InputLocks", "LockInfo", "Owner", "artifact_lock", "removal_lock", "working_owners"]

_FOLDER = ".locks"
_NOTE_BYTES = 4096


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """Who works on an artifact, and how far the work is, as told by a note beside the lock."""

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
        told = f"user {self.user[:50]}, host {self.host[:100]}, process {self.process}, since {self.since[:50]}"
        return escape_terminal(told)  # anybody may write notes there


class LockInfo:
    """The note of this process beside the lock that it holds; it only informs, so that it can't be written is no error."""

    def __init__(self, path: Path) -> None:
        self._path = path
        user = os.environ.get("USER") or os.environ.get("LOGNAME") or str(os.getuid())
        since = datetime.now(UTC).isoformat(timespec="seconds")
        self._owner = Owner(user=user, host=socket.gethostname(), process=os.getpid(), since=since)

    def tell(self, **facts: int | float | str | None) -> None:
        """Write the note anew, with how far the work is."""
        beside = self._path.with_suffix(".new")
        with contextlib.suppress(OSError):
            beside.write_bytes(msgspec.json.encode(msgspec.structs.replace(self._owner, **facts)))
            beside.replace(self._path)

    def remove(self) -> None:
        """Take the note away."""
        for path in (self._path, self._path.with_suffix(".new")):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


@contextmanager
def artifact_lock(workspace: Path, key: str, label: str, *, shared: bool = False) -> Iterator[LockInfo]:
    """Hold the lock of the artifact with this key.

    Args:
        workspace: folder of the artifacts.
        key: of the artifact.
        label: how to call it in a message.
        shared: let others hold it too who ask for it so: for work that is the same bytes whoever does it.

    Raises:
        LockedError: somebody else holds it; the message names owner, host, process and since when.
    """
    folder, handle = workspace / _FOLDER, _open_lock(workspace, f"{key}.lock")
    note = LockInfo(folder / f"{key}.{socket.gethostname()}.{os.getpid()}-{handle}.owner.json")
    try:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owners = "; ".join(map(str, working_owners(workspace, key))) or "owner unknown"
            raise LockedError(
                f"{label} in {str(workspace)!r} is being made by another run ({owners}). Wait for it to end, or stop it."
            ) from error
        try:
            if not shared:  # nobody else works on it, whatever notes killed processes have left
                for other in folder.glob(f"{key}.*owner.json"):
                    with contextlib.suppress(OSError):
                        other.unlink(missing_ok=True)
            note.tell()
            yield note
        finally:
            note.remove()
    finally:
        os.close(handle)


def _open_lock(workspace: Path, name: str) -> int:
    folder = workspace / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    # Open to write, as locks on NFS want it; never removed, since a lock on a file without a name locks nobody out.
    return os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


@contextmanager
def removal_lock(workspace: Path, key: str, label: str) -> Iterator[None]:
    """Hold the lock that allows an artifact to be removed, while no run reads it.

    Raises:
        LockedError: a run reads it.
    """
    handle = _open_lock(workspace, f"{key}.inuse.lock")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise LockedError(
            f"{label} in {str(workspace)!r} is read by another run. Wait for that to end, or stop it."
        ) from error
    finally:
        os.close(handle)


class InputLocks:
    """Locks on artifacts that a run reads, so that nobody removes them; each is held until the end of the run."""

    def __init__(self) -> None:
        self._handles: dict[Path, int] = {}

    def __enter__(self) -> "InputLocks":
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles.values():
            os.close(handle)

    def hold(self, artifact: Artifact) -> None:
        """Keep an artifact from being removed; one that lies in no workspace, or in a read-only one, is left as it is.

        Raises:
            LockedError: it is being removed.
            MissingError: it was removed.
        """
        place, manifest = artifact.folder.resolve(), artifact.manifest
        if place in self._handles or place.parent.name != manifest.stage or not place.name.endswith(f"-{manifest.key}"):
            return
        try:
            handle = _open_lock(place.parent.parent, f"{manifest.key}.inuse.lock")
        except OSError:
            return
        self._handles[place] = handle
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LockedError(f"{artifact.location!r} is being removed by another process. Run this again.") from error
        if not artifact.url and not (place / MANIFEST_NAME).is_file():
            raise MissingError(f"{artifact.location!r} was removed by another process. Run this again.")


def working_owners(workspace: Path, key: str) -> list[Owner]:
    """Return who seems to work on the artifact with this key; without touching the lock.

    A process on another host cannot be asked, so it counts as working as long as its note lies there.
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
        return True  # somebody else's, but there
    return True
