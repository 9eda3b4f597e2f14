"""The workspace: a folder or URL that contains artifacts as ``<workspace>/<stage>/<name>-<key>/``.

The key identifies an artifact and the name is for people: an artifact with the right key is reused under any name.

A remote workspace stores complete artifacts at its URL and unfinished work in the local cache. Object stores have no
locks: runs on the same machine exclude each other, and runs on different machines write the same bytes.
"""

import contextlib
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lsmix.data.artifact import MANIFEST_NAME, WORK_FOLDER, Artifact, Manifest, read_manifest
from lsmix.data.atomic import folder_bytes
from lsmix.data.cache import RemoteArtifact
from lsmix.data.errors import CorruptError, LockedError, LsmixError, MissingError, RecipeError
from lsmix.data.progress import NullProgress, Progress, pause
from lsmix.data.sharing.hub import open_target
from lsmix.data.sharing.transfer import pull_artifact, push_artifact
from lsmix.data.store import local_folder, open_artifact
from lsmix.pipeline.workspace.cache_key import SourceDigests, is_key
from lsmix.pipeline.workspace.locks import artifact_lock, removal_lock, work_root

__all__ = ["Entry", "Workspace", "artifact_location", "find_artifact"]

_PAUSE_SECONDS = 0.5  # between checks, while another process copies the same artifact
_MIN_DIGITS = 6  # of a cache key that a user may give for an artifact


class Entry(NamedTuple):
    """An artifact or unfinished work in a workspace."""

    name: str  # of the artifact, in the recipe
    cache_key: str
    folder: Path  # on this machine
    location: str  # the folder, or its URL
    manifest: Manifest | None  # None for unfinished work, or if unreadable


class Workspace:
    """The artifacts below a folder, which is created on the first write, or below the URL of an object store.

    Raises:
        RecipeError: URLs of this kind are not supported.
        LsmixError: The cache, which stores unfinished work, is writable by other users.
    """

    def __init__(self, where: Path | str) -> None:
        folder = local_folder(where)
        self.remote = open_target(str(where)) if folder is None else None
        self.location = self.remote.url if self.remote else str(folder)
        self.root = folder or work_root(self.location.rstrip("/"))

    def url_of(self, folder: Path) -> str:
        """Return the URL of the artifact that is made in ``folder``; "" in a local workspace."""
        return f"{self.location.rstrip('/')}/{folder.parent.name}/{folder.name}" if self.remote else ""

    @property
    def sources(self) -> SourceDigests:
        """The cached checksums of source files."""
        return SourceDigests(self.root / ".sources.json")

    def folder(self, stage: str, name: str, key: str) -> Path:
        """Return the folder of the artifact with this key, local or remote; by default a new one with this name."""
        names = [other for other in self._remote_names(stage) if other.endswith(f"-{key}")]
        names += sorted(folder.name for folder in (self.root / stage).glob(f"*-{key}"))
        return self.root / stage / (names[0] if names else f"{name}-{key}")

    def exists(self, folder: Path) -> bool:
        """Return whether a folder of this workspace, or its URL, contains an artifact, complete or damaged."""
        if (folder / MANIFEST_NAME).is_file():
            return True
        return self.remote is not None and self.remote.size(_path(folder, MANIFEST_NAME)) is not None

    def find(self, stage: str, key: str) -> Artifact | None:
        """Return the complete artifact of a stage with this key, or None. Prefer the remote copy to the local one.

        Raises:
            CorruptError: A file is missing or has the wrong size, or the manifest belongs to another artifact.
            DownloadError: The URL cannot be reached.
        """
        for name in self._remote_names(stage):
            artifact = self._open_remote(stage, name) if name.endswith(f"-{key}") else None
            if artifact:
                _check_identity(artifact, stage, key)
                self._check_sizes(f"{stage}/{name}", artifact)
                return artifact
        for folder in sorted((self.root / stage).glob(f"*-{key}")):
            if not (folder / MANIFEST_NAME).is_file():
                continue
            try:
                found = open_artifact(folder)
                _check_identity(found, stage, key)
            except (CorruptError, MissingError):
                if (folder / MANIFEST_NAME).is_file():  # otherwise another process just removed it
                    raise
                continue
            return found
        return None

    def remove(self, folder: Path, key: str, label: str) -> None:
        """Remove an artifact or unfinished work, manifest first, so that a partly removed artifact is never read.

        Raises:
            LockedError: Another run on this machine works on the artifact or reads it.
        """
        with artifact_lock(self.root, key, label), removal_lock(self.root, key, label):
            if self.remote:
                self.remote.remove(_path(folder, MANIFEST_NAME))
                self._clear(_path(folder))
            (folder / MANIFEST_NAME).unlink(missing_ok=True)
            while folder.is_dir():
                with contextlib.suppress(FileNotFoundError):  # another process is also removing it
                    shutil.rmtree(folder)

    def entries(self, stage: str) -> Iterator[Entry]:
        """Yield the artifacts and unfinished work of a stage: remote ones, then local ones, oldest first."""
        names = self._remote_names(stage)
        for name in names:
            entry = self._entry(self.root / stage / name, self.url_of(self.root / stage / name))
            if entry and (entry.manifest or self.size(entry)):  # some stores list folders without files
                yield entry
        for folder in self._folders(stage):
            entry = self._entry(folder, str(folder)) if folder.name not in names else None
            if entry:
                yield entry

    def _entry(self, folder: Path, location: str) -> Entry | None:
        """Return the entry of a folder or its URL; None if the folder's name has no key."""
        name, _, key = folder.name.rpartition("-")
        if not is_key(key):
            return None
        try:
            manifest = read_manifest(folder) if location == str(folder) else open_artifact(location).manifest
        except LsmixError:
            manifest = None
        return Entry(name, key, folder, location, manifest)

    def size(self, entry: Entry) -> int:
        """Return the total size in bytes of an artifact or of unfinished work."""
        if self.remote and entry.location != str(entry.folder):
            return sum(self.remote.sizes(_path(entry.folder)).values())
        return folder_bytes(entry.folder)

    def folder_names(self, stage: str) -> list[str]:
        """Return the names of all folders of a stage, remote and local, complete or not."""
        return list(dict.fromkeys([*self._remote_names(stage), *(folder.name for folder in self._folders(stage))]))

    def manifests(self, stage: str) -> Iterator[tuple[Path, Manifest]]:
        """Yield folder and manifest of each complete artifact of a stage, in the order of ``entries``."""
        return ((entry.folder, entry.manifest) for entry in self.entries(stage) if entry.manifest)

    def find_content(self, stage: str, content_digest: str) -> Artifact | None:
        """Return the artifact of a stage with this content digest, or None; a file of a wrong size disqualifies it."""
        for entry in self.entries(stage):
            if entry.manifest and entry.manifest.content_digest == content_digest:
                with contextlib.suppress(LsmixError):
                    return open_artifact(entry.location)
        return None

    def local_copy(self, artifact: Artifact) -> Path:
        """Return a local folder with all files of an artifact; a remote artifact is downloaded and checked first.

        Raises:
            CorruptError, DiskSpaceError, DownloadError: As in ``pull_artifact``.
        """
        if artifact.is_local:
            return artifact.folder
        manifest = artifact.manifest
        folder = self.root / "copies" / f"{manifest.stage}-{manifest.name}-{manifest.content_digest}"
        while True:
            try:
                pull_artifact(artifact.url, folder, NullProgress())
            except LockedError:
                pause(_PAUSE_SECONDS)
            except LsmixError:
                if not folder.exists():
                    raise
                shutil.rmtree(folder)  # the local copy was damaged
            else:
                return folder

    def upload(self, artifact: Artifact, progress: Progress) -> Artifact:
        """Upload a complete artifact to the URL, unless another machine already has; return the remote artifact.

        Raises:
            CorruptError: The artifact at the URL has other contents, for example from another kind of device.
            DownloadError: The URL cannot be reached; the next run uploads the rest.
        """
        if self.remote is None or not artifact.is_local:
            return artifact
        folder = artifact.folder
        sent = self._open_remote(folder.parent.name, folder.name)
        if sent is None:
            push_artifact(artifact, self.url_of(folder), progress, owned=True)
            self._clear(_path(folder, WORK_FOLDER))
            sent = open_artifact(self.url_of(folder))
        elif sent.manifest.content_digest != artifact.manifest.content_digest:
            raise CorruptError(
                f"another run has written {sent.location!r} with content digest {sent.manifest.content_digest[:12]} instead of "
                f"{artifact.manifest.content_digest[:12]}, maybe on another kind of device. To use it, remove {str(folder)!r}."
            )
        elif set(sent.manifest.files) != set(artifact.manifest.files):  # the dataset cards may differ
            shutil.rmtree(folder)
            return sent
        if isinstance(sent, RemoteArtifact):
            for record in artifact.manifest.files:
                sent.adopt(record, folder / record.path)
        shutil.rmtree(folder)
        return sent

    def _folders(self, stage: str) -> list[Path]:
        """Return all local folders of a stage, complete or not, oldest first."""
        below = []
        for path in (self.root / stage).glob("*-*"):
            with contextlib.suppress(FileNotFoundError):  # another process may remove folders
                facts = path.stat()
                if stat.S_ISDIR(facts.st_mode):
                    below.append((facts.st_mtime_ns, path))
        return [path for _, path in sorted(below)]

    def _remote_names(self, stage: str) -> list[str]:
        entries = self.remote.entries(stage) if self.remote else {}
        return sorted(name for name, is_folder in entries.items() if is_folder)

    def _open_remote(self, stage: str, name: str) -> Artifact | None:
        try:
            return open_artifact(self.url_of(self.root / stage / name))
        except MissingError:
            return None

    def _clear(self, path: str) -> None:
        """Remove all files below a folder at the URL."""
        if self.remote:
            self.remote.update({}, [f"{path}/{name}" for name in self.remote.sizes(path)])

    def _check_sizes(self, path: str, artifact: Artifact) -> None:
        found = self.remote.sizes(path) if self.remote else {}
        for file in artifact.manifest.files:
            if found.get(file.path) != file.bytes:
                got = "no file" if file.path not in found else f"{found[file.path]:,} bytes"
                raise CorruptError(
                    f"{artifact.where(file.path)!r} is damaged: expected {file.bytes:,} bytes, got {got}. Rerun its stage with '--force'."
                )


def _path(folder: Path, *names: str) -> str:
    """Return the path, relative to the workspace, of a folder or a file in it."""
    return "/".join([folder.parent.name, folder.name, *names])


def _check_identity(artifact: Artifact, stage: str, key: str) -> None:
    """Raise CorruptError unless the manifest names this stage and key."""
    manifest = artifact.manifest
    if (manifest.stage, manifest.cache_key) != (stage, key):
        raise CorruptError(
            f"{artifact.location!r} contains another artifact: its manifest says {manifest.stage} {manifest.cache_key}. "
            "Move it back to its own folder, or remove it."
        )


def find_artifact(name: str, workspace: Workspace, stages: Sequence[str]) -> Artifact | None:
    """Return the complete artifact that a user named; None if there is none.

    Args:
        name: Name of the artifact, name of its folder, or at least six digits of its cache key; optionally after the
            stage, as in "mix/lsmix".
        workspace: The workspace to search.
        stages: The stages to search.

    Raises:
        RecipeError: Several artifacts match.
        CorruptError: The artifact is damaged.
    """
    stage, _, label = name.rpartition("/")
    matches = [
        (each, folder)
        for each in stages
        for folder in workspace.folder_names(each)
        if stage in ("", each) and _matches(label, folder) and workspace.exists(workspace.root / each / folder)
    ]
    if len(matches) > 1:
        several = ", ".join(f"{each}/{folder}" for each, folder in matches)
        raise RecipeError(f"{name!r} matches several artifacts: {several}. Give the cache key of one of them.")
    return workspace.find(matches[0][0], matches[0][1].rpartition("-")[2]) if matches else None


def _matches(label: str, folder: str) -> bool:
    name, _, key = folder.rpartition("-")
    is_start = len(label) >= _MIN_DIGITS and key.startswith(label)
    return is_key(key) and (label in (name, folder) or is_start)


def artifact_location(name: str, workspace: str, stages: Sequence[str]) -> str:
    """Return the location of the artifact that a user named; return paths, URLs and unknown names unchanged."""
    path = local_folder(name)
    if path is None or path.exists() or len(Path(name).parts) > 2:
        return name
    found = find_artifact(name, Workspace(workspace), stages)
    return found.location if found else name
