"""Make latents and pools in every supported way, and compare their content digests with an undisturbed run.

``python -m benchmarks.same_bytes RECIPE --set data.path=…`` makes the data set and the flow once, then runs ``encode``
and ``mix`` in process, on two Dask workers, on two Dask workers of which one is killed, as a job array of three tasks
in parallel, and in one process that is killed ten times at random moments. It prints a line for each and exits with 1
if any digest differs.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from lsmix.pipeline.workspace.workspace import Workspace

__all__ = ["main"]

_STAGES = ("encode", "mix")
_KILLS = 10


def main() -> int:
    """Run the command line; return 0 if all ways gave the same bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="override a recipe field")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random kill times")
    options = parser.parse_args()
    words = [str(options.recipe), *(word for override in options.overrides for word in ("--set", override))]
    with tempfile.TemporaryDirectory(prefix="lsmix-same-") as folder:
        base = Path(folder, "base")
        if code := _lsmix("train-glow", words, base).wait():
            return code
        expected: dict[str, str] = {}
        differing = 0
        for name, way in _ways(random.Random(options.seed)).items():
            workspace = Path(shutil.copytree(base, Path(folder, "work")))
            begun = time.monotonic()
            note = way(words, workspace)
            digests = _digests(workspace)
            expected = expected or digests
            same = digests == expected and len(digests) >= len(_STAGES)
            differing += not same
            line = {
                "way": name,
                "seconds": round(time.monotonic() - begun, 1),
                "note": note,
                "same": same,
                "content_digests": digests,
            }
            print(json.dumps(line), flush=True)
            shutil.rmtree(workspace)
    return int(differing > 0)


def _ways(moments: random.Random) -> dict[str, Callable[[list[str], Path], str]]:
    return {
        "in process": _in_process,
        "2 Dask workers": lambda words, workspace: _on_dask(words, workspace, None),
        "2 Dask workers, one killed in each stage": lambda words, workspace: _on_dask(words, workspace, moments),
        "job array of 3": _job_array,
        f"{_KILLS} kills at random moments": lambda words, workspace: _killed(words, workspace, moments),
    }


def _in_process(words: list[str], workspace: Path) -> str:
    _lsmix("mix", words, workspace).wait()
    return ""


def _on_dask(words: list[str], workspace: Path, moments: random.Random | None) -> str:
    killed = 0
    for stage in _STAGES:
        run = _lsmix(stage, [*words, "--workers", "2"], workspace)
        if moments and _wait_for_record(run, workspace / stage):
            time.sleep(moments.uniform(0, 1))
            workers = [child for child in _children(run.pid) if b"spawn_main" in _command_line(child)]
            if workers and run.poll() is None:
                os.kill(moments.choice(workers), signal.SIGKILL)
                killed += 1
        run.wait()
    return f"{killed} workers killed" if moments else ""


def _job_array(words: list[str], workspace: Path) -> str:
    for stage in _STAGES:
        parts = [
            _lsmix(stage, [*words, "--array-index", str(part), "--array-size", "3"], workspace) for part in range(3)
        ]
        codes = [part.wait() for part in parts]
        if any(codes):
            return f"exit codes {codes}"
        _lsmix("finalize", words, workspace).wait()
    return ""


def _killed(words: list[str], workspace: Path, moments: random.Random) -> str:
    kills = in_work = 0
    while kills < _KILLS:
        run = _lsmix("mix", words, workspace)
        _wait_for_record(run, workspace)
        time.sleep(moments.uniform(0, 2))
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            kills += 1
        run.wait()
        unfinished = [path for path in workspace.glob("*/*/work") if not path.with_name("manifest.json").exists()]
        in_work += bool(unfinished)
        if not unfinished and len(_digests(workspace)) >= len(_STAGES):  # all stages were finished: start over
            for stage in _STAGES:
                shutil.rmtree(workspace / stage)
    _lsmix("mix", words, workspace).wait()
    return f"{kills} kills, {in_work} of them in unfinished work"


def _lsmix(command: str, words: list[str], workspace: Path) -> "subprocess.Popen[bytes]":
    call = [sys.executable, "-m", "lsmix", command, *words, "--workspace", str(workspace), "--device", "cpu", "--quiet"]
    return subprocess.Popen(call, stdout=subprocess.DEVNULL, start_new_session=True)


def _wait_for_record(run: "subprocess.Popen[bytes]", folder: Path) -> bool:
    """Wait until another shard is recorded below a folder; return False if the run ends before."""
    before = _records(folder)
    while run.poll() is None:
        if _records(folder) - before:
            return True
        time.sleep(0.01)
    return False


def _records(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*.json") if path.parent.name == "ledger"}


def _children(process: int) -> list[int]:
    """Return all descendants of a process, as listed in /proc."""
    found, parents = [], [process]
    while parents:
        parent = parents.pop()
        for task in Path(f"/proc/{parent}/task").glob("*"):
            try:
                children = [int(word) for word in (task / "children").read_text().split()]
            except OSError:
                continue
            found += children
            parents += children
    return found


def _command_line(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def _digests(workspace: Path) -> dict[str, str]:
    opened = Workspace(workspace)
    return {
        f"{stage} {manifest.name}": manifest.content_digest
        for stage in _STAGES
        for _, manifest in opened.manifests(stage)
    }


if __name__ == "__main__":
    sys.exit(main())
