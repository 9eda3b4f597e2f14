"""``python -m benchmarks desk STEP …``: the comparisons of docs/reproduction.md that are feasible on two CPU cores.

A step brings its recipes up to date, resuming earlier calls, and writes its table, figures and numbers below --out. The
step "natural-32" measures the flow that comes with lsmix; "gains" needs table1, table4 and naturalness.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
from scipy.stats import spearmanr

from lsmix.data.dataset import open_dataset
from lsmix.data.errors import LockedError
from lsmix.data.progress import NullProgress
from lsmix.pipeline.api import RunResult, run
from lsmix.pipeline.config.recipes import recipe_path
from lsmix.pipeline.config.results import Interval, read_metrics, read_naturalness
from lsmix.pipeline.views.page import Table
from lsmix.pipeline.views.plots import Series, curves, gain_plot
from lsmix.pipeline.views.report.results import budget_table, error_table, verdicts

__all__ = ["main"]

_SIZES = (500, 1000, 2000, 4000)  # numbers of training images in the learning curves, each a scale of the recipe
# Table -> run -> method: the runs whose gain is compared with the naturalness of their method.
_GAINS: Mapping[str, Mapping[str, str]] = {
    "table1": {
        "mixup": "mixup",
        "cutmix": "cutmix",
        "linear-04": "linear",
        "bernmix-04": "bern-mix",
        "lsmix-04": "ls-mix",
    },
    "table4": {"swapmix": "swap-mix", "reversemix": "reverse-mix"},
}
_RETRY_SECONDS = 60.0  # between attempts while another process builds the same artifact


class _Log(NullProgress):
    """Print messages with the time, without the progress of iterations."""

    def info(self, message: str) -> None:
        print(time.strftime("%H:%M:%S"), message, flush=True)

    warning = info


class Desk:
    """The steps and their folders."""

    def __init__(self, data: Path, workspace: Path, out: Path, flow: str, device: str = "cpu") -> None:
        self._device = device
        self._overrides = [f"data.path={json.dumps(str(data.resolve()))}"]
        self._flow = flow
        self._workspace, self._out = workspace, out
        out.mkdir(parents=True, exist_ok=True)

    def steps(self) -> dict[str, Callable[[], None]]:
        """Return the steps by name."""
        tables = {f"table{number}": lambda number=number: self._table(f"table{number}") for number in (1, 4, 3)}
        rest = {"curve": self._curve, "naturalness": self._naturalness, "gains": self._gains}
        return {"natural-32": self._natural_32, **tables, **rest}

    def _run(self, recipe: str, scale: str, stage: str = "") -> RunResult:
        overrides = [*self._overrides, *([f"flow.path={self._flow}"] if self._flow else [])]
        while True:
            try:
                return run(
                    recipe_path(recipe),
                    workspace=self._workspace,
                    stage=stage,
                    overrides=overrides,
                    scale=scale,
                    device=self._device,
                    progress=_Log(),
                )
            except LockedError:
                time.sleep(_RETRY_SECONDS)

    def _table(self, name: str) -> None:
        self._write(name, self._run(f"{name}-cifar10", "desk"))

    def _write(self, name: str, result: RunResult) -> None:
        runs = result.error_rates
        report = result.recipe.report
        tables = [error_table(runs, title=report.table or "Error rates", note=report.note), budget_table(runs)]
        parts = [f"# {report.title}", verdicts(runs), *map(_markdown, tables)]
        (self._out / f"{name}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        trainings = {
            item.name: [msgspec.to_builtins(line) for line in read_metrics(item.folder)]
            for item in result.built
            if item.stage == "train"
        }
        facts = [
            {
                "run": row.name,
                "errors": row.errors,
                "difference": msgspec.to_builtins(row.difference),
                "verdict": row.verdict,
            }
            for row in runs
        ]
        content = json.dumps({"error_rates": facts, "trainings": trainings}, separators=(",", ":"))
        (self._out / f"{name}.json").write_text(content.replace('],"', '],\n"') + "\n")
        for figure in ("error-rates", "differences", "error-curves", "loss-curves"):
            path = result["report"].folder / "figures" / f"{figure}.svg"
            if path.is_file():
                (self._out / f"{name}-{figure}.svg").write_bytes(path.read_bytes())

    def _curve(self) -> None:
        errors: dict[str, list[tuple[float, float]]] = {}
        gains: dict[str, list[tuple[float, float]]] = {}
        for size in _SIZES:
            result = self._run("learning-curve-cifar10", f"images-{size}")
            self._write(f"curve-{size}", result)
            for row in result.error_rates:
                errors.setdefault(row.label, []).append((row.mean, row.std or 0.0))
                if row.difference:
                    half = row.difference.high - row.difference.value
                    gains.setdefault(row.label, []).append((-row.difference.value, half))
        drawn = {
            "learning-curve": (errors, "Error by number of training images", "error rate, % (± std over seeds)"),
            "learning-curve-gains": (gains, "Gain over the baseline", "percentage points (95% interval)"),
        }
        for name, (lines, title, y_label) in drawn.items():
            figure = curves(title, _series(lines), "training images", y_label, x_ticks=_SIZES)
            (self._out / f"{name}.svg").write_bytes(figure)

    def _naturalness(self) -> None:
        result = self._run("naturalness-cifar10", "desk")
        for figure in (result["report"].folder / "figures").glob("naturalness-*"):
            (self._out / figure.name).write_bytes(figure.read_bytes())
        source = result["naturalness"].folder / "naturalness.json"
        samples = msgspec.to_builtins(read_naturalness(source.parent))
        for sample in samples["samples"]:
            del sample["bits_per_dim"]
        (self._out / "naturalness.json").write_text(json.dumps(samples, indent=1) + "\n")

    def _gains(self) -> None:
        natural = read_naturalness(self._run("naturalness-cifar10", "desk")["naturalness"].folder)
        measured = {sample.name: sample.distance for sample in natural.samples}
        points: dict[str, tuple[Interval, Interval]] = {}
        for name, runs in _GAINS.items():
            result = self._run(f"{name}-cifar10", "desk")
            for row in result.error_rates:
                distance, difference = measured.get(runs.get(row.name, "")), row.difference
                if distance and difference:
                    gain = Interval(value=-difference.value, low=-difference.high, high=-difference.low)
                    points[row.label] = (distance, gain)
        figure = gain_plot(
            points, "distance from originals, bits per dimension", "gain over the baseline, percentage points"
        )
        (self._out / "naturalness-gains.svg").write_bytes(figure)
        rows = tuple((name, *map(_interval, both)) for name, both in points.items())
        table = Table(title="Naturalness and gain", columns=("run", "distance", "gain, percentage points"), rows=rows)
        order = spearmanr(*zip(*((x.value, y.value) for x, y in points.values()), strict=True)).statistic
        text = f"Rank correlation of distance and gain over {len(points)} runs: {order:.2f}."
        (self._out / "naturalness-gains.md").write_text(f"{_markdown(table)}\n\n{text}\n", encoding="utf-8")

    def _natural_32(self) -> None:
        from lsmix.glow.checkpoint import load_flow

        flow = load_flow(self._flow or "natural-32")
        images = open_dataset(self._run("table1-cifar10", "desk", "ingest")["ingest"].artifact).test.images
        exact = bits = 0.0
        for start in range(0, len(images), 1000):
            part = images[start : start + 1000]
            bits += float(flow.bits_per_dim(flow.log_prob(part, dequantise="uniform", seed=start)).sum())
            exact += int((flow.decode(flow.encode(part)) == part).all(axis=(1, 2, 3)).sum())
        facts = {
            "test_images": len(images),
            "bits_per_dim": round(bits / len(images), 4),
            "exact_round_trips": int(exact),
        }
        (self._out / "natural-32.json").write_text(json.dumps(facts, indent=1) + "\n")
        print(facts, flush=True)


def _series(lines: Mapping[str, Sequence[tuple[float, float]]]) -> list[Series]:
    return [
        # Shifted horizontally, so that the error bars do not overlap.
        Series(
            label=label,
            x=[size * (0.97 + 0.02 * place) for size in _SIZES],
            y=[value for value, _ in points],
            spread=[half for _, half in points],
        )
        for place, (label, points) in enumerate(lines.items())
    ]


def _interval(one: Interval) -> str:
    return f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]".replace("-", "−")


def _markdown(table: Table) -> str:
    lines = [table.columns, tuple("---" for _ in table.columns), *table.rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"## {table.title}\n\n{text}\n\n{table.note}".rstrip()


def main(arguments: Sequence[str]) -> None:
    """Run the steps named on the command line, by default all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks desk", description=__doc__)
    parser.add_argument("steps", nargs="*", metavar="STEP")
    parser.add_argument("--data", type=Path, required=True, help="folder cifar-10-batches-bin")
    parser.add_argument("--workspace", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("build/desk"))
    parser.add_argument("--flow", default="", help="the flow to use instead of natural-32")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    options = parser.parse_args(arguments)
    steps = Desk(options.data, options.workspace, options.out, options.flow, options.device).steps()
    unknown = [name for name in options.steps if name not in steps]
    if unknown:
        parser.error(f"unknown step {unknown[0]!r}. Known: {', '.join(steps)}")
    for name in options.steps or steps:
        print(time.strftime("%H:%M:%S"), name, flush=True)
        steps[name]()
