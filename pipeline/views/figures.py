"""The paper's figures as sheets, drawn from a flow, its latents and the images themselves.

Sources are shown as they are in the data set, mixes as the flow decodes them, whether or not the decode failed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from lsmix.data.errors import RecipeError
from lsmix.data.mixing import LATENT_METHODS, PIXEL_METHODS, nearest
from lsmix.data.rng import generator
from lsmix.pipeline.views.interpolation import (
    FIG3_RATES,
    FIG4_RATES,
    Sweep,
    decode_sweep,
    mixed_latents,
    zeroed_latents,
)

if TYPE_CHECKING:
    from lsmix.data.dataset import DataSet
    from lsmix.data.latents import Latents
    from lsmix.glow.flow import Flow

__all__ = ["FIGURES", "FigureSheet", "check_figure", "choose_figure_pairs", "draw_figure", "figure_png"]

Image = NDArray[np.uint8]
Pair = tuple[int, int]
_SWEEP_TITLES: Final = ("x₁", *(f"λ={rate}" for rate in FIG4_RATES), "x₂")


@dataclass(frozen=True, kw_only=True)
class FigureSheet:
    """A figure before it is a picture."""

    name: str  # a name in FIGURES
    rows: list[list[Image | None]]  # images uint8 (H, W, C), row by row
    column_titles: list[str]
    row_titles: list[str]  # "" where a row has none; may be empty
    alt: str  # what is seen, for who cannot see it
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
    methods: tuple[str, ...]  # that the sheets of Appendix E show

    def mixed(self, method: str, pairs: Sequence[Pair]) -> NDArray[np.float32]:
        return mixed_latents(self.latents, pairs, method=method, seed=self.seed)

    def decode(self, z: NDArray[np.float32]) -> Sweep:
        return decode_sweep(self.flow, self.latents, z)


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
) -> FigureSheet:
    """Draw a figure of the paper.

    Args:
        name: a name in FIGURES.
        flow: decodes the mixes.
        latents: of the train split of ``dataset``, made by ``flow``.
        dataset: the sources.
        pairs: pairs of source images, at least 1; fewer are shown where there are too few images.
        seed: of the choice of pairs, and of what methods with chance draw.
        methods: in latent space, that "appendix-e" shows; empty for those of lsmix, whatever else is installed.

    Raises:
        RecipeError: there is no such figure, the data set has no pair, or flow, latents and data set do not belong together.
    """
    check_figure(name)
    train = dataset.train
    if len(latents) != len(train) or latents.dim != flow.dim:
        raise RecipeError(
            f"cannot draw {name!r}: {len(latents)} latents of length {latents.dim} do not belong to {len(train)} training "
            f"images and a flow of {flow.dim} components. Encode these images with this flow."
        )
    flow.check_images(train.images[:1])
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


def figure_png(sheet: FigureSheet, *, width: int = 830, density: int = 2) -> bytes:
    """Return a figure as PNG: about ``width`` × ``density`` pixels wide, the same bytes each time.

    Every pixel of an image is enlarged by a whole number, at least ``density``; ``density`` is how many pixels of the
    picture go to one of the page, so that letters are sharp.
    """
    from lsmix.pipeline.views import images as sheets

    image_width = next(image.shape[1] for row in sheet.rows for image in row if image is not None)
    scale = max(1, round(width / (len(sheet.column_titles) * image_width)))
    picture = sheets.sheet(
        sheet.rows,
        scale=density * scale,
        gap=4 * density,
        column_titles=sheet.column_titles,
        row_titles=sheet.row_titles,
        text_size=13 * density,
    )
    return sheets.png_bytes(picture)


def _side_by_side(sources: _Sources) -> FigureSheet:
    """Draw Fig. 1: each pair mixed at λ = ½ in pixel space and in latent space."""
    from lsmix.classifiers.pixel_mixing import mix_images
    from lsmix.glow.latent_mixing import mix_latents

    rows1, rows2 = (list(rows) for rows in zip(*sources.pairs, strict=True))
    first, second = sources.images[rows1], sources.images[rows2]
    in_pixels = ("mixup", "cutmix")
    pixels = [mix_images(method, first, second, 0.5, seed=sources.seed)[0] for method in in_pixels]
    gather = sources.latents.z.gather
    z, _ = mix_latents("ls-mix", gather(rows1), gather(rows2), 0.5, seed=sources.seed)
    decoded = sources.decode(z[:, None])
    columns = [first, second, *pixels, decoded.images[:, 0]]
    titles = [*(PIXEL_METHODS.entry(method).title for method in in_pixels), LATENT_METHODS.entry("ls-mix").title]
    return FigureSheet(
        name="fig1",
        rows=[list(row) for row in zip(*columns, strict=True)],
        column_titles=["x₁", "x₂", *titles],
        row_titles=[],
        alt=f"{len(first)} pairs of images, and what MixUp, CutMix and LS-Mix make of them.",
        caption="Two images and their mixes by MixUp, CutMix and LS-Mix at λ = 1/2, as in Fig. 1 of the paper. "
        "MixUp lays one over the other, CutMix pastes a box, LS-Mix joins parts of both.",
        decoded=decoded.decode_failed.size,
        decode_failed=int(decoded.decode_failed.sum()),
    )


def _zero_fill(sources: _Sources) -> FigureSheet:
    """Draw Fig. 3: images of whose latents ever more of the last components are zero."""
    rows = [first for first, _ in sources.pairs]
    decoded = sources.decode(zeroed_latents(sources.latents, rows))
    return FigureSheet(
        name="fig3",
        rows=[[sources.images[row], *sweep] for row, sweep in zip(rows, decoded.images, strict=True)],
        column_titles=["x", *FIG3_RATES],
        row_titles=[],
        alt=f"{len(rows)} images whose last latent components are set to zero, from one twelfth to eleven twelfths.",
        caption="Images with a growing share of their last latent components set to zero, as in Fig. 3 of the paper: the "
        "image of the zero latent spreads from the lower right.",
        decoded=decoded.decode_failed.size,
        decode_failed=int(decoded.decode_failed.sum()),
    )


def _ls_mix(sources: _Sources) -> FigureSheet:
    """Draw Fig. 4: LS-Mix at growing λ."""
    return _sweeps(
        sources,
        "fig4",
        ["ls-mix"],
        sources.pairs,
        caption="Pairs mixed by LS-Mix at growing λ between their sources, as in Fig. 4 of the paper: what comes from x₂ "
        "grows from the upper left.",
    )


def _alternatives(sources: _Sources) -> FigureSheet:
    """Draw Fig. 7: Swap-Mix and Reverse-Mix at growing λ."""
    return _sweeps(
        sources,
        "fig7",
        ["swap-mix", "reverse-mix"],
        sources.pairs,
        caption="The pairs of Fig. 4 mixed by Swap-Mix and by Reverse-Mix, as in Fig. 7 of the paper: components that leave "
        "their place in the latent order deform the image.",
    )


def _every_method(sources: _Sources) -> FigureSheet:
    """Draw the sheets of Appendix E: every method on the same pairs, half as many."""
    return _sweeps(
        sources,
        "appendix-e",
        list(sources.methods),
        sources.pairs[: (len(sources.pairs) + 1) // 2],
        caption="The same pairs mixed at growing λ by every method in latent space, as in Appendix E of the paper.",
    )


def _sweeps(sources: _Sources, name: str, methods: list[str], pairs: list[Pair], *, caption: str) -> FigureSheet:
    """Return a block of rows for each method, a row for each pair: x₁, the mixes at growing λ, x₂."""
    z = np.concatenate([sources.mixed(method, pairs) for method in methods])
    decoded = sources.decode(z)
    titles = [LATENT_METHODS.entry(method).title for method in methods]
    rows: list[list[Image | None]] = [
        [sources.images[first], *sweep, sources.images[second]]
        for (first, second), sweep in zip(pairs * len(methods), decoded.images, strict=True)
    ]
    return FigureSheet(
        name=name,
        rows=rows,
        column_titles=list(_SWEEP_TITLES),
        # One method needs no title; else it stands at the first row of its block.
        row_titles=[line for title in titles for line in (title, *[""] * (len(pairs) - 1))] if len(titles) > 1 else [],
        alt=f"{len(pairs)} pairs of images, mixed by {', '.join(titles)} at λ from 2/16 to 14/16.",
        caption=caption,
        decoded=decoded.decode_failed.size,
        decode_failed=int(decoded.decode_failed.sum()),
    )


# How each figure is drawn, by the name that the command line and the report know it by.
FIGURES: Final[dict[str, Callable[[_Sources], FigureSheet]]] = {
    "fig1": _side_by_side,
    "fig3": _zero_fill,
    "fig4": _ls_mix,
    "fig7": _alternatives,
    "appendix-e": _every_method,
}
