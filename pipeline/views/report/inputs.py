"""The artifacts that a report shows, opened on first use.

A recipe may lack a flow, pools or runs, so check before use.
"""

from functools import cached_property

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

__all__ = ["ReportInputs"]


class ReportInputs:
    """The artifacts of a recipe, opened on first use."""

    def __init__(self, task: StageTask) -> None:
        self.name = task.name  # of the recipe
        self.config: RecipeReport = task.config
        self.artifacts = task.inputs
        self._device = task.device

    def named(self, kind: str) -> dict[str, Artifact]:
        """Return all artifacts of a kind, "pool" or "run", by name."""
        prefix = f"{kind}:"
        return {role[len(prefix) :]: item for role, item in self.artifacts.items() if role.startswith(prefix)}

    @property
    def has_flow(self) -> bool:
        """Whether the recipe has a flow, and therefore latents."""
        return "flow" in self.artifacts

    @cached_property
    def dataset(self) -> DataSet:
        """The recipe's data set."""
        return open_dataset(self.artifacts["dataset"])

    @cached_property
    def flow(self) -> Flow:
        """The recipe's flow."""
        return load_flow(self.artifacts["flow"], device=self._device)

    @cached_property
    def latents(self) -> Latents:
        """The latents of the training images."""
        return open_latents(self.artifacts["latents"])

    @cached_property
    def pools(self) -> dict[str, Pool]:
        """The recipe's pools by name."""
        return {name: open_pool(item) for name, item in self.named("pool").items()}

    @cached_property
    def runs(self) -> list[RunSummary]:
        """The error rates of all runs."""
        return summarise_runs({name: self.trainings(name) for name in self.config.rows}, self.config.rows)

    def trainings(self, run: str) -> dict[int, Artifact]:
        """Return the trainings of a run by seed."""
        return {seed: self.artifacts[f"run:{training_name(run, seed)}"] for seed in self.config.rows[run].seeds}
