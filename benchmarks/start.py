"""Start-up time of ``lsmix --help``, a fully cached run, and the import, against a bare interpreter."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.turns import measure, save

_NOTHING = "python -c pass"
_RECIPE = """
format = 1
name = "start"
[data]
format = "digits"
limit = 200
[flow]
levels = 2
steps = 1
hidden = 8
[flow.training]
iterations = 2
batch_size = 16
flip = false
[pools.lsmix]
copies = 1
[classifier]
width = 4
epochs = 1
flip = false
[runs.baseline]
[runs.lsmix]
pool = "lsmix"
[report]
"""


def run() -> None:
    """Measure starts per second and save."""
    lsmix = shutil.which("lsmix", path=str(Path(sys.executable).parent))
    if lsmix is None:
        raise RuntimeError("The command 'lsmix' is not installed next to this Python interpreter.")
    with tempfile.TemporaryDirectory() as temporary:
        recipe = Path(temporary, "start.toml")
        recipe.write_text(_RECIPE, encoding="utf-8")
        cached = [lsmix, "run", str(recipe), "--workspace", str(Path(temporary, "runs"))]
        subprocess.run(cached, check=True, capture_output=True)
        words = {
            _NOTHING: [sys.executable, "-c", "pass"],
            "python -c 'import numpy'": [sys.executable, "-c", "import numpy"],
            "import lsmix": [sys.executable, "-c", "import lsmix"],
            "lsmix --help": [lsmix, "--help"],
            "a fully cached lsmix run": cached,
            "python -c 'import torch'": [sys.executable, "-c", "import torch"],
        }
        title = "starting, one process after another"
        rows = measure(
            {name: _start(line) for name, line in words.items()}, floor=_NOTHING, title=title, turns=10, unit="starts"
        )
        _check(cached)
    tables: dict[str, Any] = {title: {"floor": _NOTHING, "unit": "starts", "rows": rows}}
    tables["seconds per start"] = {"figures": {name: 1 / row["per_second"] for name, row in rows.items()}}
    save("start", tables)


def _start(words: list[str]) -> Callable[[], int]:
    def start() -> int:
        subprocess.run(words, check=True, capture_output=True)
        return 1

    return start


def _check(cached: list[str]) -> None:
    output = subprocess.run([*cached, "--json"], check=True, capture_output=True, text=True).stdout
    built = [item["name"] for item in json.loads(output)["content"]["artifacts"] if not item["cached"]]
    if built:
        raise RuntimeError(f"The cached run rebuilt {built}, so it was not fully cached.")
