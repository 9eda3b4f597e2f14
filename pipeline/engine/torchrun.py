"""Commands under torchrun: rank 0 runs the command, and the other ranks take part in the stages that ranks share.

So only one process holds locks, writes files and reports progress. The others receive tasks as locations and numbers,
and end with rank 0.
"""

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from lsmix.data.errors import DivergedError, LsmixError, RecipeError
from lsmix.data.loaders.ranks import ALONE, LostRankError, Ranks, join_ranks
from lsmix.data.progress import NullProgress, graceful_signals
from lsmix.pipeline.engine.device import prepare_device, resolve_device

if TYPE_CHECKING:
    from lsmix.pipeline.engine.stage import StageResult, StageTask

__all__ = ["check_ranks", "joined_ranks", "leave_ranks", "run_on_first_rank", "run_on_ranks"]

_joined: Final = [ALONE]  # the last entry is current


def joined_ranks() -> Ranks:
    """Return the ranks that share the trainings of this command."""
    return _joined[-1]


def check_ranks(field: str, batch_size: int, last_batch: int = 0) -> None:
    """Raise RecipeError unless the ranks divide each batch equally and get an image each of a smaller last one."""
    size = joined_ranks().size
    if batch_size % size or 0 < last_batch < size:
        left = "" if batch_size % size else f", with a last batch of {last_batch},"
        raise RecipeError(
            f"{field}: batches of {batch_size} images{left} cannot be divided among {size} ranks. Change the batch size "
            "or the number of processes."
        )


def run_on_first_rank(command: Callable[[], None]) -> int:
    """Run a command, under torchrun on rank 0 only, while the other ranks join its trainings. Return the exit code."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # not started by torchrun
        command()
        return 0
    ranks = join_ranks()
    if not ranks.first:
        return _follow(ranks)
    _joined.append(ranks)
    code = 1
    try:
        command()
        code = 0
    finally:
        with suppress(LostRankError):
            joined_ranks().broadcast(code)
    return code


def leave_ranks(code: int) -> int:
    """Return an exit code; a process that joined others exits with it instead, without finalizing Python.

    A thread of gloo may still release tensors of the last collective. If Python is finalized by then, that aborts the
    process (4 of 30 runs with torch 2.13 on a busy machine), and torchrun reports a failure after a complete run.
    """
    torch = sys.modules.get("torch")  # a process that never imported it joined no others
    if torch and torch.distributed.is_available() and torch.distributed.is_initialized():
        with suppress(RuntimeError):  # another rank exited first
            torch.distributed.destroy_process_group()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # its reader closed it
                stream.flush()
        os._exit(code)
    return code


def run_on_ranks(run: Callable[["StageTask"], "StageResult"], task: "StageTask") -> "StageResult":
    """Run a stage on all ranks of the task; return the result of rank 0, which is this process."""
    if task.ranks.size == 1:
        return run(task)
    if task.device not in ("cpu", "cuda"):
        raise RecipeError(
            f"under torchrun each rank uses its own GPU, not {task.device!r}. Remove '--device', or use '--device cpu'."
        )
    task.progress.info(f"{task.label}: on {task.ranks.size} ranks")
    inputs = {role: artifact.location for role, artifact in task.inputs.items()}
    try:
        task.ranks.broadcast((run, replace(task, inputs={}, progress=NullProgress(), executor=None), inputs))
        return run(task)
    except BaseException:
        _joined.append(ALONE)  # the other ranks may be waiting anywhere; they notice that this process ends
        raise


def _follow(ranks: Ranks) -> int:
    """Take part in each task of rank 0 until it ends; return the exit code."""
    try:
        with graceful_signals():
            while not isinstance(order := ranks.broadcast(), int):
                _take_part(ranks, *order)
    except (LostRankError, DivergedError, KeyboardInterrupt):
        return 1  # another rank reports it
    except LsmixError as error:
        error.args = (f"rank {ranks.rank}: {error}",)
        raise
    return order


def _take_part(
    ranks: Ranks, run: Callable[["StageTask"], "StageResult"], task: "StageTask", inputs: Mapping[str, str]
) -> None:
    from lsmix.data.store import open_flow_artifact

    device = task.device
    if device != "cpu":
        device = resolve_device(f"cuda:{os.environ['LOCAL_RANK']}")
    prepare_device(device)
    opened = {role: open_flow_artifact(location) for role, location in inputs.items()}
    run(replace(task, inputs=opened, device=device, ranks=ranks))
