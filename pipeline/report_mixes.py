"""The chapter of the report with the paper's figures, drawn with the recipe's own flow."""

from lsmix.pipeline.report_material import Material, sheet_figure
from lsmix.pipeline.report_page import Section
from lsmix.pipeline.sweeps import FIG3_RATES, FIG4_RATES, choose_pairs, mix_sweep, zero_sweep

__all__ = ["mixes_section"]


def mixes_section(material: Material) -> Section:
    """Return the chapter of mixed images; an empty one where the recipe has no flow."""
    if not material.has_flow:
        return Section(title="Mixed images")
    figures = []
    count = material.config.pairs
    titles = ["x₁", *(f"λ={rate}" for rate in FIG4_RATES), "x₂"]
    for name, pool in material.pools.items():
        if material.made_by_this_flow(name):
            rows = mix_sweep(material.flow, material.latents, choose_pairs(pool, count), method=pool.method)
            figures.append(
                sheet_figure(
                    f"mixes-{name}",
                    rows,
                    titles,
                    f"Pairs of pool {name} mixed at growing λ.",
                    f"Pool {name}: pairs mixed at growing λ, as in Fig. 4 of the paper. The part that comes from x₂ grows "
                    "from the upper left, cell by cell of the coarsest grid in Morton order.",
                )
            )
            break  # every pool with this flow would show the same kind of sweep
    zero_titles = ["x", *(str(rate) for rate in FIG3_RATES)]
    rows = zero_sweep(material.flow, material.latents, range(min(count, len(material.latents))))
    figures.append(
        sheet_figure(
            "zero-fill",
            rows,
            zero_titles,
            "Images whose last latent components are set to zero.",
            "The last part of the latent set to zero, as in Fig. 3 of the paper: the image of the zero latent spreads from "
            "the lower right.",
        )
    )
    return Section(title="Mixed images", figures=tuple(figures))
