"""The artifacts behind a report, opened when they are wanted, and how its pictures are wrapped.

A recipe may do without a flow, without pools and without runs; whoever asks for one looks first.
"""

from functools import cached_property

import numpy as np

from lsmix.data.artifact import Artifact
from lsmix.data.dataset import DataSet, open_dataset
from lsmix.data.latents import Latents, open_latents
from lsmix.data.pool import Pool, open_pool
from lsmix.glow.checkpoint import load_flow
from lsmix.glow.flow import Flow
from lsmix.pipeline.config.recipe import training_name
from lsmix.pipeline.config.schema import RecipeReport
from lsmix.pipeline.engine.stage import StageTask
from lsmix.pipeline.views.error_rates import RunSummary, summarise_runs
from lsmix.pipeline.views.images import png_bytes, sheet
from lsmix.pipeline.views.report.page import ReportFigure

__all__ = ["SHEET_DENSITY", "SHEET_WIDTH", "ReportInputs", "plot_figure", "sheet_figure"]

SHEET_WIDTH = 830  # pixels that a sheet should about have
SHEET_DENSITY = 2  # pixels of a sheet to one of the page, so that its letters are sharp


class ReportInputs:
    """The artifacts of a recipe, opened when they are wanted."""

    def __init__(self, task: StageTask) -> None:
        self.name = task.name  # of the recipe
        self.config: RecipeReport = task.config
        self.inputs = task.inputs
        self._device = task.device

    def named(self, kind: str) -> dict[str, Artifact]:
        """Return the inputs of a kind, "pool" or "run", by name."""
        prefix = f"{kind}:"
        return {role[len(prefix) :]: item for role, item in self.inputs.items() if role.startswith(prefix)}

    @property
    def has_flow(self) -> bool:
        """Whether the recipe has a flow of its own, with latents."""
        return "flow" in self.inputs

    def made_by_this_flow(self, pool: str) -> bool:
        """Tell whether a pool is of the recipe's own flow."""
        if not self.has_flow:
            return False
        root, records = self.inputs["flow"].manifest.root, self.named("pool")[pool].manifest.inputs
        return any(record.role == "flow" and record.root == root for record in records)

    @cached_property
    def dataset(self) -> DataSet:
        """The data set."""
        return open_dataset(self.inputs["dataset"])

    @cached_property
    def flow(self) -> Flow:
        """The recipe's flow."""
        return load_flow(self.inputs["flow"], device=self._device)

    @cached_property
    def latents(self) -> Latents:
        """The latents of the training images."""
        return open_latents(self.inputs["latents"])

    @cached_property
    def pools(self) -> dict[str, Pool]:
        """All pools by name."""
        return {name: open_pool(item) for name, item in self.named("pool").items()}

    @cached_property
    def runs(self) -> list[RunSummary]:
        """The error rates of all runs."""
        manifests = {name: [item.manifest for item in self.trainings(name)] for name in self.config.rows}
        return summarise_runs(manifests, self.config.rows)

    def trainings(self, run: str) -> list[Artifact]:
        """Return the trainings of a run, one for each of its seeds."""
        return [self.inputs[f"run:{training_name(run, seed)}"] for seed in self.config.rows[run].seeds]


def plot_figure(name: str, data: bytes, alt: str, caption: str = "") -> ReportFigure:
    """Return a plot, SVG, as it stands on the page."""
    return ReportFigure(name=name, data=data, media="image/svg+xml", alt=alt, caption=caption)


def sheet_figure(name: str, rows: list[list[np.ndarray]], titles: list[str], alt: str, caption: str) -> ReportFigure:
    """Return rows of images as a sheet, large enough to be looked at."""
    scale = max(1, round(SHEET_WIDTH / (len(titles) * rows[0][0].shape[1])))
    picture = sheet(
        rows, column_titles=titles, scale=SHEET_DENSITY * scale, gap=4 * SHEET_DENSITY, text_size=13 * SHEET_DENSITY
    )
    return ReportFigure(
        name=name,
        data=png_bytes(picture),
        media="image/png",
        alt=alt,
        caption=caption,
        pixelated=True,
        density=SHEET_DENSITY,
    )
