"""Artifacts as users name them: by path, URL, name or cache key."""

from collections.abc import Sequence
from pathlib import Path

from lsmix.data.artifact import Artifact
from lsmix.data.errors import RecipeError
from lsmix.data.store import local_folder
from lsmix.pipeline.workspace.cache_key import is_key
from lsmix.pipeline.workspace.workspace import Workspace

__all__ = ["artifact_location", "find_artifact"]

_FEWEST_DIGITS = 6  # of a cache key


def find_artifact(name: str, workspace: Workspace, stages: Sequence[str]) -> Artifact | None:
    """Return the complete artifact of a workspace that a user named; None if there is none.

    Args:
        name: its name, the name of its folder, or the first six digits or more of its cache key; each may begin with the
            stage, as in "mix/lsmix".
        workspace: where to look.
        stages: the stages that may have made it.

    Raises:
        RecipeError: several artifacts fit.
        CorruptError: the artifact is damaged.
    """
    stage, _, label = name.rpartition("/")
    fits = [
        (each, folder)
        for each in stages
        for folder in workspace.folder_names(each)
        if stage in ("", each) and _fits(label, folder) and workspace.exists(workspace.root / each / folder)
    ]
    if len(fits) > 1:
        several = ", ".join(f"{each}/{folder}" for each, folder in fits)
        raise RecipeError(f"{name!r} could be {several}. Name one of them by its cache key.")
    return workspace.find(fits[0][0], fits[0][1].rpartition("-")[2]) if fits else None


def _fits(label: str, folder: str) -> bool:
    name, _, key = folder.rpartition("-")
    is_start = len(label) >= _FEWEST_DIGITS and key.startswith(label)
    return is_key(key) and (label in (name, folder) or is_start)


def artifact_location(name: str, workspace: str, stages: Sequence[str]) -> str:
    """Return the folder or URL of an artifact that a user named, as ``find_artifact``; a path, a URL and an unknown name as it is."""
    path = local_folder(name)
    if path is None or path.exists() or len(Path(name).parts) > 2:
        return name
    found = find_artifact(name, Workspace(workspace), stages)
    return found.location if found else name
