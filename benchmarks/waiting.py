"""Training steps under different OpenMP wait settings, on an idle and on a busy machine."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.contender import Contender
from benchmarks.turns import Scores, measure, save

_SETTINGS = {
    "OpenMP's default": {},
    "spins 10,000 times": {"GOMP_SPINCOUNT": "10000"},
    "spins 1,000 times": {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
}
_SECONDS = 1.5  # per turn


def run() -> None:
    """Measure and save, with no other busy process, with one, and with one per core."""
    cores = os.cpu_count() or 1
    tables: dict[str, Any] = {}
    for job in ("flow", "narrow", "wide"):
        with contextlib.ExitStack() as stack:
            works: dict[str, Callable[[], Scores]] = {}
            for name, variables in _SETTINGS.items():
                contender = Contender("benchmarks.waiting:steps", threads=cores, variables=variables)
                stack.callback(contender.close)
                works[name] = contender.job(job)
            for others in sorted({0, 1, cores}):
                title = f"{_TITLES[job]}, {cores} threads, {others} other busy processes"
                with _busy(others):
                    rows = measure(works, floor="OpenMP's default", title=title, turns=7, unit="steps")
                tables[title] = {"floor": "OpenMP's default", "unit": "steps", "rows": rows}
    save("waiting", tables)


_TITLES = {
    "flow": "a flow of 8×8×1 (L=2, K=4, width 32, batches of 64)",
    "narrow": "CNN-13 of width 16 (8×8×1, batches of 64)",
    "wide": "CNN-13 of width 64 (32×32×3, batches of 64)",
}


def steps() -> dict[str, Callable[[], Any]]:
    """Return the jobs; each trains for a while and returns its number of steps."""
    from lsmix.classifiers.config import ClassifierTraining
    from lsmix.classifiers.training import ClassifierTrainer
    from lsmix.data.loaders.array_loader import ArrayLoader
    from lsmix.glow.config import FlowConfig, FlowTraining
    from lsmix.glow.flow import Flow
    from lsmix.glow.training import FlowTrainer

    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (256, 8, 8, 1), dtype=np.uint8)
    large = rng.integers(0, 256, (256, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(256) % 10
    flow = Flow(FlowConfig(height=8, width=8, channels=1, levels=2, steps=4, hidden=32))
    of_flow = FlowTrainer(flow, FlowTraining(batch_size=64), small)

    def epochs(images: np.ndarray, width: int) -> Callable[[], int]:
        settings = ClassifierTraining(width=width, batch_size=64)
        trainer = ClassifierTrainer(settings, 10, images.shape[1:], seed=0, device="cpu")
        loader = ArrayLoader(images, labels, 64)
        return lambda: trainer.run_epoch(loader) and len(images) // 64

    works = {"flow": lambda: of_flow.step() and 1, "narrow": epochs(small, 16), "wide": epochs(large, 64)}
    return {name: lambda work=work: _for_a_while(work) for name, work in works.items()}


def _for_a_while(work: Callable[[], int]) -> int:
    begun, done = time.perf_counter(), 0
    while time.perf_counter() - begun < _SECONDS:
        done += work()
    return done


@contextlib.contextmanager
def _busy(count: int) -> Iterator[None]:
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in others:
            process.kill()
            process.wait()
