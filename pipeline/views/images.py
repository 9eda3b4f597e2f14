"""Image grids as PNG, and the rows of a pool as grids."""

import io
from collections.abc import Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Protocol

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from lsmix.data.pool import Pool

__all__ = ["SHEET_TITLES", "SourceImages", "png_bytes", "pool_rows", "sheet", "thumbnails"]

_INK = (128, 136, 148, 255)  # contrast of at least 3.5 on white and on near-black


def sheet(
    rows: Sequence[Sequence[np.ndarray | None]],
    *,
    scale: int = 3,
    gap: int = 4,
    column_titles: Sequence[str] = (),
    row_titles: Sequence[str] = (),
    text_size: int = 13,
) -> Image.Image:
    """Return the images in rows as one RGBA picture.

    An image is uint8 (H, W, C) or (H, W) with C 1 (grey) or 3 (RGB); None leaves its place empty. Every pixel becomes
    ``scale`` × ``scale`` ones, places are ``gap`` apart and as large as the largest image. Titles may be fewer than places.

    Raises:
        ValueError: there is no image at all, or one is of another shape or type.

    Example:
        >>> import numpy as np
        >>> black = np.zeros((8, 8, 1), np.uint8)
        >>> sheet([[black, black], [black]], scale=2, gap=4).size
        (36, 36)
    """
    pictures = [[None if image is None else _picture(image, scale) for image in row] for row in rows]
    present = [picture for row in pictures for picture in row if picture is not None]
    if not present:
        raise ValueError(f"a sheet needs at least one image; got {len(rows)} rows without any.")
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


def thumbnails(images: Sequence[np.ndarray] | np.ndarray, *, columns: int, scale: int = 2, gap: int = 3) -> Image.Image:
    """Return images, uint8 (N, H, W, C), row by row in a grid of ``columns`` columns without titles.

    Raises:
        ValueError: there is no image, or one is of another shape or type.
    """
    rows = [list(images[start : start + columns]) for start in range(0, len(images), columns)]
    return sheet(rows, scale=scale, gap=gap)


def png_bytes(image: Image.Image) -> bytes:
    """Return the image as PNG, without any metadata: the same image gives the same bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _picture(image: np.ndarray, scale: int) -> Image.Image:
    pixels = image[..., None] if image.ndim == 2 else image
    if image.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or 0 in pixels.shape:
        raise ValueError(
            f"a sheet shows uint8 images of shape (H, W), (H, W, 1) or (H, W, 3); got {image.dtype} {image.shape}."
        )
    rgb = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    return Image.fromarray(rgb.repeat(scale, axis=0).repeat(scale, axis=1))


def _fitted(title: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Return the title, cut with an ellipsis where it would run into its neighbour's."""
    if font.getlength(title) <= width:
        return title
    while title and font.getlength(f"{title}…") > width:
        title = title[:-1].rstrip()
    return f"{title}…"


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # Pillow's own font has no λ; matplotlib, which we need anyway, always brings this one.
    return ImageFont.truetype(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


_TRIPLES = 3  # of x₁, mix, x₂ in a row
_LOOKED_AT = 4096  # rows of a pool that are chosen from
SHEET_TITLES = ["x₁", "mix", "x₂"] * _TRIPLES


class SourceImages(Protocol):
    """Images of a train split by row, such as an array of them, uint8 (N, H, W, C)."""

    def __getitem__(self, rows: NDArray[np.int64], /) -> NDArray[np.uint8]:
        """Return images, uint8 (n, H, W, C)."""
        ...


def pool_rows(pool: Pool, train: SourceImages, count: int) -> list[list[NDArray[np.uint8]]]:
    """Return up to ``count`` rows of a sheet: three mixes each, between their first two sources.

    ``train`` holds the images of the train split, uint8 (N, H, W, C). Those come first whose two classes differ and that
    have much of both sources.
    """
    share = pool.share_b[:_LOOKED_AT]
    differ = pool.label_a[:_LOOKED_AT] != pool.label_b[:_LOOKED_AT]
    wanted = np.argsort(~(differ & (share > 0.2) & (share < 0.8)), kind="stable")[: _TRIPLES * count]
    sources = train[
        np.concatenate([pool.source_a[wanted], pool.source_b[wanted]])
    ]  # at once: they may have to be decoded
    cells = [*zip(sources[: len(wanted)], pool.image[wanted], sources[len(wanted) :], strict=True)]
    return [[*chain.from_iterable(cells[start : start + _TRIPLES])] for start in range(0, len(cells), _TRIPLES)]
