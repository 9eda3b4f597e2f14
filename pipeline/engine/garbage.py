"""Garbage collection: artifacts of other settings, and unfinished work that no recipe can resume."""

from collections.abc import Sequence

import msgspec

from lsmix.data.artifact import ARTIFACT_FILES, Artifact
from lsmix.data.errors import LockedError
from lsmix.pipeline.engine.resolver import Resolver
from lsmix.pipeline.engine.stage import Node
from lsmix.pipeline.workspace.workspace import Entry, Workspace

__all__ = ["Garbage", "collect_garbage"]


class Garbage(msgspec.Struct, frozen=True, kw_only=True):
    """A folder that no recipe needs."""

    folder: str
    bytes: int
    removed: bool  # False if it was only listed, or is in use


def collect_garbage(nodes: Sequence[Node], workspace: Workspace, *, delete: bool) -> list[Garbage]:
    """List the folders that none of ``nodes`` needs; with ``delete``, remove those that no run is using.

    Unfinished work of needed artifacts is kept, so that it can be resumed.
    """
    resolver = Resolver(workspace)
    wanted = {resolver.key(node) for node in nodes}
    # While an input is missing the key is unknown; then all artifacts of that stage and name are kept.
    unknown = {(node.stage.name, node.name) for node in nodes if resolver.key(node) is None}
    given = [source for node in nodes for source in node.inputs.values() if isinstance(source, Artifact)]
    outside = {str(source.folder.resolve()) if source.is_local else source.url for source in given}
    found = []
    for stage in ARTIFACT_FILES:
        for entry in workspace.entries(stage):
            places = {str(entry.folder.resolve()), entry.location}
            if (
                entry.cache_key in wanted
                or (stage, entry.name) in unknown
                or places & outside
                or entry.folder.is_symlink()
            ):
                continue
            size = workspace.size(entry)
            removed = delete and _remove_unlocked(workspace, stage, entry)
            found.append(Garbage(folder=entry.location, bytes=size, removed=removed))
    return found


def _remove_unlocked(workspace: Workspace, stage: str, entry: Entry) -> bool:
    try:
        workspace.remove(entry.folder, entry.cache_key, f"{stage} {entry.name}")
    except LockedError:
        return False
    return True
