"""The paper's figures as image grids, drawn from a flow, its latents and the source images.

Source images come from the data set; mixes are decoded by the flow, and failed decodes are shown too.
Axes: R pairs or images, K columns, D latent components, H, W, C of an image.
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
# Column title -> λ in [P Fig. 4], and -> share of zeros in [P Fig. 3]; the fractions are not reduced, as in the paper.
_FIG4_RATES: Final = {f"{n}/16": Fraction(n, 16) for n in (2, 5, 7, 9, 11, 14)}
_FIG3_RATES: Final = {f"{n}/12": Fraction(n, 12) for n in range(1, 12)}
_INTERPOLATION_TITLES: Final = ("x₁", *(f"λ={rate}" for rate in _FIG4_RATES), "x₂")


@dataclass(frozen=True, kw_only=True)
class PaperFigure:
    """The images and texts of a figure, before rendering."""

    rows: list[list[Image | None]]  # images uint8 (H, W, C), row by row
    column_titles: list[str]
    row_titles: list[str]  # "" for rows without a title; may be empty
    alt: str  # alternative text for screen readers
    caption: str  # description, and the number of the figure in the paper
    decoded: int  # number of images decoded by the flow
    decode_failed: int  # how many of these failed to decode, by the default rule of pools


@dataclass(frozen=True, kw_only=True)
class _Sources:
    """The inputs of a figure."""

    flow: "Flow"
    latents: "Latents"
    images: Image  # of the train split, (N, H, W, C)
    pairs: list[Pair]  # rows of the train split
    seed: int  # for methods that draw random numbers
    methods: tuple[str, ...]  # shown in the figure of Appendix E


def _mixed(latents: "Latents", pairs: Sequence[Pair], method: str, seed: int) -> NDArray[np.float32]:
    """Mix each pair of source rows at each λ of Fig. 4 and return the latents, float32 (R, K, D).

    Random draws depend on the pair's row only, so the masks of randomised methods grow with λ.
    """
    from lsmix.glow.latent_mixing import mix_latents

    first, second = (latents.z.gather([pair[index] for pair in pairs]) for index in (0, 1))
    rates = _FIG4_RATES.values()
    return np.stack([mix_latents(method, first, second, float(rate), seed=seed)[0] for rate in rates], axis=1)


def _decode(flow: "Flow", z: NDArray[np.float32]) -> tuple[Image, NDArray[np.bool_]]:
    """Decode latents, float32 (R, K, D), into images (R, K, H, W, C) and failed-decode flags (R, K) by pool defaults."""
    from lsmix.glow.latent_mixing import is_failed_decode

    rule = PoolConfig()
    validate = partial(is_failed_decode, tolerance=rule.tolerance, bad_pixel_fraction=rule.bad_pixel_fraction)
    rows, columns, dim = z.shape
    images, failed = flow.decode(z.reshape(-1, dim), validate=validate)
    return images.reshape(rows, columns, *images.shape[1:]), failed.reshape(rows, columns)


def check_figure(name: str) -> None:
    """Raise RecipeError, with the nearest name, unless ``name`` is in FIGURES."""
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
        name: A name in FIGURES.
        flow: The flow that decodes the mixes.
        latents: Latents of the train split of ``dataset``, encoded by ``flow``.
        dataset: The data set with the source images.
        pairs: Number of pairs of source images, at least 1; fewer are shown if the data set has too few images.
        seed: Seed for the choice of pairs and for randomised methods.
        methods: Latent-space methods that "appendix-e" shows; empty for the methods built into lsmix.

    Raises:
        RecipeError: The figure does not exist, or the data set has fewer than two training images.
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
    """Return up to ``count`` pairs of rows of different classes; every row is in at most one pair.

    The result depends only on the seed and the labels, int64 (N,). Once the remaining rows have a single class, pairs
    are of the same class.
    """
    left: list[int] = generator(seed, "figures", "pairs").permutation(len(labels)).tolist()
    pairs: list[Pair] = []
    while len(pairs) < count and len(left) > 1:
        first = left.pop(0)
        other = next((index for index, row in enumerate(left) if labels[row] != labels[first]), 0)
        pairs.append((first, left.pop(other)))
    return pairs


def figure_png(figure: PaperFigure, *, width: int = 830) -> bytes:
    """Return a figure as PNG, about 2 · ``width`` pixels wide; equal figures give equal bytes."""
    from lsmix.pipeline.views.images import page_grid

    return page_grid(figure.rows, figure.column_titles, figure.row_titles, width=width)


def _count_pairs(count: int) -> str:
    return f"{count} {'pair' if count == 1 else 'pairs'} of images"


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
        alt=f"{_count_pairs(len(first))} and their mixes by MixUp, CutMix and LS-Mix.",
        caption="Two images and their mixes by MixUp, CutMix and LS-Mix at λ = 1/2, as in Fig. 1 of the paper. "
        "MixUp blends the images, CutMix pastes a box, and LS-Mix joins parts of both.",
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
        caption="Images with a growing share of their last latent components set to zero, as in Fig. 3 of the paper. "
        "The image of the all-zero latent spreads from the lower right.",
        decoded=failed.size,
        decode_failed=int(failed.sum()),
    )


def _interpolations(
    caption: str, methods: tuple[str, ...], sources: _Sources, *, share_of_pairs: int = 1
) -> PaperFigure:
    """Draw a block of rows for each method, one row per pair: x₁, the mixes at growing λ, x₂.

    Empty ``methods`` means ``sources.methods``; only one in ``share_of_pairs`` pairs is drawn, rounded up.
    """
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
        # A single method needs no title; otherwise the first row of each block has one.
        row_titles=[line for title in titles for line in (title, *[""] * (len(pairs) - 1))] if len(titles) > 1 else [],
        alt=f"{_count_pairs(len(pairs))}, mixed by {', '.join(titles)} at λ from 2/16 to 14/16.",
        caption=caption,
        decoded=failed.size,
        decode_failed=int(failed.sum()),
    )


# By the names used in the command line and the report.
FIGURES: Final[dict[str, Callable[[_Sources], PaperFigure]]] = {
    "fig1": _side_by_side,
    "fig3": _zero_fill,
    "fig4": partial(
        _interpolations,
        "Pairs mixed by LS-Mix at growing λ, as in Fig. 4 of the paper. The part of x₂ grows from the upper left.",
        ("ls-mix",),
    ),
    "fig7": partial(
        _interpolations,
        "The pairs of Fig. 4 mixed by Swap-Mix and Reverse-Mix, as in Fig. 7 of the paper. Moving components to other "
        "positions in the latent vector distorts the image.",
        ("swap-mix", "reverse-mix"),
    ),
    "appendix-e": partial(
        _interpolations,
        "The same pairs mixed by every latent-space method at growing λ, as in Appendix E of the paper.",
        (),
        share_of_pairs=2,
    ),
}
