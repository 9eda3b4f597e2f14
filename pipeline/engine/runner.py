"""The runner: brings artifacts up to date, one after another, and touches nothing that is.

An artifact becomes visible by its manifest, which is written after everything else is on the disk; so
whatever stops a run, what is there is whole, and what is unfinished goes on where it stopped.
"""

import contextlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from lsmix.data.artifact import (
    WORK_FOLDER,
    Artifact,
    InputRecord,
    Manifest,
    record_files,
    root_digest,
    write_manifest,
)
from lsmix.data.atomic import DECODE_ERRORS, folder_bytes, remove_stale, write_atomic
from lsmix.data.errors import CorruptError, DiskSpaceError, MissingError, format_bytes
from lsmix.data.progress import Progress, stop_point
from lsmix.pipeline.engine.device import describe_environment, prepare_device, resolve_device
from lsmix.pipeline.engine.estimates import check_against_data, estimate
from lsmix.pipeline.engine.progress import TaskProgress
from lsmix.pipeline.engine.resolver import Resolver
from lsmix.pipeline.engine.stage import Executor, Node, StageTask
from lsmix.pipeline.workspace.local import Workspace
from lsmix.pipeline.workspace.locks import InputLocks, artifact_lock

__all__ = ["Begun", "Built", "begin", "bring_up_to_date", "note_seconds"]

_SECONDS = "seconds"  # begins the names of the files that tell how long sessions took


@dataclass(frozen=True, kw_only=True)
class Built:
    """An artifact that a run brought up to date, or found so."""

    stage: str
    name: str
    artifact: Artifact
    workspace: Workspace
    cached: bool  # whether it was there already
    seconds: float = 0.0  # of this run

    @property
    def manifest(self) -> Manifest:
        """All that is known of it."""
        return self.artifact.manifest

    @property
    def key(self) -> str:
        """Its key, 12 hex digits."""
        return self.manifest.key

    @property
    def folder(self) -> Path:
        """Its folder on this machine; what lies in a remote workspace is fetched when this is first asked for."""
        return self.workspace.local_copy(self.artifact)

    @property
    def location(self) -> str:
        """Its folder, or in a remote workspace its URL."""
        return self.artifact.location


def bring_up_to_date(
    nodes: Sequence[Node],
    workspace: Workspace,
    *,
    executor: Executor,
    progress: Progress,
    device: str = "auto",
    force: str = "",
) -> list[Built]:
    """Make every node that isn't there yet, in order.

    Args:
        nodes: inputs before what is made from them.
        workspace: where artifacts are.
        executor: makes the shards of sharded stages.
        progress: is told what happens.
        device: "auto", "cpu", "cuda" or "cuda:N".
        force: name of a stage to make again although it is there; "" for none.

    Raises:
        RecipeError: a number of the recipe does not fit the data set; this is told as soon as that is read.
        LockedError: another run works on one of them.
        DiskSpaceError: one would not fit on the disk.
        LsmixError: whatever a stage has to say.
    """
    with InputLocks() as locks:
        return _bring_up_to_date(nodes, Resolver(workspace, remember=True), locks, executor, progress, device, force)


def _bring_up_to_date(
    nodes: Sequence[Node],
    resolver: Resolver,
    locks: InputLocks,
    executor: Executor,
    progress: Progress,
    device: str,
    force: str,
) -> list[Built]:
    workspace = resolver.workspace
    built: list[Built] = []
    unchecked = list(nodes)
    for node in nodes:
        stop_point()
        unchecked = [each for each in unchecked if not check_against_data(each, resolver)]
        if node.stage.name == force and resolver.key(node) not in {item.key for item in built if not item.cached}:
            _remove_made(node, resolver)
        common: dict[str, Any] = {"stage": node.stage.name, "name": node.name, "workspace": workspace}
        there = resolver.artifact(node)
        if there:
            if there.is_local:  # left by a kill between manifest and clean-up
                shutil.rmtree(there.folder / WORK_FOLDER, ignore_errors=True)
            there = workspace.upload(there, progress)  # if the run that made it could not
            progress.info(f"{node.label}: up to date ({there.location})")
            built.append(Built(**common, artifact=there, cached=True))
            continue
        begun = time.monotonic()
        for item in built:  # now, since a run that makes nothing may be given a workspace that it cannot write to
            locks.hold(item.artifact)
        made = _make(node, resolver, locks, executor, progress, device)
        built.append(Built(**common, artifact=made, cached=False, seconds=time.monotonic() - begun))
    return built


def _remove_made(node: Node, resolver: Resolver) -> None:
    """Remove the artifact of a node, be it whole or damaged; unfinished work is kept, since it goes on."""
    key = resolver.key(node)
    if key is None:
        return
    workspace = resolver.workspace
    folder = workspace.folder(node.stage.name, node.name, key)
    if workspace.exists(folder):
        workspace.remove(folder, key, node.label)
    resolver.forget(node)


def _make(
    node: Node, resolver: Resolver, locks: InputLocks, executor: Executor, progress: Progress, device: str
) -> Artifact:
    begun = begin(node, resolver)
    begun.hold_inputs(locks)
    with artifact_lock(resolver.workspace.root, begun.key, node.label) as note:
        finished = resolver.workspace.find(node.stage.name, begun.key)
        if finished:  # another run made it while this one waited for nothing but the lock
            return finished
        task = begun.task(executor, TaskProgress(progress, note), device)
        manifest = _run_stage(node, task, resolver, begun.records, begun.key)
        shutil.rmtree(begun.folder / WORK_FOLDER, ignore_errors=True)
        made = resolver.workspace.upload(Artifact(folder=begun.folder, manifest=manifest), progress)
    progress.info(f"{node.label}: done in {manifest.seconds:.1f} s ({made.location})")
    progress.event("artifact", label=node.label, key=begun.key, root=manifest.root, where=made.location)
    return made


@dataclass(frozen=True, kw_only=True)
class Begun:
    """An artifact that can be made, since all that it is made from is there."""

    node: Node
    resolver: Resolver
    inputs: dict[str, Artifact]
    records: list[InputRecord]
    key: str
    folder: Path

    def hold_inputs(self, locks: InputLocks) -> None:
        """Keep what it is made from from being removed.

        Raises:
            LockedError, MissingError: another process removes it, or did.
        """
        for artifact in self.inputs.values():
            locks.hold(artifact)

    def task(self, executor: Executor, progress: Progress, device: str) -> StageTask:
        """Return the work on it; the lock must be held.

        Raises:
            DiskSpaceError: it would not fit on the disk.
            RecipeError: there is no such device.
        """
        _check_disk(self.node, self.resolver, self.folder)
        task_device = resolve_device(device) if self.node.stage.uses_torch else ""
        made_from = ", ".join(f"{record.role} {record.root[:12]}" for record in self.records)
        progress.debug(
            f"{self.node.label}: key {self.key} from {made_from}, on {task_device or 'no device'}, in {self.folder}"
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        if task_device:
            prepare_device(task_device)
        return StageTask(
            stage=self.node.stage.name,
            name=self.node.name,
            folder=self.folder,
            config=self.node.config,
            inputs=self.inputs,
            device=task_device,
            executor=executor,
            progress=progress,
            url=self.resolver.workspace.url_of(self.folder),
        )


def begin(node: Node, resolver: Resolver) -> Begun:
    """Return what is needed to make a node.

    Raises:
        MissingError: one of its inputs is not there.
        RecipeError: a number of its configuration does not fit the data set.
    """
    inputs, records, key = resolver.inputs(node), resolver.records(node), resolver.key(node)
    if inputs is None or records is None or key is None:
        missing = " and ".join(resolver.missing(node)) or "one of its inputs"
        raise MissingError(f"{node.label} cannot be made: {missing} is not there. Run its recipe from the start.")
    check_against_data(node, resolver)
    folder = resolver.workspace.folder(node.stage.name, node.name, key)
    return Begun(node=node, resolver=resolver, inputs=inputs, records=records, key=key, folder=folder)


def _run_stage(node: Node, task: StageTask, resolver: Resolver, records: list[InputRecord], key: str) -> Manifest:
    before = _seconds_before(task)
    begun = time.monotonic()
    try:
        outcome = node.stage.run(task)
    except BaseException:
        _leave_unfinished(task, before + time.monotonic() - begun)
        raise
    remove_stale(task.folder)
    files = record_files(task.folder, set(outcome.payload), outcome.digests)
    if not files:
        raise CorruptError(f"{node.label} left nothing in {str(task.folder)!r}.")
    cost = estimate(node, resolver)
    manifest = Manifest(
        stage=node.stage.name,
        stage_version=node.stage.version,
        name=node.name,
        key=key,
        root=root_digest(files),
        config=msgspec.to_builtins(node.config),
        inputs=records,
        files=files,
        counts={**outcome.counts, "gflop": round(cost.flops / 1e9, 3) if cost else 0.0},
        seconds=round(before + time.monotonic() - begun, 3),
        environment=describe_environment(task.device),
    )
    write_manifest(task.folder, manifest)
    return manifest


def _seconds_before(task: StageTask) -> float:
    """Return the seconds of earlier sessions; none where a file is damaged, since they only inform."""
    total = 0.0
    for path in task.work.glob(f"{_SECONDS}*.json"):
        with contextlib.suppress(OSError, *DECODE_ERRORS):
            total += msgspec.json.decode(path.read_bytes(), type=float)
    return total


def note_seconds(task: StageTask, seconds: float, session: str = "") -> None:
    """Note how long a session worked; ``session`` tells it from others that work on the same artifact."""
    write_atomic(task.work / f"{_SECONDS}{session}.json", msgspec.json.encode(seconds))


def _leave_unfinished(task: StageTask, seconds: float) -> None:
    """Note the time of a session that did not finish; a folder in which it made nothing is removed."""
    with contextlib.suppress(OSError):  # the disk may be full, and that is what has to be told
        remove_stale(task.folder)
        if any(path.is_file() and not path.name.startswith(_SECONDS) for path in task.folder.rglob("*")):
            for path in task.work.glob(f"{_SECONDS}*.json"):
                path.unlink()
            note_seconds(task, seconds)
        else:
            shutil.rmtree(task.folder)


def _check_disk(node: Node, resolver: Resolver, folder: Path) -> None:
    cost = estimate(node, resolver)
    expected = cost.bytes if cost else 0
    there = folder_bytes(folder)
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if expected - there > free:
        raise DiskSpaceError(
            f"{node.label} needs about {format_bytes(expected - there)} below {str(place)!r}, where {format_bytes(free)} are free. "
            "Free some space ('lsmix gc' helps), or choose another '--workspace'."
        )
