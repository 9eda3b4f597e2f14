"""Pools of synthetic images, complete like pools of the mix stage, for benchmarks of readers."""

from pathlib import Path

import numpy as np

from lsmix.data.artifact import Manifest, content_digest, record_files, write_manifest
from lsmix.data.pool import create_pool, write_pool_shard

__all__ = ["SHAPE", "make_pool", "smooth_images"]

SHAPE = (32, 32, 3)


def smooth_images(count: int, seed: int = 0) -> np.ndarray:
    """Return smooth images with some noise, about as compressible as photographs, uint8 (count, 32, 32, 3)."""
    draw = np.random.default_rng(seed)
    ends = draw.uniform(0, 255, (2, count, 1, 1, 3)).astype(np.float32)
    slope = np.linspace(0, 1, 32, dtype=np.float32)[None, :, None, None]
    noise = draw.normal(0, 8, (min(count, 4096), *SHAPE)).astype(np.float32)
    images = ends[0] + (ends[1] - ends[0]) * slope + noise[np.arange(count) % len(noise)]
    return np.clip(images, 0, 255).astype(np.uint8)


def make_pool(folder: Path, images: np.ndarray) -> None:
    """Write a pool of one copy; both sources of row i are training image i, and its label is i modulo 10."""
    names = tuple(str(label) for label in range(10))
    store = create_pool(
        folder, images_per_copy=len(images), copies=1, image_shape=SHAPE, class_names=names, method="ls-mix"
    )
    for shard in range(store.shards):
        rows = np.asarray(store.shard_range(shard))
        numbers = {"source_a": rows, "source_b": rows, "label_a": rows % 10, "label_b": rows % 10}
        share = np.zeros(len(rows), np.float32)
        more = {"lam": share, "share_b": share, "status": np.zeros(len(rows), np.uint8)}
        write_pool_shard(folder, shard, {"image": images[rows], **numbers, **more})
    files = record_files(folder)
    facts = {"stage": "mix", "stage_version": 1, "name": "bench", "cache_key": "0" * 12}
    write_manifest(folder, Manifest(**facts, content_digest=content_digest(files), config={}, inputs=[], files=files))
