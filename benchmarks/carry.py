"""Split the files of a workspace into checksummed pieces under 16 MiB, for machines that keep no files."""

import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path

__all__ = ["PIECE_BYTES", "join", "split"]

PIECE_BYTES = 15 << 20
_INDEX = "index.json"


def split(root: Path, files: Iterable[Path], target: Path, *, piece_bytes: int = PIECE_BYTES) -> None:
    """Write files below ``root`` to ``target`` as pieces with an index, and remove the pieces that are no longer used.

    A piece is named by its SHA-256, so unchanged files are not written again.
    """
    target.mkdir(parents=True, exist_ok=True)
    index: dict[str, list[str]] = {}
    for path in files:
        names = index[path.relative_to(root).as_posix()] = []
        with path.open("rb") as file:
            while piece := file.read(piece_bytes):
                names.append(f"{hashlib.sha256(piece).hexdigest()}.piece")
                _write(target / names[-1], piece)
    _write(target / _INDEX, json.dumps(index, indent=1).encode(), replace=True)
    used = {name for names in index.values() for name in names}
    for path in target.glob("*.piece"):
        if path.name not in used:
            path.unlink()


def join(target: Path, root: Path) -> list[str]:
    """Restore the files that ``split`` wrote below ``root``, in order, and return the names of the restored files.

    Existing files are kept, since they are the same or newer.

    Raises:
        SystemExit: A piece is missing or damaged; its file is not written.
    """
    if not (target / _INDEX).is_file():
        return []
    written = []
    for name, pieces in json.loads((target / _INDEX).read_text(encoding="utf-8")).items():
        path = root / name
        if path.is_file():
            continue
        content = b"".join(_read(target / piece) for piece in pieces)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, content)
        written.append(name)
    return written


def _read(path: Path) -> bytes:
    content = path.read_bytes() if path.is_file() else b""
    if f"{hashlib.sha256(content).hexdigest()}.piece" != path.name:
        sys.exit(f"{str(path)!r} is missing or damaged. Copy it again, or remove its folder to start over.")
    return content


def _write(path: Path, content: bytes, *, replace: bool = False) -> None:
    if replace or not path.is_file():
        part = path.with_name(f".{path.name}.part")
        part.write_bytes(content)
        part.replace(path)
