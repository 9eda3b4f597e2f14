"""One run at a time works on an artifact: a kernel lock that a dead owner's end frees by itself."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from lsmix.data.errors import LockedError

__all__ = ["artifact_lock", "working_owner"]


@contextmanager
def artifact_lock(workspace: Path, key: str, label: str) -> Iterator[None]:
    """Hold the lock of the artifact with this key.

    Raises:
        LockedError: somebody else holds it; the message names owner, host, process and since when.
    """
    folder = workspace / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    owner_file = folder / f"{key}.owner.json"
    lock = FileLock(folder / f"{key}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise LockedError(
            f"{label} in {str(workspace)!r} is being made by another run ({_owner(owner_file)}). "
            "Wait for it to end, or stop it."
        ) from error
    try:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        user = os.environ.get("USER") or os.environ.get("LOGNAME") or str(os.getuid())
        owner = {"user": user, "host": socket.gethostname(), "process": os.getpid(), "since": now}
        owner_file.write_bytes(msgspec.json.encode(owner))
        yield
    finally:
        owner_file.unlink(missing_ok=True)
        lock.release()


def working_owner(workspace: Path, key: str) -> str:
    """Return who seems to work on the artifact with this key, or "" if nobody does; without touching the lock.

    A process on another host cannot be asked, so it counts as working as long as its note lies there.
    """
    owner_file = workspace / ".locks" / f"{key}.owner.json"
    try:
        facts = msgspec.json.decode(owner_file.read_bytes(), type=dict[str, str | int])
    except (OSError, msgspec.MsgspecError):
        return ""
    if facts.get("host") == socket.gethostname() and not _is_alive(int(facts.get("process", 0))):
        return ""  # it was killed and could not take its note away
    return _owner(owner_file)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's, but there
    return True


def _owner(owner_file: Path) -> str:
    try:
        facts = msgspec.json.decode(owner_file.read_bytes(), type=dict[str, str | int])
    except (OSError, msgspec.MsgspecError):
        return "owner unknown"
    return ", ".join(f"{name} {value}" for name, value in facts.items())
