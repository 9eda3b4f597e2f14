"""Job arrays: processes that share a workspace each make some of a stage's shards; then ``finalize`` completes the artifact.

A task writes shards and their records and nothing else, so tasks may overlap, run twice, or be divided differently later.
"""

import os
import socket
import time
from collections.abc import Sequence

from lsmix.data.errors import MissingError, RecipeError
from lsmix.data.progress import Progress
from lsmix.pipeline.engine.executor import CompletenessCheck
from lsmix.pipeline.engine.progress import TaskProgress
from lsmix.pipeline.engine.resolver import Resolver
from lsmix.pipeline.engine.runner import Built, begin, bring_up_to_date, note_seconds
from lsmix.pipeline.engine.shards import finished_shards, read_ledger
from lsmix.pipeline.engine.stage import ArrayTask, ArrayTaskResult, Executor, Node
from lsmix.pipeline.workspace.local import Workspace
from lsmix.pipeline.workspace.locks import InputLocks, artifact_lock

__all__ = ["check_array_task", "finalize_array", "run_array_task"]

_MOST_TASKS = 1_000_000


def check_array_task(index: int, size: int) -> ArrayTask:
    """Return a task of a job array.

    Raises:
        RecipeError: the index is outside of the array, or the array too large.

    Example:
        >>> from lsmix.pipeline.engine.array_task import check_array_task
        >>> check_array_task(1, 3)
        ArrayTask(index=1, size=3)
    """
    if not 0 <= index < size <= _MOST_TASKS:
        raise RecipeError(
            f"array index {index} of size {size}: expected a size of 1 to {_MOST_TASKS:,}, and an index from 0 to size - 1."
        )
    return ArrayTask(index, size)


def run_array_task(
    nodes: Sequence[Node],
    workspace: Workspace,
    *,
    stage: str,
    array_task: ArrayTask,
    executor: Executor,
    progress: Progress,
    device: str = "auto",
) -> list[ArrayTaskResult]:
    """Make the shards of one array task, of every artifact of a stage that isn't complete.

    Raises:
        MissingError: what one is made from is not there yet.
        RecipeError: the stage's work cannot be divided.
        LockedError: a run makes one of them whole.
        PartialError: some shards failed; all others of the part are done.
    """
    resolver = Resolver(workspace, remember=True)
    made = []
    for node in nodes:
        if node.stage.name != stage:
            continue
        make_part = node.stage.make_part
        if make_part is None:
            raise RecipeError(f"stage {stage!r} has no shards to be divided: only 'encode' and 'mix' have.")
        there = resolver.artifact(node)
        if there:
            progress.info(f"{node.label}: up to date ({there.location})")
            continue
        begun = begin(node, resolver)
        with InputLocks() as locks, artifact_lock(workspace.root, begun.key, node.label, shared=True) as note:
            begun.hold_inputs(locks)
            task = begun.task(executor, TaskProgress(progress, note), device)
            started = time.monotonic()
            done = make_part(task, array_task)
            note_seconds(task, time.monotonic() - started, f"-{socket.gethostname()}-{os.getpid()}")
        progress.info(f"{node.label}: array task {array_task.index} of {array_task.size} done, {done.made} shards made")
        made.append(done)
    return made


def finalize_array(
    nodes: Sequence[Node], workspace: Workspace, *, progress: Progress, device: str = "auto"
) -> list[Built]:
    """Complete every artifact that array tasks have begun; compute nothing.

    Raises:
        MissingError: none was begun.
        PartialError: shards of one are missing.
        LockedError: a part still works on one.
    """
    resolver = Resolver(workspace, remember=True)
    built: list[Built] = []
    for node in nodes:
        key = resolver.key(node) if node.stage.make_part else None
        if key is None:
            continue
        folder = workspace.folder(node.stage.name, node.name, key)
        url = workspace.url_of(folder)
        begun = finished_shards(folder) or (url and read_ledger(url))
        if begun or resolver.artifact(node):
            built += bring_up_to_date([node], workspace, executor=CompletenessCheck(), progress=progress, device=device)
        else:
            progress.info(f"{node.label}: not begun")
    if not built:
        raise MissingError(
            f"nothing in {workspace.location!r} was begun by array tasks. Run them first: lsmix encode RECIPE --array-index 0 --array-size N, …"
        )
    return built
