"""A recipe whose stages take a tenth of a second, and the data set of random images that it is for."""

from pathlib import Path

import numpy as np

RECIPE = """\
name = "small"
[data]
path = "images.npz"
format = "npz"
heldout = 4
[flow]
levels = 1
steps = 1
hidden = 4
threads = 1
checkpoint_every = 1
evaluate_every = 2
evaluate_images = 4
[flow.training]
iterations = 2
batch_size = 8
warmup = 1
flip = false
translate = 0
[latents]
chunk_rows = 8
[pools.mixed]
alpha = 0.4
chunk_rows = 8
[classifier]
threads = 1
width = 2
epochs = 2
batch_size = 8
flip = false
translate = 0
[runs.mixed]
pool = "mixed"
[naturalness]
methods = ["ls-mix", "mixup"]
pairs = 2
bootstrap = 10
classifier = "mixed"
[report]
pairs = 1
bits_images = 8
"""


def write_images(path: Path, labels: np.ndarray, test_labels: np.ndarray | None = None) -> Path:
    """Write a data set of random grey images with these labels."""
    draw = np.random.default_rng(0)
    arrays = {"train_images": draw.integers(0, 256, (len(labels), 8, 8), dtype=np.uint8), "train_labels": labels}
    if test_labels is not None:
        arrays["test_images"] = draw.integers(0, 256, (len(test_labels), 8, 8), dtype=np.uint8)
        arrays["test_labels"] = test_labels
    np.savez(path, **arrays)
    return path
