"""``python -m benchmarks sheets``: CIFAR-10 as lossless WebP sheets, for machines that accept at most 64 MiB at a time.

``pack BATCHES PARTS`` converts the published binary batches to PARTS/part1 (three training batches, about 45 MB) and
PARTS/part2 (two training batches and the test batch, about 50 MB). ``unpack PARTS BATCHES`` restores the binary batches
and compares their checksums.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["BATCHES", "main", "pack", "unpack"]

_PARTS = {
    "part1": ("data_batch_1", "data_batch_2", "data_batch_3"),
    "part2": ("data_batch_4", "data_batch_5", "test_batch"),
}
_META = "batches.meta.txt"
_COLUMNS, _SIDE = 50, 32  # images per row of a sheet, and pixels per side of an image
_IMAGE = 3 * _SIDE * _SIDE  # bytes

BATCHES = (*(f"{name}.bin" for names in _PARTS.values() for name in names), _META)  # the published files


def pack(batches: Path, parts: Path) -> None:
    """Write the published binary batches in a folder as sheets, with their labels and checksums."""
    for part, names in _PARTS.items():
        folder = parts / part
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            content = (batches / f"{name}.bin").read_bytes()
            records = np.frombuffer(content, np.uint8).reshape(-1, 1 + _IMAGE)
            images = records[:, 1:].reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
            rows = -(-len(images) // _COLUMNS)
            tiles = np.zeros((rows * _COLUMNS, _SIDE, _SIDE, 3), np.uint8)
            tiles[: len(images)] = images
            tiles = tiles.reshape(rows, _COLUMNS, _SIDE, _SIDE, 3).transpose(0, 2, 1, 3, 4)
            sheet = Image.fromarray(tiles.reshape(rows * _SIDE, _COLUMNS * _SIDE, 3))
            sheet.save(folder / f"{name}.webp", lossless=True, quality=80, method=4)
            record = {"labels": records[:, 0].tolist(), "sha256": hashlib.sha256(content).hexdigest()}
            (folder / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")
    (parts / "part1" / _META).write_bytes((batches / _META).read_bytes())


def unpack(parts: Path, batches: Path) -> None:
    """Restore the published binary batches from the sheets of all parts found.

    Raises:
        SystemExit: A restored batch differs from the packed one.
    """
    batches.mkdir(parents=True, exist_ok=True)
    for path in sorted(parts.rglob("*.webp")):
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        labels = np.array(record["labels"], np.uint8)
        with Image.open(path) as image:  # 200 rows of 32 pixels, below the size for which Pillow warns
            sheet = np.asarray(image.convert("RGB"))
        tiles = sheet.reshape(-1, _SIDE, _COLUMNS, _SIDE, 3).transpose(0, 2, 1, 3, 4)
        images = tiles.reshape(-1, _SIDE, _SIDE, 3)[: len(labels)]
        planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        content = np.concatenate([labels[:, None], planes], axis=1).tobytes()
        if hashlib.sha256(content).hexdigest() != record["sha256"]:
            sys.exit(f"{str(path)!r} is damaged: it does not contain the packed images. Copy it again.")
        (batches / f"{path.stem}.bin").write_bytes(content)
    for meta in parts.rglob(_META):
        (batches / _META).write_bytes(meta.read_bytes())


def main(words: list[str]) -> int:
    """Run the command line; return 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks sheets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("pack", "unpack"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args(words)
    {"pack": pack, "unpack": unpack}[options.action](options.source, options.target)
    return 0
