"""The chapter of the report on the flow: what it is, how its training went, and images drawn from it."""

from typing import Any

import msgspec
import numpy as np

from lsmix.pipeline.config.results import read_log
from lsmix.pipeline.views.plots import Series, curves
from lsmix.pipeline.views.report.inputs import ReportInputs, plot_figure
from lsmix.pipeline.views.report.page import ReportFigure, Section, Table

__all__ = ["flow_section"]

_SMOOTHED_POINTS = 200  # of the loss curve: a mean over equal stretches shows the course and not the noise


def flow_section(material: ReportInputs) -> Section:
    """Return the chapter on the recipe's flow; an empty one where it has none."""
    if not material.has_flow:
        return Section(title="Flow")
    item = material.inputs["flow"]
    counts, config = item.manifest.counts, material.flow.config
    rows = [(name, f"{value}") for name, value in msgspec.to_builtins(config).items()]
    rows += [(name.replace("_", " "), _text(value)) for name, value in counts.items()]
    table = Table(title="The flow", columns=("what", "value"), rows=tuple(rows))
    if "log.jsonl" not in item.records:  # a flow from elsewhere comes without its log
        return Section(title="Flow", tables=(table,))
    log = read_log(item)
    iterations = np.array([line.iteration for line in log])
    loss = np.array([line.loss_bits_per_dim for line in log], dtype=float)
    parts = [part for part in np.array_split(np.arange(len(log)), min(_SMOOTHED_POINTS, len(log))) if len(part)]
    series = [Series(label="batch (mean)", x=[iterations[p].mean() for p in parts], y=[loss[p].mean() for p in parts])]
    for field, label in (("train_bits_per_dim", "train"), ("heldout_bits_per_dim", "held-out")):
        points = [(line.iteration, getattr(line, field)) for line in log if getattr(line, field) is not None]
        if points:
            x, y = zip(*points, strict=True)
            series.append(Series(label=label, x=x, y=y))
    norms = [Series(label="gradient norm", x=iterations, y=[line.grad_norm or np.nan for line in log])]
    figures = [
        plot_figure(
            "flow-bits",
            curves("Likelihood", series, "iteration", "bits per dimension"),
            "Bits per dimension by iteration.",
        ),
        plot_figure(
            "flow-gradient", curves("Gradient norm", norms, "iteration", "nats/dim"), "Gradient norm by iteration."
        ),
    ]
    if "samples.png" in item.records:
        alt = "Images drawn from the flow."
        caption = f"Images drawn from the flow at temperature {item.manifest.config['temperature']}."
        figures.append(
            ReportFigure(
                name="samples",
                data=item.file("samples.png").read_bytes(),
                media="image/png",
                alt=alt,
                caption=caption,
                pixelated=True,
            )
        )
    return Section(title="Flow", tables=(table,), figures=tuple(figures))


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
