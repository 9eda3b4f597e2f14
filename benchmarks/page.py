"""The page of results, ``benchmarks/results/README.md``, with a plot for each section."""

import json
from pathlib import Path
from typing import Any

from benchmarks.turns import RESULTS

__all__ = ["write"]


def write() -> None:
    """Write the page and the plots from the JSON files of all sections."""
    lines = [
        "# Results of the benchmarks",
        "",
        "Written by `python -m benchmarks`. Each ratio is the median of the ratios within a turn.",
    ]
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        lines += ["", f"## {path.stem}", "", _about(content)]
        for title, table in content["tables"].items():
            lines += ["", f"**{title}**", "", *_table(table)]
        picture = _plot(path.stem, content["tables"])
        if picture:
            lines += ["", f"![Ratios of the section {path.stem}]({picture.name})"]
    page = RESULTS / "README.md"
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"\npage: {page}")


def _about(content: dict[str, Any]) -> str:
    environment = content["environment"]
    versions = ", ".join(f"{name} {environment['versions'][name]}" for name in ("torch", "numpy", "zarr"))
    settings = {key: value for key, value in content.items() if key not in ("date", "machine", "environment", "tables")}
    return f"{content['date']}, {environment['device']}, Python {environment['python']}, {versions}. {settings or ''}".rstrip()


def _table(table: dict[str, Any]) -> list[str]:
    if "figures" in table:
        nested = {name: value for name, value in table["figures"].items() if isinstance(value, dict)}
        if nested:
            heads = list(next(iter(nested.values())))
            lines = [f"| | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
            return lines + [
                f"| {name} | {' | '.join(_number(row[head]) for head in heads)} |" for name, row in nested.items()
            ]
        return ["| | |", "|---|---:|", *(f"| {name} | {_number(value)} |" for name, value in table["figures"].items())]
    unit = "GFLOP" if table["unit"] == "FLOP" else table["unit"]
    scale = 1e-9 if table["unit"] == "FLOP" else 1.0
    lines = [f"| | {unit}/s | ratio to {table['floor']} | from | to |", "|---|---:|---:|---:|---:|"]
    for name, row in table["rows"].items():
        ratios = " | ".join(f"{row[key]:.3f}" for key in ("ratio", "ratio_least", "ratio_most"))
        lines.append(f"| {name} | {_number(row['per_second'] * scale)} | {ratios} |")
    more = {name: value for name, value in table.items() if name not in ("floor", "unit", "rows")}
    return [*lines, *([""] if more else []), *(f"{name}: **{value:.2f}×**" for name, value in more.items())]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _plot(name: str, tables: dict[str, Any]) -> Path | None:
    """Draw the ratios of all tables of a section as bars with their spread; return None if there are no ratios."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    drawn = {title: table for title, table in tables.items() if "rows" in table}
    if not drawn:
        return None
    heights = [len(table["rows"]) + 1.5 for table in drawn.values()]
    figure, axes = plt.subplots(
        len(drawn), 1, figsize=(9, 0.3 * sum(heights) + 0.6), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for axis, (title, table) in zip(axes[:, 0], drawn.items(), strict=True):
        names = list(table["rows"])[::-1]
        rows = [table["rows"][name] for name in names]
        ratios = [row["ratio"] for row in rows]
        spread = [
            [row["ratio"] - row["ratio_least"] for row in rows],
            [row["ratio_most"] - row["ratio"] for row in rows],
        ]
        colours = [
            "#1b6ca8" if "lsmix" in name or "disk to disk" in name or "PoolLoader" in name else "#9aa5b1"
            for name in names
        ]
        axis.barh(names, ratios, xerr=spread, color=colours, error_kw={"lw": 1, "ecolor": "#444"})
        axis.axvline(1.0, color="#444", lw=0.8, ls="--")
        axis.set_title(f"{title} (× {table['floor']})", fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    path = RESULTS / f"{name}.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
