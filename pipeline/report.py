"""The report stage: every artifact of a recipe → ``report.html``, ``report.md`` and the pictures of both.

Numbers come from manifests and logs; only the sheets and the likelihood of the mixes are computed here.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from lsmix.pipeline.error_rates import RowText
from lsmix.pipeline.stage import Estimate, Outcome, Stage, StageTask, WorkSize

__all__ = ["REPORT", "RecipeReport", "ReportConfig"]

_FIGURES = "figures"
_ESTIMATED_BYTES = 4_000_000  # a page of this kind with its pictures


class ReportConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the report shows."""

    title: Annotated[str, Meta(max_length=200)] = ""  # of the page; empty names the recipe
    table: Annotated[str, Meta(max_length=200)] = ""  # title of the table of error rates; empty is "Error rates"
    note: Annotated[str, Meta(max_length=400)] = ""  # stands below that table
    pairs: Annotated[int, Meta(ge=1, le=64)] = 6  # rows of the sheets
    bits_images: Annotated[int, Meta(ge=1, le=100_000)] = (
        1000  # images of each pool whose bits per dimension are measured
    )


class RecipeReport(ReportConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The report of a recipe, with what the recipe says of its runs."""

    rows: dict[str, RowText] = {}  # by run


def run(task: StageTask) -> Outcome:
    """Write the report."""
    from lsmix.data.durable import write_durably
    from lsmix.pipeline.reports.content import build_page
    from lsmix.pipeline.reports.page import render_html, render_markdown

    task.progress.start(task.label, 1, "page")
    page = build_page(task)
    for figure in page.figures:
        write_durably(task.folder / _FIGURES / figure.file_name, figure.data)
    write_durably(task.folder / "report.md", render_markdown(page, figure_folder=_FIGURES).encode())
    write_durably(task.folder / "report.html", render_html(page).encode())
    task.progress.advance()
    task.progress.finish()
    # The pages tell how long things took, so only the pictures are the same each time.
    return Outcome(payload=frozenset({_FIGURES}), counts={"figures": len(page.figures)})


def _estimate(config: ReportConfig, size: WorkSize) -> Estimate:
    return Estimate(bytes=_ESTIMATED_BYTES, flops=float(config.bits_images) * size.flow_flops)


REPORT = Stage(name="report", version=1, run=run, estimate=_estimate)
