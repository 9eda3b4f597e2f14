"""Which executor a command uses, by what it was given."""

from collections.abc import Callable

from lsmix.data.errors import RecipeError
from lsmix.pipeline.executors.executor import Executor
from lsmix.pipeline.executors.in_process import InProcessExecutor

__all__ = ["choose_executor"]


def choose_executor(*, workers: int, scheduler: str, device: str, say: Callable[[str], None]) -> Executor:
    """Return what makes shards: this process, unless Dask workers or a scheduler are asked for.

    Args:
        workers: Dask workers to start on this machine; 0 for none.
        scheduler: address of a running Dask scheduler; "" for none.
        device: as the user asked for it: "auto", "cpu", "cuda" or "cuda:N".
        say: is told the link of the dashboard.

    Raises:
        RecipeError: both are asked for.
    """
    if workers and scheduler:
        raise RecipeError(
            f"'--workers {workers}' starts a Dask cluster of its own and '--scheduler {scheduler}' joins another: give one."
        )
    if not workers and not scheduler:
        return InProcessExecutor()
    # Here, since distributed takes half a second to import.
    from lsmix.pipeline.executors.on_dask import DaskExecutor

    return DaskExecutor(workers=workers, scheduler=scheduler, device=device, say=say)
