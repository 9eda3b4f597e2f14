"""The report's sections on mixed images: the paper's figures and the recipe's pools."""

from collections.abc import Iterator

from lsmix.data.pool import Pool
from lsmix.pipeline.views.figures import FIGURES, draw_figure, figure_png
from lsmix.pipeline.views.images import GRID_TITLES, page_grid, sample_grid
from lsmix.pipeline.views.page import Figure, Section, Table
from lsmix.pipeline.views.plots import histogram, spread_plot
from lsmix.pipeline.views.pool_summary import summarise_pool
from lsmix.pipeline.views.report.inputs import ReportInputs

__all__ = ["mixes_sections", "pools_section"]

_OPEN_FIGURES = ("fig1", "fig4")  # of the paper; all others are folded
_ROWS_SHOWN = 12  # failed decodes in the table; the manifest of the pool lists all of them


def mixes_sections(inputs: ReportInputs) -> Iterator[Section]:
    """Yield the sections with images of mixes: the paper's figures, drawn with the recipe's flow, and a pool."""
    pools = _one_of_each_kind(inputs)
    names = FIGURES if inputs.has_flow and len(inputs.latents) > 1 else ()
    drawn = {name: _paper_figure(inputs, name) for name in names}
    first = [_pool_grid(inputs, name, pool) for name, pool in list(pools.items())[:1]]
    yield Section(
        title="Mixed images", items=(*(figure for name, figure in drawn.items() if name in _OPEN_FIGURES), *first)
    )
    yield Section(
        title="More figures of the paper",
        items=[figure for name, figure in drawn.items() if name not in _OPEN_FIGURES],
        folded=True,
    )


def pools_section(inputs: ReportInputs) -> Iterator[Section]:
    """Yield the section on the recipe's pools, if it has any."""
    if not inputs.pools:
        return
    shown = _one_of_each_kind(inputs)
    items: list[Table | Figure] = [_pool_table(inputs.pools)]
    items += [_pool_grid(inputs, name, pool) for name, pool in list(shown.items())[1:]]
    items += [_histogram(name, pool) for name, pool in shown.items()]
    if inputs.has_flow:
        items.append(_bits(inputs, shown))
    some = len(shown) < len(inputs.pools)
    text = f"Images are shown for {len(shown):,} of {len(inputs.pools):,} pools, one of each kind." if some else ""
    yield Section(title="Pools", text=text, items=items, folded=True)


def _paper_figure(inputs: ReportInputs, name: str) -> Figure:
    drawn = draw_figure(name, inputs.flow, inputs.latents, inputs.dataset, pairs=inputs.config.pairs)
    failed = f" {drawn.decode_failed:,} of {drawn.decoded:,} images failed to decode." if drawn.decode_failed else ""
    return Figure(name=name, data=figure_png(drawn), alt=drawn.alt, caption=drawn.caption + failed)


def _pool_table(pools: dict[str, Pool]) -> Table:
    """Return the table of pools, with their counts and the first rows that failed to decode."""
    rows = []
    for name, pool in pools.items():
        counts = pool.manifest.counts
        redrawn, replaced, failed = counts["redrawn"], counts["replaced"], counts["decode_failed_rows"]
        numbers = (f"{count:,}" for count in (len(pool), len(pool) - redrawn - replaced, redrawn, replaced))
        listed, more = ", ".join(map(str, failed[:_ROWS_SHOWN])) or "none", len(failed) - _ROWS_SHOWN
        rows.append((name, pool.method, *numbers, f"{listed} … and {more:,} more" if more > 0 else listed))
    return Table(
        title="Pools",
        columns=("pool", "method", "images", "ok", "redrawn", "replaced", "rows that failed to decode at first"),
        rows=tuple(rows),
        note="Redrawn: the first draw failed to decode, and a later one succeeded. Replaced: no draw could be decoded, "
        "so the pool contains the first source image instead of a mix.",
    )


def _one_of_each_kind(inputs: ReportInputs) -> dict[str, Pool]:
    """Return the first pool of every combination of method, corner and number of sources."""
    kinds: dict[object, str] = {}
    for name, pool in inputs.pools.items():
        kinds.setdefault((pool.method, pool.sources, "corner" in pool.columns), name)
    return {name: inputs.pools[name] for name in kinds.values()}


def _pool_grid(inputs: ReportInputs, name: str, pool: Pool) -> Figure:
    more = f" Each mix has {pool.sources} sources; the first two are shown." if pool.sources > 2 else ""
    return Figure(
        name=f"pool-{name}",
        data=page_grid(sample_grid(pool, inputs.dataset.train.images, inputs.config.pairs), GRID_TITLES),
        alt=f"Images of pool {name}, each between its source images.",
        caption=f"Pool {name} ({pool.method}): each mix is shown between its source images x₁ and x₂.{more}",
    )


def _histogram(name: str, pool: Pool) -> Figure:
    summary = summarise_pool(pool)
    return Figure(
        name=f"rates-{name}",
        data=histogram(summary.lam, summary.share),
        alt=f"Histograms of λ and of the share of x₂ in pool {name}.",
        caption=f"Pool {name}: the sampled λ and the actual share of x₂.",
    )


def _bits(inputs: ReportInputs, shown: dict[str, Pool]) -> Figure:
    count = inputs.config.bits_images
    bits = {"training images": inputs.latents.bits_per_dim[:]}
    bits |= {name: inputs.flow.bits_per_dim(inputs.flow.log_prob(pool.image[:count])) for name, pool in shown.items()}
    return Figure(
        name="bits",
        data=spread_plot(bits, "bits per dimension"),
        alt="Bits per dimension of training images and of mixed images.",
        caption="Likelihood of training images and mixes under the recipe's own flow. Thin lines: 5% to 95%; thick "
        "lines: the middle half; numbers: medians; shaded: the middle half of the training images. All images keep "
        "their own low bits instead of dequantization noise, so the values are lower than during training. Fewer bits "
        "mean more likely, but not more natural: grey and blurred images take fewer bits than photographs.",
    )
