"""Fixtures for fault injection: the compiled library, and the process that runs the trials."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def faults_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the compiled library that makes system calls fail; skip the test if it cannot be compiled."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler (gcc or cc)")
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", library, HERE / "faults.c", "-ldl"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


@pytest.fixture(scope="session")
def trials(faults_library: Path) -> Iterator[Callable[..., list[list[dict[str, Any]]]]]:
    """Return a function that runs the trials of a ``driver.Scene``, each kind after an undisturbed run."""
    words = [sys.executable, HERE / "driver.py", faults_library]
    environment = {**os.environ, "LD_PRELOAD": str(faults_library), "PYTHONHASHSEED": "0"}
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(words, env=environment, text=True, **streams) as driver:

        def play(**scene: Any) -> list[list[dict[str, Any]]]:
            print(json.dumps(scene, default=str), file=driver.stdin, flush=True)
            answer = driver.stdout.readline()
            if not answer.startswith("["):
                driver.stdin.close()  # the driver exits when its input is closed
                raise AssertionError(answer + driver.stdout.read())
            return json.loads(answer)

        yield play
        driver.stdin.close()
