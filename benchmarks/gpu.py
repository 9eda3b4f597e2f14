"""``make gpu``: run the GPU tests, then measure the speed and exactness of every part on a GPU within four minutes.

``--tiny`` does the same at toy size on the CPU, to check that everything works; its numbers are meaningless.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import roofline
from benchmarks.gpu_sections import FULL, TINY, Bench
from benchmarks.sections import Results, card_name, copy_to_out, environment, results_folder

__all__ = ["add_common_options", "main", "require_cuda"]

_ROOT = Path(__file__).resolve().parents[1]
_TEST_SECONDS = 150.0

# Section -> (work, time limit in seconds), in order.
_SECTIONS: dict[str, tuple[Callable[[Bench], None], float]] = {
    "flow: training step": (Bench.training, 55.0),
    "flow: encode and decode": (Bench.passes, 35.0),
    "flow: NumPy to NumPy": (Bench.arrays, 20.0),
    "flow: TF32 in both directions": (Bench.tf32, 10.0),
    "fused convolution, bias and ReLU": (Bench.fused, 10.0),
    "classifier: training step": (Bench.classifiers, 45.0),
    "mix stage, disk to disk": (Bench.mix_stage, 35.0),
    "kernel profiles": (Bench.profiles, 25.0),
}


def main(words: list[str]) -> int:
    """Run the command line; return 1 if a section failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    add_common_options(parser)
    parser.add_argument("--minutes", type=float, default=4.0, help="time limit of the measurements, without the tests")
    parser.add_argument("--no-tests", action="store_true", help="skip the tests that are marked gpu")
    options = parser.parse_args(words)
    device = "cpu" if options.tiny else require_cuda()
    about = environment(device)
    folder = options.out or results_folder(about["date"][:10], card_name(device))
    about["predicted"] = f"by a roofline model for {roofline.CARD}, accurate to about ±40%"
    if options.tiny:
        about["size"] = "toy size on the CPU: the numbers are meaningless"
    results = Results(folder, f"First run on {about['device']}", about)
    if not options.no_tests:
        results.section("tests marked gpu", lambda: _test(results, tiny=options.tiny), seconds=_TEST_SECONDS)
    bench = Bench(results, device, TINY if options.tiny else FULL)
    end = time.monotonic() + 60.0 * options.minutes
    for name, (work, seconds) in _SECTIONS.items():
        results.section(name, lambda work=work: work(bench), seconds=min(seconds, end - time.monotonic()))
        bench.free()
    failed = [name for name, section in results.sections.items() if section["status"] == "failed"]
    results.info(f"\nResults: {folder}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    copy_to_out(folder, folder.name)
    return 1 if failed else 0


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that ``gpu`` and ``gpu-evidence`` share."""
    parser.add_argument("--out", type=Path, help="folder for the results (default: a new folder below results/)")
    parser.add_argument("--tiny", action="store_true", help="toy size on the CPU, to check that everything works")


def require_cuda() -> str:
    """Prepare CUDA and return "cuda"; exit with a message if there is no CUDA device."""
    import torch

    from lsmix.pipeline.engine.device import prepare_device

    if not torch.cuda.is_available():
        sys.exit(
            "This measurement needs a CUDA device, but torch finds none. Add --tiny to run it at toy size on the CPU."
        )
    prepare_device("cuda")
    return "cuda"


def _marked_files() -> list[Path]:
    """Return the test files that contain tests marked gpu."""
    return [path for path in sorted((_ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]


def _test(results: Results, *, tiny: bool) -> None:
    """Run the tests marked gpu in a separate process and write their output to tests.txt.

    Only files with such tests are collected, because a GPU machine may lack imports of the other files.
    """
    marked = _marked_files()[:1] if tiny else _marked_files()
    words = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--durations=8"]
    done = subprocess.run(
        [sys.executable, *words, "--continue-on-collection-errors", *map(str, marked)],
        cwd=_ROOT,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    (results.folder / "tests.txt").write_text(done.stdout, encoding="utf-8")
    last = done.stdout.strip().splitlines()[-1:] or [""]
    counts = {what: int(count) for count, what in re.findall(r"(\d+) (passed|failed|skipped|error)", last[0])}
    for what, count in counts.items():
        results.add(f"tests {what}", count, "tests")
    if done.returncode:
        raise RuntimeError(f"pytest exited with code {done.returncode}, see tests.txt: {last[0]}")
