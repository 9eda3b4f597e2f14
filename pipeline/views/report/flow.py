"""The report's section on the flow: configuration, training curves and samples."""

from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np

from lsmix.data.artifact import Artifact
from lsmix.pipeline.config.results import read_log
from lsmix.pipeline.views.page import Figure, Section, Table
from lsmix.pipeline.views.plots import Series, curves
from lsmix.pipeline.views.report.inputs import ReportInputs

__all__ = ["flow_section"]

_SMOOTHED_POINTS = 200  # of the loss curve: means over stretches of equal length show the trend without the noise


def flow_section(inputs: ReportInputs) -> Iterator[Section]:
    """Yield the section on the recipe's flow, if it has a flow."""
    if not inputs.has_flow:
        return
    item = inputs.artifacts["flow"]
    rows = [(name, str(value)) for name, value in msgspec.to_builtins(inputs.flow.config).items()]
    rows += [(name.replace("_", " "), _text(value)) for name, value in item.manifest.counts.items()]
    items: list[Table | Figure] = [
        Table(title="Configuration and results", columns=("field", "value"), rows=tuple(rows))
    ]
    if "log.jsonl" in item.records:  # a flow from another recipe has no log here
        items += _training(item)
    if "samples.png" in item.records:
        items.append(
            Figure(
                name="samples",
                data=item.file("samples.png").read_bytes(),
                alt="Images sampled from the flow.",
                caption=f"Images sampled from the flow at temperature {item.manifest.config['temperature']}.",
                density=1,
            )
        )
    yield Section(title="Flow", items=items, folded=True)


def _training(item: Artifact) -> Iterator[Figure]:
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
    likelihood = curves("Likelihood", series, "iteration", "bits per dimension")
    yield Figure(name="flow-bits", data=likelihood, alt="Bits per dimension by iteration.")
    gradient = curves("Gradient norm", norms, "iteration", "nats/dim")
    yield Figure(name="flow-gradient", data=gradient, alt="Gradient norm by iteration.")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
