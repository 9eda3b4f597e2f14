"""The chapter of the report with the paper's figures, drawn with the recipe's own flow and images."""

from lsmix.pipeline.views.figures import FIGURES, draw_figure, figure_png
from lsmix.pipeline.views.report.inputs import SHEET_DENSITY, SHEET_WIDTH, ReportInputs
from lsmix.pipeline.views.report.page import ReportFigure, Section

__all__ = ["mixes_section"]


def mixes_section(material: ReportInputs) -> Section:
    """Return the chapter of mixed images; an empty one where the recipe has no flow, or nothing to mix."""
    if not material.has_flow or len(material.latents) < 2:
        return Section(title="Mixed images")
    return Section(title="Mixed images", figures=tuple(_figure(material, name) for name in FIGURES))


def _figure(material: ReportInputs, name: str) -> ReportFigure:
    sheet = draw_figure(name, material.flow, material.latents, material.dataset, pairs=material.config.pairs)
    failed = f" {sheet.decode_failed} of {sheet.decoded} images failed to decode." if sheet.decode_failed else ""
    return ReportFigure(
        name=name,
        data=figure_png(sheet, width=SHEET_WIDTH, density=SHEET_DENSITY),
        media="image/png",
        alt=sheet.alt,
        caption=sheet.caption + failed,
        pixelated=True,
        density=SHEET_DENSITY,
    )
