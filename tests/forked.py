"""Run lsmix in forks of a process that has imported everything and started no thread: torch is loaded only once.

The script is called with the name of a function in this module and its arguments; it prints the exit codes of the forks
as JSON.
"""

import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

__all__ = ["forked"]

_MOST_FORKS = 60


def forked(name: str, *words: str | Path) -> list[int]:
    """Call a function of this module in a separate process; return the exit codes of its forks."""
    done = subprocess.run([sys.executable, __file__, name, *words], check=True, capture_output=True, timeout=120)
    return list(json.loads(done.stdout))


def killed(recipe: str, workspace: str, stage: str) -> list[int]:
    """Run a stage in one fork after another, each killed while it flushes a file, until one finishes."""
    import jinja2  # noqa: F401 - imported once here instead of in every fork
    import zarr  # noqa: F401 - likewise

    import lsmix

    lsmix.run(recipe, workspace=f"{workspace}-of-the-parent", stage="train-glow", device="cpu")  # starts no thread
    codes: list[int] = []
    for countdown in itertools.cycle(
        (3, 20, 150)
    ):  # a shard has fewer than 150 flushes, so every third run makes progress
        codes.append(_wait(_fork(lambda: _run_until_flush(countdown, recipe, workspace, stage))))  # noqa: B023 - the fork runs now
        if codes[-1] != -signal.SIGKILL or len(codes) == _MOST_FORKS:
            return codes
    raise AssertionError


def array_tasks(recipe: str, workspace: str, *stages: str) -> list[int]:
    """For each stage, run the three tasks of a job array in parallel forks; finalize all stages but the last."""
    import lsmix

    def task(stage: str, index: int) -> None:
        lsmix.run_array_task(recipe, stage, index, 3, workspace=workspace, device="cpu")
        assert "sympy" not in sys.modules, "torch's compiler and sympy take a second to import"

    codes = []
    for stage in stages:
        if codes:
            codes.append(_wait(_fork(lambda: lsmix.finalize(recipe, workspace=workspace))))
        forks = [_fork(lambda stage=stage, index=index: task(stage, index)) for index in (2, 0, 1)]
        codes += [_wait(child) for child in forks]
    return codes


def _run_until_flush(countdown: int, recipe: str, workspace: str, stage: str) -> None:
    import lsmix

    flush, left = os.fsync, countdown

    def fsync(handle: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(handle)

    os.fsync = fsync
    lsmix.run(recipe, workspace=workspace, stage=stage, device="cpu")


def _fork(work: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def _wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    for module in ("classifiers.training", "glow.training", "pipeline.api"):
        importlib.import_module(f"lsmix.{module}")
    sys.stdout.write(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
