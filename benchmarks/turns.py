"""Taking turns: every contender once a turn, ratios within the turn, medians over the turns."""

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

# By contender: per_second, least, most, ratio, ratio_least, ratio_most; and rates, items per second of each turn.
Table = dict[str, dict[str, Any]]


class Scores(NamedTuple):
    """What a contender did in one turn."""

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
    """Run every contender once a turn; return items per second and the ratio to ``floor``, each with its spread.

    A contender does its work and returns how many items it handled, and the seconds if it took the time itself. The first
    turn warms up and does not count.
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
    """Raise unless a contender did what it was to do."""
    if list(got) != list(wanted):
        raise RuntimeError(f"{len(got)} of {len(wanted)} shards were made: the measurement would be of something else")


def save(name: str, tables: Mapping[str, Any], **facts: Any) -> None:
    """Write what was measured, with date and machine, to ``benchmarks/results/NAME.json``.

    Args:
        name: of the section.
        tables: by title: ``floor`` (the contender that ratios refer to), ``unit`` and ``rows`` (a ``Table``); or any
            other figures under "figures".
        facts: sizes and settings.
    """
    from lsmix.pipeline.engine.device import describe_environment

    RESULTS.mkdir(exist_ok=True)
    machine = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": platform.machine()}
    content = {**machine, "environment": describe_environment("cpu"), **facts, "tables": dict(tables)}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
