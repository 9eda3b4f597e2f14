"""Kill every stage at random moments, resume it, and compare the result with an undisturbed run, byte for byte.

``python -m benchmarks.kill_resume --kills 20 RECIPE`` kills each stage 20 times with SIGKILL, restarts it each time,
and prints a line per stage. The kills are spread over the run time of the stage without start-up, so that most of them
interrupt work and not imports.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from lsmix.pipeline.stages.registry import STAGES
from lsmix.pipeline.workspace.workspace import Workspace

__all__ = ["main"]

_KILLED_STAGES = STAGES[:-1]  # the report shows durations, so its bytes always differ


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """The result of one stage."""

    stage: str
    kills: int  # kills that hit a running process
    in_work: int  # how many of these left unfinished work on disk
    same: bool  # whether all content digests equal those of the undisturbed run
    seconds: float  # from the first start to the end


def main() -> int:
    """Run the command line; return 0 if every stage ended with the bytes of the undisturbed run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--kills", type=int, default=20, help="number of kills per stage")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random kill times")
    parser.add_argument("--stages", nargs="*", default=list(_KILLED_STAGES), choices=_KILLED_STAGES)
    parser.add_argument("--options", default="", help="more options for lsmix, such as '--workers 2'")
    options = parser.parse_args()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="lsmix-kill-") as folder:
        undisturbed, disturbed = Path(folder, "undisturbed"), Path(folder, "disturbed")
        _command("report", options.recipe, undisturbed, options.options).wait()  # the only stage that needs every pool
        shutil.copytree(undisturbed, disturbed)
        outcomes = []
        for stage in options.stages:
            outcomes.append(_kill_stage(stage, options, undisturbed, disturbed, moments))
            print(_line(outcomes[-1]), flush=True)
    print(f"\n{sum(item.kills for item in outcomes)} kills, {sum(not item.same for item in outcomes)} stages differ")
    return int(not all(item.same for item in outcomes))


def _kill_stage(
    stage: str, options: argparse.Namespace, undisturbed: Path, disturbed: Path, moments: random.Random
) -> StageResult:
    for later in STAGES[STAGES.index(stage) :]:
        shutil.rmtree(disturbed / later, ignore_errors=True)
    begun = time.monotonic()
    work = sum(manifest.seconds for _, manifest in Workspace(undisturbed).manifests(stage))
    kills = in_work = 0
    for _ in range(options.kills):
        process = _command(stage, options.recipe, disturbed, options.options)
        _wait_for_start(process, disturbed / stage)
        time.sleep(moments.uniform(0, max(work, 0.05)))
        hit = process.poll() is None
        if hit:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += hit
        in_work += hit and any(
            not path.with_name("manifest.json").exists() for path in disturbed.glob(f"{stage}/*/work")
        )
        if _digests(disturbed, stage).keys() == _digests(undisturbed, stage).keys():  # finished already: start over
            shutil.rmtree(disturbed / stage)
    _command(stage, options.recipe, disturbed, options.options).wait()
    same = _digests(disturbed, stage) == _digests(undisturbed, stage)
    return StageResult(stage=stage, kills=kills, in_work=in_work, same=same, seconds=time.monotonic() - begun)


def _command(stage: str, recipe: Path, workspace: Path, options: str) -> "subprocess.Popen[bytes]":
    words = [
        sys.executable,
        "-m",
        "lsmix",
        stage,
        str(recipe),
        "--workspace",
        str(workspace),
        "--quiet",
        *options.split(),
    ]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, start_new_session=True)


def _wait_for_start(process: "subprocess.Popen[bytes]", stage_folder: Path) -> None:
    """Wait until the stage writes something or ends."""
    before = _newest(stage_folder)
    while process.poll() is None and _newest(stage_folder) == before:
        time.sleep(0.002)


def _newest(folder: Path) -> int:
    newest = 0
    for path in folder.rglob("*"):
        try:
            newest = max(newest, path.stat().st_mtime_ns)
        except FileNotFoundError:  # renamed or removed in the meantime
            continue
    return newest


def _digests(workspace: Path, stage: str) -> dict[str, str]:
    return {manifest.cache_key: manifest.content_digest for _, manifest in Workspace(workspace).manifests(stage)}


def _line(outcome: StageResult) -> str:
    verdict = "same bytes" if outcome.same else "DIFFERS"
    return (
        f"{outcome.stage:<12} {outcome.kills:>4} kills, {outcome.in_work:>4} in unfinished work, "
        f"{outcome.seconds:7.1f} s, {verdict}"
    )


if __name__ == "__main__":
    sys.exit(main())
