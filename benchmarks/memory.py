"""Peak memory of each stage at three data set sizes, each stage in a separate process.

*Anonymous* memory is private to the process and cannot be reclaimed. *Resident* memory also includes pages of mapped
files, which the kernel reclaims if necessary. Both are increases over the memory after all imports.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pools import SHAPE, smooth_images
from benchmarks.turns import save

_SIZES = (2_000, 10_000, 50_000)
_SHARDS = {"shards of 1,000 images": 1000, "default shards, about 25 MB": 0}
_TEST = 500
_RECIPE = """
name = "memory"
[data]
path = "{source}"
[flow]
levels = 3
steps = 2
hidden = 32
threads = 1
evaluate_images = 64
[flow.training]
iterations = 2
batch_size = 32
[latents]
chunk_rows = {chunk_rows}
[pools.{pool}]
method = "{method}"
chunk_rows = {chunk_rows}
[classifier]
width = 2
threads = 1
epochs = 1
[runs.one]
pool = "{pool}"
seeds = [0]
"""
_CODE = """
import json, sys, threading, time
from pathlib import Path
import torch, h5py, zarr
import lsmix.pipeline.api, lsmix.pipeline.stages.mix, lsmix.pipeline.views.dataset_card.card, lsmix.data.loaders.pool_loader
from benchmarks.memory import JOBS

def status(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) / 1024

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], status("RssAnon"))
        done.wait(0.002)

before = {field: status(field) for field in ("RssAnon", "VmRSS")}
Path("/proc/self/clear_refs").write_text("5")  # resets the peak
done, peak = threading.Event(), [0.0]
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
begun = time.perf_counter()
JOBS[sys.argv[1]](*sys.argv[2:])
seconds = time.perf_counter() - begun
done.set()
watcher.join()
print(json.dumps({
    "anonymous": peak[0] - before["RssAnon"],
    "resident": status("VmHWM") - before["VmRSS"],
    "seconds": seconds,
    "before": before["VmRSS"],
}))
"""


def _stage(stage: str) -> Any:
    def job(recipe: str, workspace: str, _found: str) -> None:
        from lsmix.pipeline.api import run

        run(recipe, workspace=workspace, stage=stage, device="cpu")

    return job


def _stream(_recipe: str, _workspace: str, pool: str) -> None:
    from lsmix.data.loaders.pool_loader import PoolLoader
    from lsmix.data.pool import open_pool

    seen = sum(len(batch.images) for batch in PoolLoader(open_pool(pool), 128))
    if seen != len(open_pool(pool)):
        raise RuntimeError(f"An epoch of {pool} yielded {seen} images.")


def _verify(_recipe: str, _workspace: str, pool: str) -> None:
    from lsmix.pipeline.api import verify

    verify(pool)


def _export(_recipe: str, workspace: str, pool: str) -> None:
    from lsmix.pipeline.api import export_pool

    export_pool(pool, Path(workspace, "exported"), format="hdf5")


JOBS = {
    **{stage: _stage(stage) for stage in ("ingest", "train-glow", "encode", "mix", "train")},
    "stream": _stream,
    "verify": _verify,
    "export": _export,
}
_WORK = (  # title, job, and mixing method of the pool
    ("ingest", "ingest", "ls-mix"),
    ("train-glow", "train-glow", "ls-mix"),
    ("encode", "encode", "ls-mix"),
    ("mix, LS-Mix", "mix", "ls-mix"),
    ("mix, Mixup", "mix", "mixup"),
    ("a shuffled epoch", "stream", "ls-mix"),
    ("train on a pool", "train", "ls-mix"),
    ("verify", "verify", "ls-mix"),
    ("export to HDF5", "export", "ls-mix"),
)


def run() -> None:
    """Measure and save."""
    tables: dict[str, Any] = {}
    for title, chunk_rows in _SHARDS.items():
        columns = {count: _measure(count, chunk_rows) for count in _SIZES}
        for kind in ("anonymous", "resident"):
            tables[f"peak of {kind} memory, MiB, {title}"] = {
                "figures": {
                    name: {f"{count:,} images": columns[count][name][kind] for count in _SIZES} for name, _, _ in _WORK
                }
            }
    save("memory", tables, images=list(_SIZES), image_shape=list(SHAPE))


def _measure(count: int, chunk_rows: int) -> dict[str, dict[str, float]]:
    print(f"\n{count} images, {f'shards of {chunk_rows}' if chunk_rows else 'default shards'}", flush=True)
    figures = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = folder / "images.npz"
        _write_source(source, count)
        for method in ("ls-mix", "mixup"):
            text = _RECIPE.format(source=source, chunk_rows=chunk_rows, pool=method.replace("-", ""), method=method)
            (folder / f"{method}.toml").write_text(text, encoding="utf-8")
        for name, job, method in _WORK:
            pools = sorted(folder.glob(f"runs/mix/{method.replace('-', '')}-*"))
            words = [job, str(folder / f"{method}.toml"), str(folder / "runs"), str(pools[0]) if pools else ""]
            figures[name] = _in_a_process(words)
            used = figures[name]
            print(
                f"  {name:<18} anonymous {used['anonymous']:>6.0f} MiB  resident {used['resident']:>6.0f} MiB  "
                f"above {used['before']:.0f}; {used['seconds']:.1f} s",
                flush=True,
            )
    return figures


def _write_source(path: Path, count: int) -> None:
    images = smooth_images(count + _TEST)
    labels = np.arange(len(images)) % 10
    np.savez(
        path,
        train_images=images[:count],
        train_labels=labels[:count],
        test_images=images[count:],
        test_labels=labels[count:],
    )


def _in_a_process(words: list[str]) -> dict[str, float]:
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # less sensitive to other load; times are secondary here
    command = [sys.executable, "-c", _CODE, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=one_thread)
    if done.returncode:
        raise RuntimeError(f"{words} failed:\n{done.stderr}")
    used: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return used
