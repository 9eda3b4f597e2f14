"""The workspace: a folder of artifacts, ``<workspace>/<stage>/<name>-<key>/``.

What an artifact is called by is its key; the name is for people. So an artifact that another recipe made of the same
contents is found and used, whatever it is named.
"""

import contextlib
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lsmix.data.artifact import MANIFEST_NAME, Artifact, Manifest, read_manifest
from lsmix.data.atomic import folder_bytes
from lsmix.data.errors import CorruptError, LsmixError, MissingError
from lsmix.data.progress import Progress
from lsmix.data.store import open_artifact
from lsmix.pipeline.workspace.cache_key import SourceDigests, is_key
from lsmix.pipeline.workspace.locks import artifact_lock, removal_lock

__all__ = ["Entry", "Workspace", "check_identity", "pool_inputs"]

_STAGE_OF_ROLE = {"latents": "encode", "flow": "train-glow", "dataset": "ingest"}  # of a pool's inputs


class Entry(NamedTuple):
    """A folder of an artifact or of unfinished work."""

    name: str  # of the artifact, in the recipe
    cache_key: str
    folder: Path  # on this machine
    location: str  # the folder, or its URL
    bytes: int


class Workspace:
    """The artifacts below a folder; the folder is made when something is first written.

    ``lsmix.pipeline.workspace.remote`` has one whose artifacts are stored at a URL.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    @property
    def location(self) -> str:
        """What the user calls it: its folder, or its URL."""
        return str(self.root)

    def url_of(self, folder: Path) -> str:
        """Return the URL of the artifact in a folder of this workspace; "" in a workspace on this machine."""
        return ""

    def exists(self, folder: Path) -> bool:
        """Tell whether there is an artifact, be it whole or damaged, called as a folder of this workspace."""
        return (folder / MANIFEST_NAME).is_file()

    def local_copy(self, artifact: Artifact) -> Path:
        """Return a folder on this machine that holds all files of an artifact."""
        return artifact.folder

    def upload(self, artifact: Artifact, progress: Progress) -> Artifact:
        """Bring a finished artifact to where others find it."""
        return artifact

    @property
    def sources(self) -> SourceDigests:
        """The remembered checksums of source files."""
        return SourceDigests(self.root / ".sources.json")

    def folder(self, stage: str, name: str, key: str) -> Path:
        """Return the folder of an artifact: the one that is there under this key, else a new one with this name."""
        there = sorted((self.root / stage).glob(f"*-{key}"))
        return there[0] if there else self.root / stage / f"{name}-{key}"

    def find(self, stage: str, key: str) -> Artifact | None:
        """Return the complete artifact of a stage with this key, or None.

        Raises:
            CorruptError: it is there, but a file is missing or has another size, or its manifest is another artifact's.
        """
        for folder in sorted((self.root / stage).glob(f"*-{key}")):
            if not (folder / MANIFEST_NAME).is_file():
                continue
            try:
                found = open_artifact(folder)
                check_identity(found, stage, key)
            except (CorruptError, MissingError):
                if (folder / MANIFEST_NAME).is_file():  # else it was removed meanwhile
                    raise
                continue
            return found
        return None

    def remove(self, folder: Path, key: str, label: str) -> None:
        """Remove an artifact or unfinished work, so that what is half removed is never read.

        Raises:
            LockedError: another run works on it, or reads it.
        """
        with artifact_lock(self.root, key, label), removal_lock(self.root, key, label):
            (folder / MANIFEST_NAME).unlink(missing_ok=True)  # first: without it the rest is no artifact
            while folder.is_dir():
                with contextlib.suppress(FileNotFoundError):  # another process removes it, too
                    shutil.rmtree(folder)

    def folders(self, stage: str) -> Iterator[Path]:
        """Go through all folders of a stage, complete or not, oldest first."""
        below = []
        for path in (self.root / stage).glob("*-*"):
            with contextlib.suppress(FileNotFoundError):  # others remove folders meanwhile
                facts = path.stat()
                if stat.S_ISDIR(facts.st_mode):
                    below.append((facts.st_mtime_ns, path.name, path))
        yield from (path for _, _, path in sorted(below))

    def entries(self, stage: str) -> Iterator[Entry]:
        """Go through the artifacts and the unfinished work of a stage with their sizes, links excepted."""
        for folder in self.folders(stage):
            name, _, key = folder.name.rpartition("-")
            if is_key(key) and not folder.is_symlink():
                yield Entry(name, key, folder, str(folder), folder_bytes(folder))

    def manifests(self, stage: str) -> Iterator[tuple[Path, Manifest]]:
        """Go through the complete artifacts of a stage, oldest first; unreadable ones are passed over."""
        for folder in self.folders(stage):
            if (folder / MANIFEST_NAME).is_file():
                try:
                    yield folder, read_manifest(folder)
                except LsmixError:
                    continue


def check_identity(artifact: Artifact, stage: str, key: str) -> None:
    """Raise CorruptError if an artifact is not the one of a stage with this key."""
    manifest = artifact.manifest
    if (manifest.stage, manifest.cache_key) != (stage, key):
        raise CorruptError(
            f"{artifact.location!r} holds {manifest.stage} {manifest.cache_key} by its manifest: it was moved there. "
            "Give it its own name again, or remove it."
        )


def pool_inputs(pool: Artifact) -> dict[str, Artifact] | None:
    """Return what a pool was made from, by role; None unless its own workspace, on this machine, has all of it."""
    if not pool.is_local:
        return None
    workspace, found = Workspace(pool.folder.resolve().parent.parent), {}
    for record in pool.manifest.inputs:
        try:
            there = workspace.find(_STAGE_OF_ROLE.get(record.role, record.role), record.cache_key)
        except LsmixError:
            return None
        if there is None or there.manifest.content_digest != record.content_digest:
            return None
        found[record.role] = there
    return found if "dataset" in found or {"latents", "flow"} <= found.keys() else None
