"""The paper's figures as grids of images, drawn from a flow, its latents and the images themselves.

Sources are shown as they are in the data set, mixes as the flow decodes them, also failed decodes.
Axes: R pairs or images, K columns, D components, H, W, C of an image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from lsmix.data.errors import RecipeError
from lsmix.data.mixing import LATENT_METHODS, PIXEL_METHODS, nearest
from lsmix.data.pool_spec import PoolConfig
from lsmix.data.rng import generator

if TYPE_CHECKING:
    from lsmix.data.dataset import DataSet
    from lsmix.data.latents import Latents
    from lsmix.glow.flow import Flow

__all__ = [
    "FIGURES",
    "PaperFigure",
    "check_figure",
    "choose_figure_pairs",
    "draw_figure",
    "figure_png",
]

Image = NDArray[np.uint8]
Pair = tuple[int, int]
# By their titles, unreduced as in the paper: λ of the columns of [P Fig. 4], share of zeros in those of [P Fig. 3].
_FIG4_RATES: Final = {f"{n}/16": Fraction(n, 16) for n in (2, 5, 7, 9, 11, 14)}
_FIG3_RATES: Final = {f"{n}/12": Fraction(n, 12) for n in range(1, 12)}
_INTERPOLATION_TITLES: Final = ("x₁", *(f"λ={rate}" for rate in _FIG4_RATES), "x₂")


@dataclass(frozen=True, kw_only=True)
class PaperFigure:
    """A figure before it is a picture."""

    rows: list[list[Image | None]]  # images uint8 (H, W, C), row by row
    column_titles: list[str]
    row_titles: list[str]  # "" where a row has none; may be empty
    alt: str  # what it shows, for readers who cannot see it
    caption: str  # what it shows, and which figure of the paper it is
    decoded: int  # images that the flow decoded
    decode_failed: int  # of these, failed decodes by the default rule of pools


@dataclass(frozen=True, kw_only=True)
class _Sources:
    """What a figure is drawn from."""

    flow: "Flow"
    latents: "Latents"
    images: Image  # of the train split, (N, H, W, C)
    pairs: list[Pair]  # rows of the train split
    seed: int  # of the draws of methods with chance
    methods: tuple[str, ...]  # that Appendix E shows


def _mixed(latents: "Latents", pairs: Sequence[Pair], method: str, seed: int) -> NDArray[np.float32]:
    """Return each pair of source rows mixed at each rate of Fig. 4: latents, float32 (R, K, D).

    Draws are named by the pair's row alone, so that the masks of methods with chance grow with λ.
    """
    from lsmix.glow.latent_mixing import mix_latents

    first, second = (latents.z.gather([pair[place] for pair in pairs]) for place in (0, 1))
    rates = _FIG4_RATES.values()
    return np.stack([mix_latents(method, first, second, float(rate), seed=seed)[0] for rate in rates], axis=1)


def _decode(flow: "Flow", z: NDArray[np.float32]) -> tuple[Image, NDArray[np.bool_]]:
    """Decode latents, float32 (R, K, D): images (R, K, H, W, C), and which failed by the default rule of pools, (R, K)."""
    from lsmix.glow.latent_mixing import is_failed_decode

    rule = PoolConfig()
    validate = partial(is_failed_decode, tolerance=rule.tolerance, bad_pixel_fraction=rule.bad_pixel_fraction)
    rows, columns, dim = z.shape
    images, failed = flow.decode(z.reshape(-1, dim), validate=validate)
    return images.reshape(rows, columns, *images.shape[1:]), failed.reshape(rows, columns)


def check_figure(name: str) -> None:
    """Raise RecipeError, with the nearest name, unless there is a figure of this name."""
    if name not in FIGURES:
        raise RecipeError(f"unknown figure {name!r}.{nearest(name, list(FIGURES))}")


def draw_figure(
    name: str,
    flow: "Flow",
    latents: "Latents",
    dataset: "DataSet",
    *,
    pairs: int = 6,
    seed: int = 0,
    methods: Sequence[str] = (),
) -> PaperFigure:
    """Draw a figure of the paper.

    Args:
        name: a name in FIGURES.
        flow: decodes the mixes.
        latents: of the train split of ``dataset``, made by ``flow``.
        dataset: the sources.
        pairs: pairs of source images, at least 1; fewer are shown where there are too few images.
        seed: of the choice of pairs, and of what methods with chance draw.
        methods: in latent space, that "appendix-e" shows; empty for those of lsmix alone.

    Raises:
        RecipeError: there is no such figure, or the data set has no pair.
    """
    check_figure(name)
    train = dataset.train
    chosen = choose_figure_pairs(train.labels, pairs, seed)
    if not chosen:
        raise RecipeError(
            f"cannot draw {name!r}: expected at least 1 pair of 2 training images, got {len(train)} images."
        )
    shown = tuple(methods) or tuple(LATENT_METHODS.builtin())
    sources = _Sources(flow=flow, latents=latents, images=train.images, pairs=chosen, seed=seed, methods=shown)
    return FIGURES[name](sources)


def choose_figure_pairs(labels: NDArray[np.int64], count: int, seed: int) -> list[tuple[int, int]]:
    """Return up to ``count`` pairs of rows of different classes, every row in one pair at most.

    A function of the seed and the labels, int64 (N,). Where no two classes are left, two images of one class are a pair;
    where no two images are left, there are fewer pairs.
    """
    left: list[int] = generator(seed, "figures", "pairs").permutation(len(labels)).tolist()
    pairs: list[Pair] = []
    while len(pairs) < count and len(left) > 1:
        first = left.pop(0)
        other = next((place for place, row in enumerate(left) if labels[row] != labels[first]), 0)
        pairs.append((first, left.pop(other)))
    return pairs


def figure_png(figure: PaperFigure, *, width: int = 830) -> bytes:
    """Return a figure as PNG: about 2 · ``width`` pixels wide, the same bytes each time."""
    from lsmix.pipeline.views.images import page_grid

    return page_grid(figure.rows, figure.column_titles, figure.row_titles, width=width)


def _side_by_side(sources: _Sources) -> PaperFigure:
    """Draw Fig. 1: each pair mixed at λ = ½ in pixel space and in latent space."""
    from lsmix.classifiers.pixel_mixing import mix_images
    from lsmix.glow.latent_mixing import mix_latents

    rows1, rows2 = (list(rows) for rows in zip(*sources.pairs, strict=True))
    first, second = sources.images[rows1], sources.images[rows2]
    in_pixels = ("mixup", "cutmix")
    pixels = [mix_images(method, first, second, 0.5, seed=sources.seed)[0] for method in in_pixels]
    gather = sources.latents.z.gather
    z, _ = mix_latents("ls-mix", gather(rows1), gather(rows2), 0.5, seed=sources.seed)
    images, failed = _decode(sources.flow, z[:, None])
    titles = [*(PIXEL_METHODS.entry(method).title for method in in_pixels), LATENT_METHODS.entry("ls-mix").title]
    return PaperFigure(
        rows=[list(row) for row in zip(first, second, *pixels, images[:, 0], strict=True)],
        column_titles=["x₁", "x₂", *titles],
        row_titles=[],
        alt=f"{len(first)} pairs of images, and their mixes by MixUp, CutMix and LS-Mix.",
        caption="Two images and their mixes by MixUp, CutMix and LS-Mix at λ = 1/2, as in Fig. 1 of the paper. "
        "MixUp blends them, CutMix pastes a box, LS-Mix joins parts of both.",
        decoded=failed.size,
        decode_failed=int(failed.sum()),
    )


def _zero_fill(sources: _Sources) -> PaperFigure:
    """Draw Fig. 3: images with a growing share of their last latent components at zero."""
    from lsmix.glow.latent_mixing import zero_fill

    rows = [first for first, _ in sources.pairs]
    z = sources.latents.z.gather(rows)
    zeroed = [zero_fill(z, int(rate * sources.latents.dim)) for rate in _FIG3_RATES.values()]
    images, failed = _decode(sources.flow, np.stack(zeroed, axis=1))
    return PaperFigure(
        rows=[[sources.images[row], *line] for row, line in zip(rows, images, strict=True)],
        column_titles=["x", *_FIG3_RATES],
        row_titles=[],
        alt=f"{len(rows)} images whose last latent components are set to zero, from one twelfth to eleven twelfths.",
        caption="Images with a growing share of their last latent components set to zero, as in Fig. 3 of the paper: the "
        "image of the zero latent spreads from the lower right.",
        decoded=failed.size,
        decode_failed=int(failed.sum()),
    )


def _interpolations(
    caption: str, methods: tuple[str, ...], sources: _Sources, *, share_of_pairs: int = 1
) -> PaperFigure:
    """Draw a block of rows for each method, by default all: a row for each pair of x₁, the mixes at growing λ, x₂."""
    methods = methods or sources.methods
    pairs = sources.pairs[: -(-len(sources.pairs) // share_of_pairs)]
    z = np.concatenate([_mixed(sources.latents, pairs, method, sources.seed) for method in methods])
    images, failed = _decode(sources.flow, z)
    titles = [LATENT_METHODS.entry(method).title for method in methods]
    rows: list[list[Image | None]] = [
        [sources.images[first], *line, sources.images[second]]
        for (first, second), line in zip(pairs * len(methods), images, strict=True)
    ]
    return PaperFigure(
        rows=rows,
        column_titles=list(_INTERPOLATION_TITLES),
        # One method needs no title; several have theirs at the first row of their block.
        row_titles=[line for title in titles for line in (title, *[""] * (len(pairs) - 1))] if len(titles) > 1 else [],
        alt=f"{len(pairs)} pairs of images, mixed by {', '.join(titles)} at λ from 2/16 to 14/16.",
        caption=caption,
        decoded=failed.size,
        decode_failed=int(failed.sum()),
    )


# By the name that the command line and the report use.
FIGURES: Final[dict[str, Callable[[_Sources], PaperFigure]]] = {
    "fig1": _side_by_side,
    "fig3": _zero_fill,
    "fig4": partial(
        _interpolations,
        "Pairs mixed by LS-Mix at growing λ between their sources, as in Fig. 4 of the paper: the part of x₂ grows from the "
        "upper left.",
        ("ls-mix",),
    ),
    "fig7": partial(
        _interpolations,
        "The pairs of Fig. 4 mixed by Swap-Mix and by Reverse-Mix, as in Fig. 7 of the paper: components that leave their "
        "place in the latent order deform the image.",
        ("swap-mix", "reverse-mix"),
    ),
    "appendix-e": partial(
        _interpolations,
        "The same pairs mixed at growing λ by every method in latent space, as in Appendix E of the paper.",
        (),
        share_of_pairs=2,
    ),
}
