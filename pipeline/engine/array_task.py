"""Job arrays: processes that share a workspace each make some of a stage's shards; ``finalize`` completes the artifact.

A task writes only shards and their records, so tasks may overlap, run twice, or be divided differently later.
"""

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

from lsmix.data.errors import MissingError, RecipeError, format_count
from lsmix.data.progress import Progress
from lsmix.pipeline.engine.resolver import Resolver
from lsmix.pipeline.engine.runner import Built, bring_up_to_date, locked_task, note_seconds
from lsmix.pipeline.engine.sharding import complete_shards, make_missing_shards
from lsmix.pipeline.engine.shards import Executor, finished_shards, read_ledger
from lsmix.pipeline.engine.stage import Node
from lsmix.pipeline.workspace.locks import InputLocks
from lsmix.pipeline.workspace.workspace import Workspace

__all__ = ["ArrayTaskResult", "finalize_array", "run_array_task"]

_MAX_TASKS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class ArrayTaskResult:
    """The result of an array task for one artifact."""

    label: str  # "mix lsmix"
    folder: str  # of the unfinished artifact
    shards: int  # number of shards of this task
    made: int  # number of these that this task made; the others were complete
    finished: int  # number of complete shards of the artifact, by all tasks
    of: int  # number of shards of the artifact


def run_array_task(
    nodes: Sequence[Node],
    workspace: Workspace,
    *,
    stage: str,
    index: int,
    size: int,
    executor: Executor,
    progress: Progress,
    device: str = "auto",
) -> list[ArrayTaskResult]:
    """Make shards ``index``, ``index + size``, … of every artifact of a stage that isn't complete.

    Raises:
        RecipeError: The stage has no shards, or the index is outside the array.
        LsmixError: As in ``locked_task`` and ``make_missing_shards``.
    """
    if not 0 <= index < size <= _MAX_TASKS:
        raise RecipeError(
            f"array index {index} of size {size}: expected a size of 1 to {_MAX_TASKS:,}, and an index from 0 to size - 1."
        )
    resolver = Resolver(workspace, remember=True)
    results = []
    for node in nodes:
        if node.stage.name != stage:
            continue
        if node.stage.create is None:
            raise RecipeError(f"stage {stage!r} cannot run as a job array. Only 'encode' and 'mix' can.")
        artifact = resolver.artifact(node)
        if artifact:
            progress.info(f"{node.label}: up to date ({artifact.location})")
            continue
        with InputLocks() as locks, locked_task(node, resolver, locks, executor, progress, device, shared=True) as task:
            begun = time.monotonic()
            store = node.stage.create(task)
            own, before = range(index, store.shards, size), complete_shards(task, store)
            records = make_missing_shards(task, store, node.stage.processor, own, before)
            note_seconds(task, time.monotonic() - begun, f"-{socket.gethostname()}-{os.getpid()}")
        result = ArrayTaskResult(
            label=task.label,
            folder=str(task.folder),
            shards=len(own),
            made=sum(shard not in before for shard in own),
            finished=len(records),
            of=store.shards,
        )
        progress.info(f"{node.label}: array task {index} of {size} done, {format_count(result.made, 'shard')} made")
        results.append(result)
    return results


def finalize_array(
    nodes: Sequence[Node], workspace: Workspace, *, progress: Progress, device: str = "auto"
) -> list[Built]:
    """Complete every artifact that array tasks have started, without computing shards.

    Raises:
        MissingError: No artifact was started.
        PartialError: Shards of an artifact are missing.
        LockedError: A task still works on an artifact.
    """
    resolver = Resolver(workspace, remember=True)
    built: list[Built] = []
    for node in nodes:
        key = resolver.key(node) if node.stage.create else None
        if key is None:
            continue
        folder = workspace.folder(node.stage.name, node.name, key)
        url = workspace.url_of(folder)
        if finished_shards(folder) or (url and read_ledger(url, node.stage.name)) or resolver.artifact(node):
            built += bring_up_to_date([node], workspace, executor=None, progress=progress, device=device)
        else:
            progress.info(f"{node.label}: not started")
    if not built:
        raise MissingError(
            f"no array task has run in {workspace.location!r}. First run the tasks: 'lsmix encode RECIPE --array-index I "
            "--array-size N' with I from 0 to N - 1."
        )
    return built
