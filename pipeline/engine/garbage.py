"""What a recipe no longer wants: artifacts of other settings, and unfinished work that nobody goes on with."""

import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from lsmix.data.artifact import ARTIFACT_FILES, Artifact
from lsmix.data.errors import LockedError
from lsmix.pipeline.engine.resolver import Resolver
from lsmix.pipeline.engine.stage import Node
from lsmix.pipeline.workspace.cache_key import KEY_DIGITS
from lsmix.pipeline.workspace.local import Workspace

__all__ = ["Garbage", "collect_garbage"]


class Garbage(msgspec.Struct, frozen=True, kw_only=True):
    """A folder that no recipe wants."""

    folder: str
    bytes: int
    removed: bool  # False where it was only listed, or another run works on it


def collect_garbage(nodes: Sequence[Node], workspace: Workspace, *, delete: bool) -> list[Garbage]:
    """List the folders that none of ``nodes`` wants; remove them if ``delete``, but none that is being worked on.

    Unfinished work of wanted artifacts is kept, so that it can go on.
    """
    resolver = Resolver(workspace)
    wanted = {resolver.key(node) for node in nodes}
    # What an artifact is made from may be gone or on its way: then its key is unknown, and its name decides.
    unknown = {(node.stage.name, node.name) for node in nodes if resolver.key(node) is None}
    given = [source for node in nodes for source in node.inputs.values() if isinstance(source, Artifact)]
    outside = {str(source.folder.resolve()) if source.is_local else source.url for source in given}
    found = []
    for stage in ARTIFACT_FILES:
        for entry in workspace.entries(stage):
            name, _, key = entry.name.rpartition("-")
            if not re.fullmatch(f"[0-9a-f]{{{KEY_DIGITS}}}", key):
                continue  # not made by lsmix
            folder = workspace.root / stage / entry.name
            if key in wanted or (stage, name) in unknown or {str(folder.resolve()), entry.location} & outside:
                continue
            removed = delete and _remove_unlocked(workspace, folder, key)
            found.append(Garbage(folder=entry.location, bytes=entry.bytes, removed=removed))
    return found


def _remove_unlocked(workspace: Workspace, folder: Path, key: str) -> bool:
    try:
        workspace.remove(folder, key, folder.name)
    except LockedError:
        return False
    return True
