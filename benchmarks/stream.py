"""A shuffled epoch of a pool: lsmix against floors and other loaders: warm, cold, first batch, memory, disk."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contender import contenders
from benchmarks.loaders import BATCH, write
from benchmarks.pools import SHAPE, make_pool, smooth_images
from benchmarks.turns import Scores, measure, save
from lsmix.data.pool import create_pool, write_pool_shard

_IMAGES = 50_000  # like CIFAR-10
_FEW = 10_000  # for loaders that need seconds for so many images
_FLOOR = "random rows of a memory map"
_PEERS = ("webdataset", "mosaicml-streaming", "litdata", "HF datasets")
_FIRST = """
import sys, time, torch, numpy
begun = time.perf_counter()
from lsmix.data.pool import open_pool
from lsmix.data.loaders.pool_loader import PoolLoader
imported = time.perf_counter()
batch = next(iter(PoolLoader(open_pool(sys.argv[1]), 128)))
print(time.perf_counter() - imported, imported - begun)
"""


def run() -> None:
    """Measure and save."""
    tables: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        images = smooth_images(_IMAGES)
        for name in ("lsmix", "array"):
            write(name, folder / name, images)
        _one_thread(tables, folder)
        _two_threads(tables, folder)
        _cold(tables, folder)
        _peers(tables, folder, images[:_FEW])
        _writing(tables, folder, images[:8192])
        tables["first batch and memory"] = {"figures": _first_batch_and_memory(folder)}
    save("stream", tables, images=_IMAGES, batch=BATCH)


def _epochs(
    tables: dict[str, Any],
    title: str,
    builders: Mapping[str, tuple[str, Path, dict[str, Any]]],
    *,
    floor: str,
    turns: int,
) -> None:
    """Measure epochs, and check that all loaders saw the same images."""
    spawned = {
        name: ("benchmarks.loaders:loader_jobs", kind, str(path), options)
        for name, (kind, path, options) in builders.items()
    }
    with contenders(spawned) as running:
        table = measure({name: it.job("epoch") for name, it in running.items()}, floor=floor, title=title, turns=turns)
        sums = {name: it.call("sums") for name, it in running.items()}
    if len(set(sums.values())) != 1:
        raise RuntimeError(f"The loaders did not yield the same images: {sums}")
    tables[title] = {"floor": floor, "unit": "images", "rows": table}


def _one_thread(tables: dict[str, Any], folder: Path) -> None:
    pool, array = folder / "lsmix", folder / "array"
    alone = {"read_ahead_bytes": 0}
    builders: dict[str, tuple[str, Path, dict[str, Any]]] = {
        "sequential read": ("sequential read", array, {}),
        _FLOOR: ("random rows", array, {}),
        "lsmix, no thread": ("lsmix", pool, alone),
        "lsmix, no thread, reopened, CRC of all": ("lsmix", pool, {**alone, "reopen": True}),
        "lsmix, no thread, reopened, no CRC": ("lsmix", pool, {**alone, "reopen": True, "check_crc": False}),
        "DataLoader with __getitems__": ("map-style DataLoader", array, {"by_batch": True}),
        "DataLoader, image by image": ("map-style DataLoader", array, {"by_batch": False}),
    }
    _epochs(tables, f"{_IMAGES} images, batches of {BATCH}, one thread, warm", builders, floor=_FLOOR, turns=5)


def _two_threads(tables: dict[str, Any], folder: Path) -> None:
    builders: dict[str, tuple[str, Path, dict[str, Any]]] = {
        _FLOOR: ("random rows", folder / "array", {"ahead": True}),
        "lsmix": ("lsmix", folder / "lsmix", {}),
    }
    title = f"{_IMAGES} images, batches of {BATCH}, a thread reads ahead, warm"
    _epochs(tables, title, builders, floor=_FLOOR, turns=5)


def _peers(tables: dict[str, Any], folder: Path, images: np.ndarray) -> None:
    sizes = {}
    for name in ("lsmix", "array", *_PEERS):
        begun = time.perf_counter()
        write(name, folder / f"few {name}", images)
        seconds = time.perf_counter() - begun
        stored = sum(path.stat().st_size for path in (folder / f"few {name}").rglob("*") if path.is_file())
        sizes[name] = {"bytes per image": stored / len(images), "seconds to write": seconds}
    builders: dict[str, tuple[str, Path, dict[str, Any]]] = {
        _FLOOR: ("random rows", folder / "few array", {"passes": 20}),
        "lsmix": ("lsmix", folder / "few lsmix", {"passes": 20}),
        "lsmix, no thread": ("lsmix", folder / "few lsmix", {"passes": 20, "read_ahead_bytes": 0}),
    }
    builders |= {name: (name, folder / f"few {name}", {}) for name in _PEERS}
    _epochs(tables, f"{len(images)} images, other loaders, warm", builders, floor="lsmix", turns=3)
    tables["on disk"] = {"figures": sizes}


def _cold(tables: dict[str, Any], folder: Path) -> None:
    """Measure with the files dropped from the page cache before each turn, as far as the kernel allows."""

    def cold(work: Callable[[], Scores]) -> Callable[[], Scores]:
        def run() -> Scores:
            os.sync()
            for path in folder.rglob("*"):
                if path.is_file():
                    with path.open("rb") as file:
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return work()

        return run

    builders: dict[str, tuple[Any, ...]] = {
        "sequential read": ("benchmarks.stream:cold_jobs", "sequential read", str(folder / "array")),
        _FLOOR: ("benchmarks.stream:cold_jobs", "random rows", str(folder / "array")),
        "lsmix": ("benchmarks.stream:cold_jobs", "lsmix", str(folder / "lsmix")),
    }
    title = f"{_IMAGES} images, cold cache, reopened"
    with contenders(builders) as running:
        work = {name: cold(it.job("epoch")) for name, it in running.items()}
        rows = measure(work, floor=_FLOOR, title=title, turns=3)
    tables[title] = {"floor": _FLOOR, "unit": "images", "rows": rows}


def cold_jobs(name: str, folder: str) -> dict[str, Callable[[], Any]]:
    """Return a job for an epoch that opens all files first, so that no memory map keeps pages in the cache."""
    from benchmarks.loaders import loader_jobs

    return {"epoch": lambda: loader_jobs(name, folder, {})["epoch"]()}


def _writing(tables: dict[str, Any], folder: Path, images: np.ndarray) -> None:
    """Measure writing one shard of a pool (25 MB, flushed, hashed, renamed) against writing only an array's bytes."""
    create_pool(
        folder / "written",
        images_per_copy=len(images),
        copies=1,
        image_shape=SHAPE,
        class_names=("a", "b"),
        method="ls-mix",
        chunk_rows=len(images),
    )
    zeros = {name: np.zeros(len(images), np.int64) for name in ("source_a", "source_b", "label_a", "label_b")}
    more = {"lam": np.zeros(len(images), np.float32), "share_b": np.zeros(len(images), np.float32)}
    columns = {"image": images, **zeros, **more, "status": np.zeros(len(images), np.uint8)}

    def flushed() -> int:
        with (folder / "flat").open("wb") as file:
            images.tofile(file)
            os.fsync(file.fileno())
        return len(images)

    def unflushed() -> int:
        images.tofile(folder / "flat")
        return len(images)

    def shard() -> int:
        write_pool_shard(folder / "written", 0, columns)
        return len(images)

    contestants = {"tofile": unflushed, "tofile, flushed": flushed, "a shard of a pool, all columns": shard}
    title = "writing 8,192 images"
    rows = measure(contestants, floor="tofile, flushed", title=title, turns=7)
    tables[title] = {"floor": "tofile, flushed", "unit": "images", "rows": rows}


def _first_batch_and_memory(folder: Path) -> dict[str, float]:
    figures: dict[str, float] = {}
    for count in (10_000, 50_000, 200_000):
        pool = folder / f"pool of {count}"
        make_pool(pool, smooth_images(count))
        words = [sys.executable, "-c", _FIRST, str(pool)]
        took = [
            float(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[0]) for _ in range(5)
        ]
        figures[f"first batch of {count} images, ms"] = 1000 * sorted(took)[2]
        with contenders({"lsmix": ("benchmarks.loaders:loader_jobs", "lsmix", str(pool), {})}) as running:
            figures[f"memory of an epoch of {count} images, MiB"] = running["lsmix"].call("memory")
    print(f"\ntime from opening a pool to its first batch, and memory\n  {figures}")
    return figures
