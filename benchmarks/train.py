"""Training epochs of a classifier fed by the pool loader, against the same classifier fed from memory."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pools import make_pool, smooth_images
from benchmarks.turns import Scores, measure, save

_IMAGES = 2048
_BATCH = 128
_WIDTH = 16  # of CNN-13: narrow and fast, so that the classifier waits for images rather than the loader for it


def run() -> None:
    """Measure and save."""
    import torch

    from lsmix.pipeline.engine.device import prepare_device

    tables: dict[str, Any] = {}
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        prepare_device(device)
        torch.set_num_threads(os.cpu_count() or 1)
        with tempfile.TemporaryDirectory() as temporary:
            images = smooth_images(_IMAGES)
            make_pool(Path(temporary, "pool"), images)
            title = f"epochs of a CNN-13 of width {_WIDTH}, {_IMAGES} images, batches of {_BATCH}, {device}"
            rows = measure(
                _jobs(Path(temporary, "pool"), images, device), floor="fed from memory", title=title, turns=7
            )
        tables[title] = {"floor": "fed from memory", "unit": "images", "rows": rows}
    save("train", tables)


def _jobs(pool: Path, images: np.ndarray, device: str) -> dict[str, Callable[[], Scores]]:
    from lsmix.classifiers.config import ClassifierTraining
    from lsmix.classifiers.training import ClassifierTrainer
    from lsmix.data.loaders.array_loader import ArrayLoader
    from lsmix.data.loaders.pool_loader import PoolLoader
    from lsmix.data.pool import open_pool

    labels = np.arange(len(images)) % 10
    sources = {
        "fed from memory": ArrayLoader(images, labels, _BATCH),
        "fed by PoolLoader": PoolLoader(open_pool(pool), _BATCH),
    }

    def job(loader: Any) -> Callable[[], Scores]:
        trainer = ClassifierTrainer(
            ClassifierTraining(width=_WIDTH, batch_size=_BATCH), 10, (32, 32, 3), seed=0, device=device
        )

        def epoch() -> Scores:
            begun = time.perf_counter()
            trainer.run_epoch(loader)
            seconds = time.perf_counter() - begun
            seen = loader.state_dict()["position"]
            if seen != _IMAGES:
                raise RuntimeError(f"Expected an epoch of {_IMAGES} images, got {seen}.")
            return Scores(seen, seconds)

        return epoch

    return {name: job(loader) for name, loader in sources.items()}
