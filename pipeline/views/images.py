"""Image grids as PNG, and the choice of pool rows that a grid shows."""

import io
import math
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from lsmix.data.dataset import SplitArrays
from lsmix.data.pool import Pool

__all__ = [
    "GRID_COLUMNS",
    "GRID_TITLES",
    "image_grid",
    "in_rows",
    "page_grid",
    "png_bytes",
    "pool_picture",
    "sample_grid",
]

_INK = (128, 136, 148, 255)  # contrast of at least 3.5 on white and on near-black
_PAGE_WIDTH = 830  # CSS pixels
_PAGE_DENSITY = 2  # image pixels per CSS pixel, so that text is sharp
_TEXT_SIZES = range(13, 23)  # CSS pixels of titles on a page; the largest that fits is used, for readers on a phone
_TRIPLES = 3  # x₁, mix, x₂ triples per row
_CANDIDATES = 4096  # pool rows from which a grid is chosen
_LARGEST, _SMALLEST = 128, 48  # pixels of the longer side of a pool image in a grid
GRID_TITLES: Final = ["x₁", "mix", "x₂"] * _TRIPLES
GRID_COLUMNS: Final = 12  # of a grid without source images


def image_grid(
    rows: Sequence[Sequence[np.ndarray | None]],
    *,
    scale: int = 3,
    gap: int = 4,
    text_size: int = 13,
    column_titles: Sequence[str] = (),
    row_titles: Sequence[str] = (),
) -> Image.Image:
    """Return rows of images as one RGBA image.

    Images are uint8 (H, W, C) or (H, W), with C = 1 (grey) or 3 (RGB); None leaves a cell empty. Every pixel is
    enlarged to ``scale`` × ``scale`` pixels. All cells have the size of the largest image and are ``gap`` pixels apart.
    There may be fewer titles than rows or columns.

    Raises:
        ValueError: There is no image, or an image has another shape or dtype.

    Example:
        >>> import numpy as np
        >>> black = np.zeros((8, 8, 1), np.uint8)
        >>> image_grid([[black, black], [black]], scale=2).size
        (36, 36)
    """
    pictures = [[None if image is None else _picture(image, scale) for image in row] for row in rows]
    present = [picture for row in pictures for picture in row if picture is not None]
    if not present:
        raise ValueError(f"A grid needs at least one image, got {len(rows)} rows without images.")
    cell_width, cell_height = max(p.width for p in present), max(p.height for p in present)
    columns = max(len(row) for row in pictures)

    font = _font(text_size)
    left = max((round(font.getlength(title)) + 2 * gap for title in row_titles), default=0)
    top = text_size + text_size // 2 + gap if column_titles else 0
    width = left + columns * cell_width + (columns - 1) * gap
    height = top + len(pictures) * cell_height + (len(pictures) - 1) * gap
    canvas = Image.new("RGBA", (width, height), (*_INK[:3], 0))
    draw = ImageDraw.Draw(canvas)
    for row, line in enumerate(pictures):
        for column, picture in enumerate(line):
            if picture is not None:
                x = left + column * (cell_width + gap) + (cell_width - picture.width) // 2
                y = top + row * (cell_height + gap) + (cell_height - picture.height) // 2
                canvas.paste(picture, (x, y))
    for column, title in enumerate(column_titles[:columns]):
        middle = left + column * (cell_width + gap) + cell_width // 2
        draw.text((middle, top - gap), _fitted(title, font, cell_width + gap), font=font, fill=_INK, anchor="md")
    for row, title in enumerate(row_titles[: len(pictures)]):
        middle = top + row * (cell_height + gap) + cell_height // 2
        draw.text((left - 2 * gap, middle), title, font=font, fill=_INK, anchor="rm")
    return canvas


def page_grid(
    rows: Sequence[Sequence[np.ndarray | None]],
    column_titles: Sequence[str],
    row_titles: Sequence[str] = (),
    *,
    width: int = _PAGE_WIDTH,
) -> bytes:
    """Return a titled grid for a page as PNG, about 2 · ``width`` pixels wide, enlarged by an integer factor."""
    image_width = next(image.shape[1] for row in rows for image in row if image is not None)
    scale = _PAGE_DENSITY * max(1, round(width / (len(column_titles) * image_width)))
    sizes = range(_TEXT_SIZES.stop - 1, _TEXT_SIZES.start, -1)
    fitting = (
        size
        for size in sizes
        if all(_font(_PAGE_DENSITY * size).getlength(title) <= scale * image_width for title in column_titles)
    )
    return png_bytes(
        image_grid(
            rows,
            scale=scale,
            gap=4 * _PAGE_DENSITY,
            text_size=_PAGE_DENSITY * next(fitting, _TEXT_SIZES.start),
            column_titles=column_titles,
            row_titles=row_titles,
        )
    )


def png_bytes(image: Image.Image) -> bytes:
    """Return the image as PNG without metadata; the same image gives the same bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _picture(image: np.ndarray, scale: int) -> Image.Image:
    pixels = image[..., None] if image.ndim == 2 else image
    if image.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or 0 in pixels.shape:
        raise ValueError(
            f"Expected a uint8 image of shape (H, W), (H, W, 1) or (H, W, 3), got {image.dtype} {image.shape}."
        )
    rgb = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    return Image.fromarray(rgb.repeat(scale, axis=0).repeat(scale, axis=1))


def _fitted(title: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Return the title, shortened with an ellipsis if it is wider than ``width`` pixels."""
    if font.getlength(title) <= width:
        return title
    while title and font.getlength(f"{title}…") > width:
        title = title[:-1].rstrip()
    return f"{title}…"


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Return matplotlib's DejaVu Sans if installed, otherwise Pillow's own font, which has Latin letters only."""
    spec = find_spec("matplotlib")
    if spec is None or spec.origin is None:
        return cast("ImageFont.FreeTypeFont", ImageFont.load_default(size))
    return ImageFont.truetype(Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def sample_grid(pool: Pool, train: NDArray[np.uint8], count: int) -> list[list[NDArray[np.uint8]]]:
    """Return up to ``count`` grid rows of three mixes, each between its first two sources, to be titled GRID_TITLES.

    ``train`` contains the images of the train split, uint8 (N, H, W, C). The mixes come from the pool's first 4,096
    rows. Clearly mixed rows are preferred: two different classes and a share of x₂ between 20 % and 80 %.
    """
    share = pool.share_b[:_CANDIDATES]
    differ = pool.label_a[:_CANDIDATES] != pool.label_b[:_CANDIDATES]
    chosen = np.argsort(~(differ & (share > 0.2) & (share < 0.8)), kind="stable")[: _TRIPLES * count]
    found = pool.gather(chosen, ("image", "source_a", "source_b"))
    triples = zip(train[found["source_a"]], found["image"], train[found["source_b"]], strict=True)
    return in_rows([image for triple in triples for image in triple], len(GRID_TITLES))


def pool_picture(pool: Pool, train: SplitArrays | None, count: int) -> Image.Image:
    """Return a grid of up to ``count`` rows with a pool's images, each between its source images from ``train``.

    Without ``train``, the grid shows the pool's first images, ordered by their share of x₂. Large images are
    downscaled.
    """
    if train:
        rows = sample_grid(pool, train.images, count)
    else:
        order = np.argsort(pool.share_b[: count * GRID_COLUMNS], kind="stable")
        rows = in_rows(pool.image[: len(order)][order], GRID_COLUMNS)
    side = max(pool.image_shape[:2])
    step, scale = math.ceil(side / _LARGEST), max(1, _SMALLEST // side, min(3, _LARGEST // side))
    small = [[image[::step, ::step] for image in row] for row in rows]
    return image_grid(small, scale=scale, column_titles=GRID_TITLES if train else [])


def in_rows(images: Any, columns: int) -> list[list[NDArray[np.uint8]]]:
    """Split images into rows of ``columns`` images; the last row may be shorter."""
    return [list(images[start : start + columns]) for start in range(0, len(images), columns)]
