"""The report stage: all artifacts of a recipe → ``report.html`` and its figures as files.

Numbers come from manifests and logs; only the figures and the likelihood of the mixes are computed here.
"""

from importlib.util import find_spec

from lsmix.data.errors import RecipeError
from lsmix.pipeline.config.schema import ReportConfig
from lsmix.pipeline.engine.stage import Cost, DatasetSize, Stage, StageResult, StageTask

__all__ = ["REPORT"]

_FIGURES = "figures"
_ESTIMATED_BYTES = 4_000_000  # typical size of a page with its figures


def run(task: StageTask) -> StageResult:
    """Write the report."""
    from lsmix.data.atomic import write_atomic
    from lsmix.pipeline.views.page import render_page
    from lsmix.pipeline.views.report.sections import build_page

    task.progress.start(task.label, 1, "page")
    page = build_page(task)
    for figure in page.figures:
        write_atomic(task.folder / _FIGURES / figure.file_name, figure.data)
    write_atomic(task.folder / "report.html", render_page(page).encode())
    task.progress.advance()
    task.progress.finish()
    # The page contains durations, so only the figures are reproducible.
    return StageResult(payload=frozenset({_FIGURES}), counts={"figures": len(page.figures)})


def _estimate(config: ReportConfig, size: DatasetSize) -> Cost:
    return Cost(bytes=_ESTIMATED_BYTES, flops=float(config.bits_images) * size.flow_flops)


def _check(config: ReportConfig, size: DatasetSize) -> None:
    """Raise RecipeError if matplotlib is missing, before hours of work without a report."""
    if find_spec("matplotlib") is None:
        raise RecipeError(
            "plots need matplotlib. Run: pip install 'lsmix[report]'. Or run 'lsmix train', which builds no report."
        )


REPORT = Stage(name="report", version=3, run=run, estimate=_estimate, check=_check, lower="report.bits_images")
