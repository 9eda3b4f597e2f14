"""Streaming a shuffled epoch of a pool against random rows of a memory map, and a DataLoader over one."""

import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.turns import measure, save
from lsmix.data.loader import PoolLoader
from lsmix.data.manifest import Manifest, record_files, root_digest, write_manifest
from lsmix.data.pool import create_pool, open_pool, write_pool_shard

_IMAGES = 50_000
_BATCH = 128


def _make_pool(folder: Path, images: np.ndarray) -> None:
    names = tuple(str(label) for label in range(10))
    store = create_pool(
        folder, images_per_copy=_IMAGES, copies=1, image_shape=(32, 32, 3), class_names=names, method="ls-mix"
    )
    for shard in range(store.shards):
        rows = np.arange(store.shard_range(shard).start, store.shard_range(shard).stop)
        numbers = {"source_a": rows, "source_b": rows, "label_a": rows % 10, "label_b": rows % 10}
        halves = np.full(len(rows), 0.5, np.float32)
        state = np.zeros(len(rows), np.uint8)
        write_pool_shard(
            folder, shard, {"image": images[rows], **numbers, "lam": halves, "share_b": halves, "state": state}
        )
    files = record_files(folder)
    facts = {"stage": "mix", "stage_version": 1, "name": "bench", "key": "0" * 12}
    write_manifest(folder, Manifest(**facts, root=root_digest(files), config={}, inputs=[], files=files))


class _Rows(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(self, images: np.ndarray) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitems__(self, rows: list[int]) -> torch.Tensor:
        return torch.from_numpy(self._images[rows])


def _same(batch: torch.Tensor) -> torch.Tensor:
    return batch


def run() -> None:
    """Measure and save."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        images = np.random.default_rng(0).integers(0, 256, (_IMAGES, 32, 32, 3), dtype=np.uint8)
        np.save(folder / "images.npy", images)
        _make_pool(folder / "pool", images)
        mapped = np.load(folder / "images.npy", mmap_mode="r")
        pool = open_pool(folder / "pool")
        totals = []

        def random_rows() -> int:
            order = np.random.default_rng(1).permutation(_IMAGES)
            totals.append(sum(int(mapped[order[i : i + _BATCH]][:, 0].sum()) for i in range(0, _IMAGES, _BATCH)))
            return _IMAGES

        def data_loader() -> int:
            loader = torch.utils.data.DataLoader(_Rows(mapped), _BATCH, shuffle=True, collate_fn=_same)
            totals.append(sum(int(batch.numpy()[:, 0].sum()) for batch in loader))
            return _IMAGES

        def streamed() -> int:
            loader = PoolLoader(pool, _BATCH, seed=0)
            totals.append(sum(int(batch.images.numpy()[:, :, 0].sum()) for batch in loader))
            return _IMAGES

        contenders = {
            "random rows of a memory map": random_rows,
            "DataLoader over it": data_loader,
            "PoolLoader": streamed,
        }
        print(
            f"a shuffled epoch of {_IMAGES} images, batches of {_BATCH}, one core, warm; the first line of each is summed as a check"
        )
        results = measure(contenders, floor="random rows of a memory map", turns=5)
        if len(set(totals)) != 1:
            raise RuntimeError("the contenders did not read the same pixels: something was skipped")
    print(f"written to {save('stream', {'images': _IMAGES, 'batch': _BATCH, 'results': results})}")
