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

__all__ = ["artifact_lock"]


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


def _owner(owner_file: Path) -> str:
    try:
        facts = msgspec.json.decode(owner_file.read_bytes(), type=dict[str, str | int])
    except (OSError, msgspec.MsgspecError):
        return "owner unknown"
    return ", ".join(f"{name} {value}" for name, value in facts.items())
