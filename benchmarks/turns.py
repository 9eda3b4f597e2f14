"""Measurements in turns: every contender runs once per turn; ratios are taken within a turn, medians over the turns."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["RESULTS", "Scores", "Table", "expect", "measure", "save"]

RESULTS = Path(__file__).resolve().parent / "results"

# Contender -> per_second, least, most, ratio, ratio_least, ratio_most, and rates (items per second of each turn).
Table = dict[str, dict[str, Any]]


class Scores(NamedTuple):
    """The result of a contender in one turn."""

    items: float
    seconds: float


def measure(
    contenders: Mapping[str, Callable[[], "int | Scores"]],
    *,
    floor: str,
    title: str,
    turns: int = 5,
    unit: str = "images",
) -> Table:
    """Run every contender once per turn; return items per second and the ratio to ``floor``, each with its spread.

    A contender returns the number of items that it processed, or ``Scores`` if it measured the time itself. The first
    turn is a warm-up and does not count.
    """
    print(f"\n{title}", flush=True)
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(turns + 1):
        for name, work in contenders.items():
            begun = time.perf_counter()
            done = work()
            items, seconds = done if isinstance(done, Scores) else (done, time.perf_counter() - begun)
            if turn:
                rates[name].append(items / seconds)
    table = {}
    for name, values in rates.items():
        ratios = [value / base for value, base in zip(values, rates[floor], strict=True)]
        table[name] = {
            "per_second": statistics.median(values),
            "least": min(values),
            "most": max(values),
            "ratio": statistics.median(ratios),
            "ratio_least": min(ratios),
            "ratio_most": max(ratios),
            "rates": values,
        }
        print(
            f"  {name:<44} {table[name]['per_second']:>12.1f} {unit}/s  × {table[name]['ratio']:.3f}"
            f"  ({min(ratios):.3f} to {max(ratios):.3f})",
            flush=True,
        )
    return table


def expect(got: Sequence[int], wanted: Sequence[int]) -> None:
    """Raise unless a contender made all shards."""
    if list(got) != list(wanted):
        raise RuntimeError(f"Only {len(got)} of {len(wanted)} shards were made, so the measurement is invalid.")


def save(name: str, tables: Mapping[str, Any], **facts: Any) -> None:
    """Write measurements, with date and machine, to ``benchmarks/results/NAME.json``.

    Args:
        name: Name of the section.
        tables: Title -> ``floor`` (the contender that ratios refer to), ``unit`` and ``rows`` (a ``Table``), or other
            numbers under ``figures``.
        facts: Sizes and settings.
    """
    from lsmix.pipeline.engine.device import describe_environment

    RESULTS.mkdir(exist_ok=True)
    machine = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": platform.machine()}
    content = {**machine, "environment": describe_environment("cpu"), **facts, "tables": dict(tables)}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
