"""Contenders in separate processes, of which only one works at a time.

Libraries change global state (threads, memory, warnings), so no two of them share a process.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.turns import Scores

__all__ = ["Contender", "call_fresh", "contenders", "peak_mb"]


class Contender:
    """A process that sets up a library once and then runs jobs with it.

    Args:
        builder: "module:function"; the function returns the jobs by name. A job is a function that returns a number of
            items, or any other picklable value.
        arguments: Arguments of the builder.
        threads: Number of threads for torch and its libraries.
        variables: Environment variables, such as settings of the C library's memory allocator.
    """

    def __init__(
        self, builder: str, *arguments: Any, threads: int = 1, variables: Mapping[str, str] | None = None
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, child_pipe = context.Pipe()
        self._process = context.Process(target=_serve, args=(child_pipe, builder, arguments), daemon=True)
        counts = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        with _environment(**counts, **(variables or {})):  # libraries read these variables when they are loaded
            self._process.start()
        self._answer()

    def call(self, job: str) -> Any:
        """Run a job and return its result."""
        return self._call(job)[0]

    def job(self, name: str) -> Callable[[], Scores]:
        """Return a job in the form that ``measure`` expects."""

        def run() -> Scores:
            items, seconds = self._call(name)
            return Scores(items, seconds)

        return run

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()

    def _call(self, job: str) -> tuple[Any, float]:
        self._pipe.send(job)
        return self._answer()

    def _answer(self) -> tuple[Any, float]:
        kind, *content = self._pipe.recv()
        if kind == "error":
            raise RuntimeError(content[0])
        return content[0], content[1]


@contextlib.contextmanager
def contenders(
    builders: Mapping[str, tuple[Any, ...]], *, threads: int = 1, variables: Mapping[str, str] | None = None
) -> Iterator[dict[str, Contender]]:
    """Start a process for each name from (builder, *arguments), with common ``variables``; end them afterwards."""
    with contextlib.ExitStack() as stack:
        running = {}
        for name, (builder, *arguments) in builders.items():
            running[name] = Contender(builder, *arguments, threads=threads, variables=variables)
            stack.callback(running[name].close)
        yield running


def call_fresh(module: str, calls: Sequence[Sequence[Any]]) -> list[Any]:
    """Call functions of a module in parallel, each in a new process that may start others; return their results."""
    code = f"import json, sys, {module} as it; name, *args = json.loads(sys.argv[1]); "
    code += "print(json.dumps(getattr(it, name)(*args)))"
    started = [
        subprocess.Popen([sys.executable, "-c", code, json.dumps(call)], stdout=subprocess.PIPE, text=True)
        for call in calls
    ]
    printed = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(f"{module}.{calls[0][0]} failed in a separate process.")
    return [json.loads(text.splitlines()[-1]) for text in printed]


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(pipe: Connection, builder: str, arguments: tuple[Any, ...]) -> None:
    warnings.simplefilter("ignore")  # deprecations in peers are irrelevant here
    module, _, function = builder.partition(":")
    try:
        jobs = getattr(importlib.import_module(module), function)(*arguments)
        pipe.send(("ready", None, 0.0))
        while True:
            name = pipe.recv()
            begun = time.perf_counter()
            result = jobs[name]()
            pipe.send(("done", result, time.perf_counter() - begun))
    except EOFError:
        pass
    except Exception as error:
        pipe.send(("error", f"{builder}{arguments}: {type(error).__name__}: {error}"))
        raise


def peak_mb(work: Callable[[], Any]) -> float:
    """Return the peak increase of this process's resident memory during ``work`` in MiB, including mapped files."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    before = _status_kb("VmRSS")
    work()
    return (_status_kb("VmHWM") - before) / 1024


def _status_kb(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
