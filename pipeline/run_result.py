"""The result of a run: its artifacts, error rates and report."""

from dataclasses import dataclass
from pathlib import Path

from lsmix.pipeline.config.recipe import Recipe, training_name
from lsmix.pipeline.engine.runner import Built
from lsmix.pipeline.views.error_rates import RunSummary, summarise_runs

__all__ = ["RunResult"]


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run brought up to date."""

    recipe: Recipe
    built: list[Built]

    def __getitem__(self, name: str) -> Built:
        """Return an artifact by "stage" (where there is one) or "stage/name", such as "mix/lsmix"."""
        fits = [item for item in self.built if name in (item.stage, f"{item.stage}/{item.name}")]
        if len(fits) != 1:
            known = ", ".join(f"{item.stage}/{item.name}" for item in self.built)
            raise KeyError(f"{name!r} names {len(fits)} artifacts of this run; it has {known}")
        return fits[0]

    @property
    def error_rates(self) -> list[RunSummary]:
        """The error rates of all classifier runs, in the recipe's order."""
        made = {item.name: item.artifact for item in self.built if item.stage == "train"}
        runs = {
            name: {seed: made[training_name(name, seed)] for seed in run.seeds if training_name(name, seed) in made}
            for name, run in self.recipe.runs.items()
        }
        finished = {name: trainings for name, trainings in runs.items() if trainings}
        return summarise_runs(finished, self.recipe.report_config().rows)

    @property
    def report(self) -> Path | None:
        """The report's HTML page on this machine, where the run went as far as the report."""
        pages = [item.folder / "report.html" for item in self.built if item.stage == "report"]
        return pages[0] if pages else None

    @property
    def report_place(self) -> str:
        """Path or URL of the report's HTML page; "" where the run went not as far."""
        pages = [f"{item.location}/report.html" for item in self.built if item.stage == "report"]
        return pages[0] if pages else ""
