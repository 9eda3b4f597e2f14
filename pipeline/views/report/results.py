"""The report's sections on error rates: tables with the paper's results for comparison, budgets, and curves."""

from collections.abc import Iterator, Sequence

import numpy as np

from lsmix.pipeline.config.results import read_metrics
from lsmix.pipeline.views.error_rates import RunSummary
from lsmix.pipeline.views.page import Figure, Page, Section, Table, render_page
from lsmix.pipeline.views.plots import Series, curves, difference_plot, error_rate_plot
from lsmix.pipeline.views.report.inputs import ReportInputs

__all__ = ["budget_table", "error_table", "notebook_html", "results_sections"]

_LONG_TABLE = 6  # tables with more runs highlight the best three


def results_sections(inputs: ReportInputs) -> Iterator[Section]:
    """Yield the sections on error rates, if the recipe has runs."""
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
                data=difference_plot(differences, "difference from baseline, percentage points"),
                alt="Difference of each run from the baseline, with 95% intervals.",
            )
        )
    items.append(
        Figure(
            name="error-curves",
            data=curves("Test error", errors, "epoch", "error rate, %", y_log=True),
            alt="Test error by epoch.",
        )
    )
    text = f"Error rate on the test split after the last epoch, over the seeds of each run. {verdicts(runs)}".strip()
    yield Section(title="Error rates", text=text, items=items)
    yield Section(
        title="Budgets and training loss",
        items=(
            budget_table(runs),
            Figure(
                name="loss-curves",
                data=curves("Training loss", losses, "epoch", "nats"),
                alt="Training loss by epoch, mean over seeds.",
                caption="The loss on mixed images cannot reach zero, so do not compare losses across runs.",
            ),
        ),
        folded=True,
    )


def verdicts(runs: Sequence[RunSummary]) -> str:
    """Return a sentence on which runs are better or worse than the baseline; "" if none can be compared."""
    found: dict[str, list[str]] = {}
    for run in runs:
        if run.verdict:
            found.setdefault(run.verdict, []).append(run.label)
    texts = {"better": "better than", "worse": "worse than", "no difference can be seen": "no clear difference from"}
    parts = [f"{text} the baseline: {', '.join(found[verdict])}" for verdict, text in texts.items() if verdict in found]
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def notebook_html(title: str, summary: str, runs: Sequence[RunSummary]) -> str:
    """Return the notebook view of a finished recipe as HTML: a line of text, and the error rates of its runs."""
    sections = [Section(title="", text=verdicts(runs), items=(error_table(runs, title=""),))] if runs else []
    return render_page(Page(title=title, summary=summary, sections=sections), "notebook.html.j2")


def error_table(runs: Sequence[RunSummary], *, title: str = "Error rates", note: str = "") -> Table:
    """Return the table of error rates in the recipe's order, with a column for the paper's error rates, if any.

    The lowest mean is highlighted, in long tables the best three, as in the paper's Table 1. If a run is the baseline,
    further columns show the difference of each mean from it in percentage points, measured (with its 95% interval) and
    in the paper.
    """
    baseline = next((run for run in runs if run.baseline and run.errors), None)
    papers = any(run.paper for run in runs)
    both = papers and baseline is not None and baseline.paper_mean is not None
    columns = ["run", "error rate, %", *(["paper, %"] if papers else [])]
    columns += [*(["difference from baseline"] if baseline else []), *(["paper's difference"] if both else [])]
    columns += ["seeds", "each seed, %"]
    rows = []
    for run in runs:
        cells = [run.label, run.text, *([run.paper or "–"] if papers else [])]
        if baseline:
            cells.append("–" if run is baseline or not run.errors else _difference(run, baseline))
        if both and baseline:
            known = run is not baseline and run.paper_mean is not None
            cells.append(_points((run.paper_mean or 0.0) - (baseline.paper_mean or 0.0)) if known else "–")
        rows.append((*cells, str(len(run.errors)), ", ".join(f"{error:.2f}" for error in run.errors) or "–"))
    brackets = " Brackets: 95% confidence interval over seeds and test images."
    brackets = brackets if any(run.difference for run in runs) else ""
    done = sorted((index for index, run in enumerate(runs) if run.errors), key=lambda index: runs[index].mean)
    return Table(
        title=title,
        columns=tuple(columns),
        rows=tuple(rows),
        note=f"Test error after the last epoch; mean ± sample standard deviation over seeds.{brackets} {note}".strip(),
        best=tuple(done[: 3 if len(runs) > _LONG_TABLE else 1]) if len(done) > 1 else (),
    )


def _difference(run: RunSummary, baseline: RunSummary) -> str:
    if run.difference is None:
        return _points(run.mean - baseline.mean)
    return f"{_points(run.difference.value)} [{_points(run.difference.low)}, {_points(run.difference.high)}]"


def _points(points: float) -> str:
    return f"{points:+.2f}".replace("-", "−")


def budget_table(runs: Sequence[RunSummary]) -> Table:
    """Return the table of the images, updates and data sources of each run."""
    rows = []
    for run in runs:
        seen = "; ".join(f"{one.source}: {one.images:,} images, {one.times:g}× each" for one in run.seen)
        rows.append((run.label, f"{run.images:,}", f"{run.updates:,}", seen or "–"))
    budgets = {(run.images, run.updates) for run in runs}
    return Table(
        title="Budget per seed",
        columns=("run", "images", "updates", "seen per source, on average"),
        rows=tuple(rows),
        note="All runs have the same budget."
        if len(budgets) == 1
        else "The runs have different budgets, so comparing them is not fair.",
    )


def _by_epoch(inputs: ReportInputs, field: str) -> list[Series]:
    """Return a curve for each run: the mean of a metric over the seeds, by epoch."""
    lines = []
    for run in inputs.runs:
        seeds = [read_metrics(item) for item in inputs.trainings(run.name).values()]
        measured = [[line for line in seed if getattr(line, field) is not None] for seed in seeds]
        mean = np.mean([[getattr(line, field) for line in seed] for seed in measured], axis=0)
        epochs = [line.epoch for line in measured[0]]
        lines.append(Series(label=run.label, x=epochs, y=mean))
    return lines
