"""Taking turns: every contender once a turn, ratios within the turn, medians over the turns."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

__all__ = ["measure", "save"]

_RESULTS = Path(__file__).resolve().parent / "results"


def measure(contenders: Mapping[str, Callable[[], int]], *, floor: str, turns: int = 5) -> dict[str, dict[str, float]]:
    """Run every contender once a turn; return items per second and the ratio to ``floor``, each with its spread.

    A contender does its work and returns how many items it handled. The first turn warms up and does not count.
    """
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(turns + 1):
        for name, work in contenders.items():
            begun = time.perf_counter()
            items = work()
            rate = items / (time.perf_counter() - begun)
            if turn:
                rates[name].append(rate)
    table = {}
    for name, values in rates.items():
        ratios = [value / base for value, base in zip(values, rates[floor], strict=True)]
        table[name] = {
            "per_second": statistics.median(values),
            "least": min(values),
            "most": max(values),
            "ratio": statistics.median(ratios),
        }
        print(
            f"{name:<40} {table[name]['per_second']:>12.1f} /s  ({min(values):.1f} to {max(values):.1f})"
            f"  × {table[name]['ratio']:.3f} of {floor}"
        )
    return table


def save(name: str, content: dict[str, Any]) -> Path:
    """Write what was measured, with date and machine, to ``benchmarks/results/NAME.json``."""
    from lsmix.pipeline.environment import describe_environment

    _RESULTS.mkdir(exist_ok=True)
    path = _RESULTS / f"{name}.json"
    facts = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": platform.machine()}
    path.write_text(json.dumps({**facts, "environment": describe_environment("cpu"), **content}, indent=1) + "\n")
    return path
