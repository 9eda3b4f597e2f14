"""The report's sections on error rates: tables with the paper's figures beside ours, budgets, and curves."""

from collections.abc import Iterator, Sequence

import numpy as np

from lsmix.pipeline.config.results import read_metrics
from lsmix.pipeline.views.error_rates import RunSummary
from lsmix.pipeline.views.page import Figure, Page, Section, Table, render_page
from lsmix.pipeline.views.plots import Series, curves, difference_plot, error_rate_plot
from lsmix.pipeline.views.report.inputs import ReportInputs

__all__ = ["budget_table", "error_table", "notebook_html", "results_sections"]

_LONG_TABLE = 6  # runs, beyond which the best three are highlighted


def results_sections(inputs: ReportInputs) -> Iterator[Section]:
    """Return the sections on error rates; none where the recipe has no runs."""
    runs = inputs.runs
    if not runs:
        return
    errors, losses = _by_epoch(inputs, "test_error"), _by_epoch(inputs, "loss")
    items: list[Table | Figure] = [
        error_table(runs, title=inputs.config.table or "Error rates", note=inputs.config.note),
        Figure(
            name="error-rates",
            data=error_rate_plot(runs),
            alt="Error rates of all runs with their standard deviations.",
        ),
    ]
    differences = {run.label: run.difference for run in runs if run.difference}
    if differences:
        items.append(
            Figure(
                name="differences",
                data=difference_plot(differences, "error against the baseline, points"),
                alt="Differences of all runs to the baseline with their 95% intervals.",
            )
        )
    items.append(
        Figure(
            name="error-curves",
            data=curves("Test error", errors, "epoch", "error rate, %", y_log=True),
            alt="Test error by epoch.",
        )
    )
    text = f"Error on the test split after the last epoch, for every run over its seeds. {verdicts(runs)}".strip()
    yield Section(title="Error rates", text=text, items=items)
    yield Section(
        title="Budgets and training loss",
        items=(
            budget_table(runs),
            Figure(
                name="loss-curves",
                data=curves("Training loss", losses, "epoch", "nats"),
                alt="Training loss by epoch, mean over seeds.",
                caption="On mixed images the loss cannot reach zero, so do not compare it across runs.",
            ),
        ),
        folded=True,
    )


def verdicts(runs: Sequence[RunSummary]) -> str:
    """Return the sentence that says which runs are better or worse than the baseline; "" where none can be compared."""
    found: dict[str, list[str]] = {}
    for run in runs:
        if run.verdict:
            found.setdefault(run.verdict, []).append(run.label)
    ends = {"better": "than the baseline", "worse": "than the baseline", "no difference can be seen": "for"}
    parts = [f"{verdict} {end}: {', '.join(found[verdict])}" for verdict, end in ends.items() if verdict in found]
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def notebook_html(title: str, summary: str, runs: Sequence[RunSummary]) -> str:
    """Return a notebook's view of a run's results: a line, and the error rates, where there are any, with their verdicts."""
    sections = [Section(title="", text=verdicts(runs), items=(error_table(runs, title=""),))] if runs else []
    return render_page(Page(title=title, summary=summary, sections=sections), "notebook.html.j2")


def error_table(runs: Sequence[RunSummary], *, title: str = "Error rates", note: str = "") -> Table:
    """Return the table of error rates in the recipe's order, with the paper's figures beside ours if there are any.

    The lowest mean is highlighted, in long tables the best three, as in the paper's Table 1. With a baseline among the
    runs, columns give the difference of each mean from it in points, ours with its 95% interval, and the paper's.
    """
    baseline = next((run for run in runs if run.baseline and run.errors), None)
    papers = any(run.paper for run in runs)
    both = papers and baseline is not None and baseline.paper_mean is not None
    columns = ["run", "error rate, %", *(["paper, %"] if papers else [])]
    columns += [*(["against baseline"] if baseline else []), *(["paper's"] if both else []), "seeds", "of each seed, %"]
    rows = []
    for run in runs:
        cells = [run.label, run.text, *([run.paper or "–"] if papers else [])]
        if baseline:
            cells.append("–" if run is baseline or not run.errors else _difference(run, baseline))
        if both and baseline:
            known = run is not baseline and run.paper_mean is not None
            cells.append(_points((run.paper_mean or 0.0) - (baseline.paper_mean or 0.0)) if known else "–")
        rows.append((*cells, str(len(run.errors)), ", ".join(f"{error:.2f}" for error in run.errors) or "–"))
    brackets = " In brackets: 95% confidence interval for other seeds and other test images."
    brackets = brackets if any(run.difference for run in runs) else ""
    done = sorted((index for index, run in enumerate(runs) if run.errors), key=lambda index: runs[index].mean)
    return Table(
        title=title,
        columns=tuple(columns),
        rows=tuple(rows),
        note=f"Last epoch, test images; mean ± sample standard deviation over seeds.{brackets} {note}".strip(),
        best=tuple(done[: 3 if len(runs) > _LONG_TABLE else 1]) if len(done) > 1 else (),
    )


def _difference(run: RunSummary, baseline: RunSummary) -> str:
    if run.difference is None:
        return _points(run.mean - baseline.mean)
    return f"{_points(run.difference.value)} [{_points(run.difference.low)}, {_points(run.difference.high)}]"


def _points(points: float) -> str:
    return f"{points:+.2f}".replace("-", "−")


def budget_table(runs: Sequence[RunSummary]) -> Table:
    """Return the table of the images, the updates and the sources that each run had."""
    rows = []
    for run in runs:
        seen = "; ".join(f"{one.source}: {one.images:,} images, {one.times:g}× each" for one in run.seen)
        rows.append((run.label, f"{run.images:,}", f"{run.updates:,}", seen or "–"))
    budgets = {(run.images, run.updates) for run in runs}
    return Table(
        title="Budget of each seed",
        columns=("run", "images", "updates", "seen, on average"),
        rows=tuple(rows),
        note="All runs have the same budget."
        if len(budgets) == 1
        else "The runs have different budgets, so comparing them is not fair.",
    )


def _by_epoch(inputs: ReportInputs, field: str) -> list[Series]:
    """Return a line for each run: a metric's mean over its seeds, by epoch."""
    lines = []
    for run in inputs.runs:
        seeds = [read_metrics(item) for item in inputs.trainings(run.name).values()]
        measured = [[line for line in seed if getattr(line, field) is not None] for seed in seeds]
        mean = np.mean([[getattr(line, field) for line in seed] for seed in measured], axis=0)
        epochs = [line.epoch for line in measured[0]]
        lines.append(Series(label=run.label, x=epochs, y=mean))
    return lines
