"""Job arrays: a stage's shards made part by part, by any number of processes that share the workspace, then concluded.

The one rule: a part writes shards and their records, and nothing else; so parts need not know of each other, may run
twice, and may be cut anew in mid-way.
"""

import os
import re
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
from lsmix.pipeline.engine.stage import ArrayTaskResult, Executor, Node, Part
from lsmix.pipeline.workspace.local import Workspace
from lsmix.pipeline.workspace.locks import InputLocks, artifact_lock

__all__ = ["finalize_array", "parse_part", "run_array_task"]

_MOST_PARTS = 1_000_000


def parse_part(text: str) -> Part:
    """Return the part that "i/n" names: the i-th of n, counted from 1.

    Raises:
        RecipeError: it is no such text.

    Example:
        >>> from lsmix.pipeline.engine.array_task import parse_part
        >>> parse_part("2/3")
        Part(number=2, of=3)
    """
    fits = re.fullmatch(r"([0-9]{1,7})/([0-9]{1,7})", text)
    number, of = (int(fits[1]), int(fits[2])) if fits else (0, 0)
    if not 1 <= number <= of <= _MOST_PARTS:
        raise RecipeError(
            f"shards {text!r} are no part of the work: expected i/n with i from 1 to n, such as 2/3 for the second of three."
        )
    return Part(number, of)


def run_array_task(
    nodes: Sequence[Node],
    workspace: Workspace,
    *,
    stage: str,
    part: Part,
    executor: Executor,
    progress: Progress,
    device: str = "auto",
) -> list[ArrayTaskResult]:
    """Make one part of every artifact of a stage that isn't complete.

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
        begun = begin(node, resolver, progress)
        with InputLocks() as locks, artifact_lock(workspace.root, begun.key, node.label, shared=True) as note:
            begun.hold_inputs(locks)
            task = begun.task(executor, TaskProgress(progress, note), device)
            started = time.monotonic()
            done = make_part(task, part)
            note_seconds(task, time.monotonic() - started, f"-{socket.gethostname()}-{os.getpid()}")
        progress.info(f"{node.label}: part {part.number} of {part.of} done, {done.made} shards made")
        made.append(done)
    return made


def finalize_array(
    nodes: Sequence[Node], workspace: Workspace, *, progress: Progress, device: str = "auto"
) -> list[Built]:
    """Conclude every artifact that parts have begun; compute nothing.

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
            f"nothing in {workspace.location!r} was begun in parts. Make them first: lsmix encode RECIPE --shards 1/N, …"
        )
    return built
