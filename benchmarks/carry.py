"""Files of a workspace as pieces under 16 MiB with checksums, for machines that keep nothing between two calls."""

import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path

__all__ = ["PIECE_BYTES", "join", "split"]

PIECE_BYTES = 15 << 20
_INDEX = "index.json"


def split(root: Path, files: Iterable[Path], target: Path, *, piece_bytes: int = PIECE_BYTES) -> None:
    """Write files below ``root`` to ``target`` as pieces, and an index; pieces of an earlier call that differ go.

    A piece is named by its SHA-256, so files that have not changed are not written again.
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
    """Write the files that ``split`` took below ``root`` again, in their order; return the names of those written.

    Files that are there already are newer or the same, and stay.

    Raises:
        SystemExit: a piece is missing or damaged; no part of its file is written then.
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
        sys.exit(f"{str(path)!r} is missing or damaged. Copy it again, or remove its folder to start from nothing.")
    return content


def _write(path: Path, content: bytes, *, replace: bool = False) -> None:
    if replace or not path.is_file():
        part = path.with_name(f".{path.name}.part")
        part.write_bytes(content)
        part.replace(path)
