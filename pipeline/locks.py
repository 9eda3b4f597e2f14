"""Kernel locks on artifacts under work: one run alone makes or removes one, or parts of a job array fill it together.

The one rule: a lock goes with the process that holds it, so a dead owner's lock frees itself.
"""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from lsmix.data.errors import LockedError

__all__ = ["artifact_lock", "working_owners"]

_FOLDER = ".locks"


@contextmanager
def artifact_lock(workspace: Path, key: str, label: str, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of the artifact with this key.

    Args:
        workspace: folder of the artifacts.
        key: of the artifact.
        label: how to call it in a message.
        shared: let others hold it too who ask for it so: for work that is the same bytes whoever does it.

    Raises:
        LockedError: somebody else holds it; the message names owner, host, process and since when.
    """
    folder = workspace / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    # Open to write, as locks on NFS want it; never removed, since a lock on a file without a name locks nobody out.
    handle = os.open(folder / f"{key}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    note = folder / f"{key}.{socket.gethostname()}.{os.getpid()}-{handle}.owner.json"
    try:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owners = "; ".join(working_owners(workspace, key)) or "owner unknown"
            raise LockedError(
                f"{label} in {str(workspace)!r} is being made by another run ({owners}). Wait for it to end, or stop it."
            ) from error
        try:
            note.write_bytes(msgspec.json.encode(_own_facts()))
            yield
        finally:
            note.unlink(missing_ok=True)
    finally:
        os.close(handle)


def working_owners(workspace: Path, key: str) -> list[str]:
    """Return who seems to work on the artifact with this key, a text each; without touching the lock.

    A process on another host cannot be asked, so it counts as working as long as its note lies there.
    """
    owners = []
    for note in sorted((workspace / _FOLDER).glob(f"{key}.*owner.json")):
        try:
            facts = msgspec.json.decode(note.read_bytes(), type=dict[str, str | int])
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            continue  # gone in between, or damaged: it only informs
        process = facts.get("process")
        if facts.get("host") == socket.gethostname() and not (isinstance(process, int) and _is_alive(process)):
            continue  # it was killed and could not take its note away
        told = ", ".join(f"{name} {value}" for name, value in facts.items())
        owners.append("".join(letter for letter in told[:200] if letter.isprintable()))  # anybody may write notes there
    return owners


def _own_facts() -> dict[str, str | int]:
    user = os.environ.get("USER") or os.environ.get("LOGNAME") or str(os.getuid())
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"user": user, "host": socket.gethostname(), "process": os.getpid(), "since": now}


def _is_alive(process: int) -> bool:
    if not 0 < process < 1 << 31:
        return False
    try:
        os.kill(process, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's, but there
    return True
