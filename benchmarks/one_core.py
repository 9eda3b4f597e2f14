"""Glow on a single core: a training step, encode and decode against the peers, in a few minutes."""

from typing import Any

from benchmarks.glow import save_speeds, speeds


def run() -> None:
    """Measure and save."""
    tables: dict[str, Any] = {}
    speeds(tables, threads=1)
    save_speeds("one_core", tables)
