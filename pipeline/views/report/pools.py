"""The chapter of the report on pools: counts, images of each method beside their sources, rates, and likelihoods."""

from lsmix.data.pool import Pool
from lsmix.pipeline.views.images import SHEET_TITLES, pool_rows
from lsmix.pipeline.views.plots import bits_histogram, histogram
from lsmix.pipeline.views.report.inputs import ReportInputs, plot_figure, sheet_figure
from lsmix.pipeline.views.report.page import PoolFacts, ReportFigure, Section, pool_table

__all__ = ["pools_section"]


def pools_section(material: ReportInputs) -> Section:
    """Return the chapter on the recipe's pools; an empty one where it has none."""
    if not material.pools:
        return Section(title="Pools")
    shown = _one_of_each_kind(material)
    figures = [_pool_sheet(material, name, pool) for name, pool in shown.items()]
    figures += [
        plot_figure(
            f"rates-{name}",
            histogram(pool.lam[:], pool.share_b[:]),
            f"Histograms of λ and of the effective share in pool {name}.",
            f"Pool {name}: λ as drawn, and the share of the second image that was really taken.",
        )
        for name, pool in shown.items()
    ]
    if material.has_flow:
        figures.append(_bits(material, shown))
    left_out = len(material.pools) - len(shown)
    return Section(
        title="Pools",
        text=f"Pictures of one pool of each method; {left_out} more are in the table only." if left_out else "",
        tables=(pool_table([_facts(name, pool) for name, pool in material.pools.items()]),),
        figures=tuple(figures),
    )


def _facts(name: str, pool: Pool) -> PoolFacts:
    counts = pool.manifest.counts
    return PoolFacts(
        name=name,
        method=pool.method,
        images=len(pool),
        redrawn=counts["redrawn"],
        replaced=counts["replaced"],
        decode_failed=counts["decode_failed_rows"],
    )


def _one_of_each_kind(material: ReportInputs) -> dict[str, Pool]:
    """Return the first pool of every method, corner and number of sources."""
    kinds: dict[object, str] = {}
    for name, pool in material.pools.items():
        kinds.setdefault((pool.method, pool.sources, "corner" in pool.columns), name)
    return {name: material.pools[name] for name in kinds.values()}


def _pool_sheet(material: ReportInputs, name: str, pool: Pool) -> ReportFigure:
    grid = pool_rows(pool, material.dataset.train.images, material.config.pairs)
    more = f" The mixes have {pool.sources} sources, of which two are shown." if pool.sources > 2 else ""
    return sheet_figure(
        f"pool-{name}",
        grid,
        SHEET_TITLES,
        f"Images of pool {name} between their sources.",
        f"Pool {name} ({pool.method}): images as they are in the pool, between the two they are made of.{more}",
    )


def _bits(material: ReportInputs, shown: dict[str, Pool]) -> ReportFigure:
    count = material.config.bits_images
    bits = {
        name: material.flow.bits_per_dim(material.flow.log_prob(pool.image[:count])) for name, pool in shown.items()
    }
    return plot_figure(
        "bits",
        bits_histogram(material.latents.bits_per_dim[:], bits),
        "Bits per dimension of training images and of mixed images.",
        "How likely the flow itself finds training images and mixes, both with their own low bits instead of noise, so "
        "below the figures of the training. Fewer bits are more likely, which is not the same as more natural: grey "
        "and blurred images take fewer bits than photographs.",
    )
