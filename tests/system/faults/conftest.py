"""The library that makes faults, and the process that runs trials."""

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
TIMEOUT_SECONDS = 1200  # of a driver on a busy machine; a whole stage, call by call, takes a tenth of it


@pytest.fixture(scope="session")
def faults_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the compiled library that makes calls of the system fail, or skip where none can be compiled."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("faults below Python need Linux and a C compiler, gcc or cc; there is none")
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", library, HERE / "faults.c", "-ldl"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


@pytest.fixture
def trials(faults_library: Path) -> Callable[..., Iterator[dict[str, Any]]]:
    """Return a function that plays a scene in a driver: the undisturbed run, and then each trial; see ``driver.Scene``."""

    def play(**scene: Any) -> Iterator[dict[str, Any]]:
        words = [sys.executable, HERE / "driver.py", faults_library, json.dumps(scene, default=str)]
        environment = {**os.environ, "LD_PRELOAD": str(faults_library), "PYTHONHASHSEED": "0"}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return (json.loads(line) for line in done.stdout.splitlines())

    return play
