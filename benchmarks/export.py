"""Export of a pool of 50,000 images in every format: images per second, and peak memory above the bare interpreter.

Each format runs in a separate process, so that its peak is measured alone; it includes the imported libraries.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.pools import make_pool, smooth_images
from benchmarks.turns import save

_IMAGES = 50_000
_EXPORTS = {
    "hdf5": {"format": "hdf5"},
    "parquet": {"format": "parquet"},
    "parquet, webp": {"format": "parquet", "image": "webp"},
    "webdataset": {"format": "webdataset"},
    "folder": {"format": "folder"},
}
_CODE = """
import json, sys, time
from pathlib import Path
def peak():  # not ru_maxrss, which a new process inherits from its parent
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
begun_with = peak()
from lsmix.pipeline.api import export_pool
source, target, options = sys.argv[1:]
begun = time.perf_counter()
facts = export_pool(source, target, **json.loads(options))
seconds = time.perf_counter() - begun
used = {"seconds": seconds, "cpu_seconds": time.process_time(), "peak_mb": (peak() - begun_with) / 1024}
print(json.dumps({**used, **facts}))
"""


def _measure(source: Path, target: Path, options: dict[str, str]) -> dict[str, float]:
    words = [sys.executable, "-c", _CODE, str(source), str(target), json.dumps(options)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    facts = json.loads(done.stdout)
    rate = _IMAGES / facts["seconds"]
    print(
        f"{target.name:<24} {rate:>9.0f} images/s  ({facts['cpu_seconds']:.1f} s of a core)"
        f"  peak {facts['peak_mb']:.0f} MB above the interpreter"
    )
    return {
        "images_per_second": rate,
        "cpu_seconds": facts["cpu_seconds"],
        "peak_mb": facts["peak_mb"],
        "bytes": facts.get("bytes", 0),
    }


def run() -> None:
    """Measure and save."""
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_pool(folder / "pool", smooth_images(_IMAGES))
        print(f"{_IMAGES} images of 32×32×3, all libraries imported, written to disk and flushed")
        for name, options in _EXPORTS.items():
            results[f"export {name}"] = _measure(folder / "pool", folder / name, options)
    save("export", {f"{_IMAGES} images, written to disk and flushed": {"figures": results}}, images=_IMAGES)
