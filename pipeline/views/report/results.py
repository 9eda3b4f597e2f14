"""The chapter of the report on error rates: the table, with the paper's figures beside ours, budgets, and curves."""

import numpy as np

from lsmix.pipeline.config.results import read_metrics
from lsmix.pipeline.views.plots import Series, curves, error_rate_plot
from lsmix.pipeline.views.report.inputs import ReportInputs, plot_figure
from lsmix.pipeline.views.report.page import Section, budget_table, error_table

__all__ = ["results_section"]

_SOLID_LINES = 6  # of a plot, since it has so many colours; those beyond are dashed


def results_section(material: ReportInputs) -> Section:
    """Return the chapter on error rates; an empty one where the recipe has no runs."""
    runs = material.runs
    if not runs:
        return Section(title="Error rates")
    errors, losses = _by_epoch(material, "test_error"), _by_epoch(material, "loss")
    return Section(
        title="Error rates",
        text="Error of the last epoch on the test split, for every run over its seeds.",
        tables=(
            error_table(runs, title=material.config.table or "Error rates", note=material.config.note),
            budget_table(runs),
        ),
        figures=(
            plot_figure(
                "error-rates", error_rate_plot(runs), "Error rates of all runs with their standard deviations."
            ),
            plot_figure(
                "error-curves",
                curves("Test error", errors, "epoch", "error rate, %", y_log=True),
                "Test error by epoch.",
            ),
            plot_figure(
                "loss-curves",
                curves("Training loss", losses, "epoch", "nats"),
                "Training loss by epoch, mean over seeds.",
                "On mixed images the loss cannot reach zero, so it does not compare across runs.",
            ),
        ),
    )


def _by_epoch(material: ReportInputs, field: str) -> list[Series]:
    """Return a line for each run: a metric's mean over its seeds, by epoch."""
    lines = []
    for run in material.runs:
        seeds = [[float(getattr(line, field)) for line in read_metrics(item)] for item in material.trainings(run.name)]
        lines.append((run.label, np.mean(seeds, axis=0)))
    return [
        Series(label=label, x=range(1, len(mean) + 1), y=mean, dashed=place >= _SOLID_LINES)
        for place, (label, mean) in enumerate(lines)
    ]
