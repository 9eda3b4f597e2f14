"""Memory does not grow with the number of images: the peak of a stage at two sizes, each in a separate process.

The bound, in bytes per additional image, is far below the 3,072 bytes of an image, so that the test fails if all images
are kept in memory, but not from noise.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

_SIZES = (20_000, 52_000)  # both larger than a block, where work is done in blocks of rows
_BYTES_PER_IMAGE = 1024  # allowed growth of a peak: a third of an image, a twelfth of its latent vector
_RECIPE = """
name = "memory"
[data]
path = "{source}"
[flow]
levels = 1
steps = 1
hidden = 4
evaluate_images = 64
[flow.training]
iterations = 1
batch_size = 32
[latents]
chunk_rows = 500
[mix]
chunk_rows = 500
[pools.pool]
method = "{method}"
"""
_MAPPED_BYTES = 64 * 500 * 12_288  # maximum size of mapped chunks, which the kernel may evict at any time
_PEAKS = """
import sys, threading
from pathlib import Path

def status(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) * 1024

def watch():
    while not done.wait(0.002):
        anonymous.append(status("RssAnon"))

done, anonymous = threading.Event(), [0]
watcher = threading.Thread(target=watch)
watcher.start()
try:
    {work}
finally:
    done.set()
    watcher.join()
print(max(anonymous), status("VmHWM"))  # not ru_maxrss, which a new process inherits from its parent
"""
_RUN = "from lsmix.pipeline.api import run; run(sys.argv[1], workspace=sys.argv[2], stage={stage!r}, device='cpu')"
_STREAM = """
    from lsmix.data.loaders.pool_loader import PoolLoader
    from lsmix.data.pool import open_pool
    (pool,) = Path(sys.argv[2], "mix").iterdir()
    print(sum(len(batch.images) for batch in PoolLoader(open_pool(pool), 128)))
"""


def _peaks(work, *words):
    """Return the peak memory of a process in bytes: anonymous, and including pages of mapped files."""
    # One arena, so that the peak does not depend on how glibc spreads memory over the arenas of several threads.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", _PEAKS.format(work=work), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    anonymous, resident = done.stdout.split()[-2:]
    return int(anonymous), int(resident)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Return a data set of random images for each size."""
    folder = tmp_path_factory.mktemp("sources")
    draw = np.random.default_rng(0)
    for count in _SIZES:
        images, labels = draw.integers(0, 256, (count + 10, 32, 32, 3), dtype=np.uint8), np.arange(count + 10) % 10
        np.savez(
            folder / f"{count}.npz",
            train_images=images[:count],
            train_labels=labels[:count],
            test_images=images[count:],
            test_labels=labels[count:],
        )
    return {count: folder / f"{count}.npz" for count in _SIZES}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from Linux's /proc")
@pytest.mark.parametrize("method", ["ls-mix", "mixup"])
def test_peaks_of_encode_mix_and_streaming_do_not_grow_with_the_images(method, sources, tmp_path):
    peaks = {"encode": [], "mix": [], "stream": []}
    for count, source in sources.items():
        recipe, workspace = tmp_path / f"{count}.toml", tmp_path / f"runs{count}"
        recipe.write_text(_RECIPE.format(source=source, method=method), encoding="utf-8")
        for stage in ("ingest", "train-glow"):
            _peaks(_RUN.format(stage=stage), recipe, workspace)
        for stage in ("encode", "mix"):
            peaks[stage].append(_peaks(_RUN.format(stage=stage), recipe, workspace))
        peaks["stream"].append(_peaks(_STREAM, recipe, workspace))
    for work, (small, large) in peaks.items():
        for kind, before, after in zip(("anonymous", "resident"), small, large, strict=True):
            most = (_SIZES[1] - _SIZES[0]) * _BYTES_PER_IMAGE
            if kind == "resident":
                most += _MAPPED_BYTES
            assert after - before < most, f"{work}: {before >> 20} MiB, then {after >> 20} MiB of {kind} memory"
