"""Make a folder that gets its name only when it is complete.

The work is in ``NAME.part`` beside it, marked and locked by the kernel: the remains of a killed process are replaced, other folders
never.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lsmix.data.atomic import fsync_folder, fsync_tree, locked_file
from lsmix.data.errors import DiskSpaceError, MissingError, RecipeError

__all__ = ["check_space", "folder_beside"]

_MARK = ".lsmix-unfinished"
_CONTENT = "content"


@contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """Give an empty folder to write to, which becomes ``target`` at the end, or vanishes if something is raised.

    Raises:
        RecipeError: there is something at ``target``, or something that is not ours where the work would lie.
        MissingError: there is no folder to put it in.
        LockedError: somebody else is making it.
    """
    if os.path.lexists(target):
        raise RecipeError(
            f"{str(target)!r} is there already, and nothing is overwritten. Remove it, or choose another."
        )
    if not target.parent.is_dir():
        raise MissingError(f"there is no folder {str(target.parent)!r} to write {target.name!r} to. Make it first.")
    part = target.with_name(f"{target.name}.part")
    if os.path.lexists(part) and not _is_ours(part):
        raise RecipeError(f"{str(part)!r} is in the way, and was not made by lsmix. Rename or remove it.")
    part.mkdir(exist_ok=True)
    try:
        with locked_file(part / _MARK):
            _clear(part)
            try:
                content = part / _CONTENT
                content.mkdir()
                yield content
                fsync_tree(content)
                content.rename(target)
                fsync_folder(target.parent)
            finally:
                _clear(part)
                (part / _MARK).unlink(missing_ok=True)
    finally:
        with contextlib.suppress(OSError):  # another process is making it
            part.rmdir()


def _is_ours(part: Path) -> bool:
    """Tell whether it was made here: marked, or as empty as it is before it is marked and after the mark is gone."""
    return not part.is_symlink() and part.is_dir() and ((part / _MARK).is_file() or not any(part.iterdir()))


def _clear(part: Path) -> None:
    """Remove everything but the mark, which goes last, so that a folder that is cleared in part is still known as ours."""
    for entry in part.iterdir():
        if entry.name != _MARK:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise DiskSpaceError unless ``needed`` bytes fit on the disk of ``folder``."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskSpaceError(
            f"{what} takes about {needed} bytes, and the disk of {str(folder)!r} has {free} left. "
            "Make room, or choose another disk."
        )
