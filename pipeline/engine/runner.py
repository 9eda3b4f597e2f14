"""The runner: brings artifacts up to date, one after another. Artifacts that are up to date are not changed.

The manifest makes an artifact visible and is written after all other files. So an interrupted run leaves only complete
artifacts, and unfinished work that the next run resumes.
"""

import contextlib
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from lsmix.data.artifact import WORK_FOLDER, Artifact, Manifest, content_digest, record_files, write_manifest
from lsmix.data.atomic import DECODE_ERRORS, folder_bytes, remove_stale, write_atomic
from lsmix.data.errors import CorruptError, DiskSpaceError, MissingError, format_bytes
from lsmix.data.loaders.ranks import ALONE
from lsmix.data.progress import Progress, stop_point
from lsmix.pipeline.engine.device import describe_environment, prepare_device, resolve_device
from lsmix.pipeline.engine.progress import TaskProgress
from lsmix.pipeline.engine.resolver import Resolver, slow_warning
from lsmix.pipeline.engine.shards import Executor
from lsmix.pipeline.engine.stage import Node, StageTask
from lsmix.pipeline.engine.torchrun import joined_ranks, run_on_ranks
from lsmix.pipeline.workspace.locks import InputLocks, artifact_lock
from lsmix.pipeline.workspace.workspace import Workspace

__all__ = ["Built", "bring_up_to_date", "locked_task", "note_seconds"]

_SECONDS = "seconds"  # prefix of the files that record how long sessions took


@dataclass(frozen=True, kw_only=True)
class Built:
    """An artifact that a run made or found up to date."""

    name: str  # in the recipe
    artifact: Artifact
    workspace: Workspace
    cached: bool  # whether it was already complete
    seconds: float = 0.0  # in this run

    @property
    def stage(self) -> str:
        """The stage that made the artifact."""
        return self.manifest.stage

    @property
    def manifest(self) -> Manifest:
        """The artifact's manifest."""
        return self.artifact.manifest

    @property
    def cache_key(self) -> str:
        """The artifact's cache key, 12 hex digits."""
        return self.manifest.cache_key

    @property
    def folder(self) -> Path:
        """The artifact's local folder; from a remote workspace it is downloaded on first use."""
        return self.workspace.local_copy(self.artifact)

    @property
    def location(self) -> str:
        """The artifact's folder, or in a remote workspace its URL."""
        return self.artifact.location


def bring_up_to_date(
    nodes: Sequence[Node],
    workspace: Workspace,
    *,
    executor: Executor | None,
    progress: Progress,
    device: str = "auto",
    force: str = "",
) -> list[Built]:
    """Make every node that is not complete yet; ``nodes`` are ordered so that inputs come first.

    Without an executor all shards must be complete. ``force`` names a stage to rerun even if it is complete.

    Raises:
        RecipeError: A setting of the recipe does not fit the data set; raised as soon as the data set is read.
        LockedError: Another run works on one of the artifacts.
        DiskSpaceError: An artifact would not fit on the disk.
        LsmixError: A stage failed.
    """
    resolver, built, unchecked = Resolver(workspace, remember=True), list[Built](), list(nodes)
    expected: list[float] | None = None
    with InputLocks() as locks:
        for node in nodes:
            stop_point()
            unchecked = [each for each in unchecked if not resolver.check(each)]
            if expected is None:
                expected = resolver.slow_seconds(nodes)
                slow = slow_warning(nodes, expected) if expected else ""
                if slow and resolve_device(device) == "cpu":
                    progress.warning(slow)
            if node.stage.name == force and resolver.key(node) not in {
                item.cache_key for item in built if not item.cached
            }:
                _remove(node, resolver)
            begun = time.monotonic()
            artifact, cached = resolver.artifact(node), True
            if artifact:
                # Remains if a run was killed between manifest and clean-up.
                if artifact.is_local:
                    shutil.rmtree(artifact.folder / WORK_FOLDER, ignore_errors=True)
                artifact = workspace.upload(artifact, progress)  # if the run that made it failed to
                progress.info(f"{node.label}: up to date ({artifact.location})")
            else:
                for item in built:  # not earlier: a run that makes nothing must work in a read-only workspace
                    locks.hold(item.artifact)
                artifact, cached = _make(node, resolver, locks, executor, progress, device), False
            seconds = 0.0 if cached else time.monotonic() - begun
            built.append(Built(name=node.name, artifact=artifact, workspace=workspace, cached=cached, seconds=seconds))
    return built


def _remove(node: Node, resolver: Resolver) -> None:
    """Remove the artifact of a node, complete or damaged; keep unfinished work, which can be resumed."""
    key, workspace = resolver.key(node), resolver.workspace
    if key is not None:
        folder = workspace.folder(node.stage.name, node.name, key)
        if workspace.exists(folder):
            workspace.remove(folder, key, node.label)
        resolver.forget(node)


def _make(
    node: Node, resolver: Resolver, locks: InputLocks, executor: Executor | None, progress: Progress, device: str
) -> Artifact:
    workspace = resolver.workspace
    with locked_task(node, resolver, locks, executor, progress, device) as task:
        finished = workspace.find(node.stage.name, task.cache_key)
        if finished:  # another run made it before this one took the lock
            return finished
        manifest = _run_stage(node, task, resolver)
        shutil.rmtree(task.folder / WORK_FOLDER, ignore_errors=True)
        made = workspace.upload(Artifact(folder=task.folder, manifest=manifest), progress)
    progress.info(f"{node.label}: done in {manifest.seconds:.1f} s ({made.location})")
    progress.event(
        "artifact",
        label=node.label,
        cache_key=task.cache_key,
        content_digest=manifest.content_digest,
        where=made.location,
    )
    return made


@contextmanager
def locked_task(
    node: Node,
    resolver: Resolver,
    locks: InputLocks,
    executor: Executor | None,
    progress: Progress,
    device: str,
    *,
    shared: bool = False,
) -> Iterator[StageTask]:
    """Lock the artifact of a node and yield its task; with ``shared``, array tasks can hold the lock together.

    ``locks`` holds locks on the inputs, so that no other process removes them.

    Raises:
        MissingError: An input has not been made yet, or was removed.
        RecipeError: The configuration does not fit the data set, or the device is not available.
        LockedError: Another run works on the artifact, or removes an input.
        DiskSpaceError: The artifact would not fit on the disk.
    """
    inputs, records, key = resolver.inputs(node), resolver.records(node), resolver.key(node)
    if inputs is None or records is None or key is None:
        missing = resolver.missing(node)
        commands = " and ".join(f"'lsmix {label.split()[0]} RECIPE'" for label in missing) or "'lsmix run RECIPE'"
        been = "have" if len(missing) > 1 else "has"
        raise MissingError(f"{' and '.join(missing) or 'an input'} {been} not been made yet. Run {commands} first.")
    resolver.check(node)
    workspace = resolver.workspace
    folder = workspace.folder(node.stage.name, node.name, key)
    for artifact in inputs.values():
        locks.hold(artifact)
    with artifact_lock(workspace.root, key, node.label, shared=shared) as note:
        _check_disk(node, resolver, folder)
        device = resolve_device(device) if node.stage.uses_torch else ""
        made_from = ", ".join(f"{record.role} {record.content_digest[:12]}" for record in records)
        progress.debug(f"{node.label}: key {key} from {made_from}{f', on {device}' if device else ''}, in {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        if device:
            prepare_device(device)
        yield StageTask(
            stage=node.stage.name,
            name=node.name,
            cache_key=key,
            folder=folder,
            config=node.config,
            inputs=inputs,
            records=records,
            device=device,
            executor=executor,
            progress=TaskProgress(progress, note),
            url=workspace.url_of(folder),
            ranks=joined_ranks() if node.stage.on_ranks else ALONE,
            source=node.source,
        )


def _run_stage(node: Node, task: StageTask, resolver: Resolver) -> Manifest:
    before = _seconds_before(task)
    begun = time.monotonic()
    try:
        result = run_on_ranks(node.stage.run, task)
    except BaseException:
        _leave_unfinished(task, before + time.monotonic() - begun)
        raise
    remove_stale(task.folder)
    files = record_files(task.folder, set(result.payload), result.digests)
    if not files:
        raise CorruptError(f"{node.label} wrote no files to {str(task.folder)!r}.")
    cost = resolver.cost(node)
    manifest = Manifest(
        stage=node.stage.name,
        stage_version=node.stage.version,
        name=node.name,
        cache_key=task.cache_key,
        content_digest=content_digest(files),
        config=msgspec.to_builtins(node.config),
        inputs=task.records,
        files=files,
        counts={**result.counts, "gflop": round(cost.flops / 1e9, 3) if cost else 0.0},
        seconds=round(before + time.monotonic() - begun, 3),
        environment={**describe_environment(task.device), "world_size": task.ranks.size},
    )
    write_manifest(task.folder, manifest)
    return manifest


def _seconds_before(task: StageTask) -> float:
    """Return the total seconds of earlier sessions; damaged files are ignored, as they are informative only."""
    total = 0.0
    for path in task.work.glob(f"{_SECONDS}*.json"):
        with contextlib.suppress(OSError, *DECODE_ERRORS):
            total += msgspec.json.decode(path.read_bytes(), type=float)
    return total


def note_seconds(task: StageTask, seconds: float, session: str = "") -> None:
    """Record the seconds of a session; ``session`` distinguishes array tasks on the same artifact."""
    write_atomic(task.work / f"{_SECONDS}{session}.json", msgspec.json.encode(seconds))


def _leave_unfinished(task: StageTask, seconds: float) -> None:
    """Record the seconds of an unfinished session, or remove the folder if it contains no work."""
    with contextlib.suppress(OSError):  # the disk may be full; the original error matters more
        remove_stale(task.folder)
        if any(path.is_file() and not path.name.startswith(_SECONDS) for path in task.folder.rglob("*")):
            for path in task.work.glob(f"{_SECONDS}*.json"):
                path.unlink()
            note_seconds(task, seconds)
        else:
            shutil.rmtree(task.folder)


def _check_disk(node: Node, resolver: Resolver, folder: Path) -> None:
    cost = resolver.cost(node)
    expected = cost.bytes if cost else 0
    present = folder_bytes(folder)
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if expected - present > free:
        raise DiskSpaceError(
            f"{node.label} needs about {format_bytes(expected - present)} in {str(place)!r}, but only {format_bytes(free)} are free. "
            "Free some space, for example with 'lsmix gc', or choose another '--workspace'."
        )
