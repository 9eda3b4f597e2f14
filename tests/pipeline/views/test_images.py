"""Image grids contain the exact pixels of every image, enlarged, in the right cell, on a transparent background."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lsmix.pipeline.views.images import image_grid, in_rows, page_grid, png_bytes


def random_image(seed, height=4, width=5, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


@given(
    lengths=st.lists(st.integers(0, 3), min_size=1, max_size=3).filter(any),
    channels=st.sampled_from([1, 3]),
    scale=st.integers(1, 3),
    gap=st.integers(0, 5),
    titled=st.booleans(),
)
def test_every_image_can_be_read_back_from_its_cell(lengths, channels, scale, gap, titled):
    rows = [[random_image(10 * r + c, channels=channels) for c in range(n)] for r, n in enumerate(lengths)]
    titles = {"column_titles": ["λ"] * 3, "row_titles": ["first"]} if titled else {}
    pixels = np.asarray(image_grid(rows, scale=scale, gap=gap, **titles))
    columns = max(lengths)
    left = pixels.shape[1] - (columns * 5 * scale + (columns - 1) * gap)
    top = pixels.shape[0] - (len(rows) * 4 * scale + (len(rows) - 1) * gap)
    assert (left > 0) == (top > 0) == titled
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            y, x = top + r * (4 * scale + gap), left + c * (5 * scale + gap)
            place = pixels[y : y + 4 * scale : scale, x : x + 5 * scale : scale]
            assert np.array_equal(place[..., :3], np.broadcast_to(image, (4, 5, 3)))
            assert (place[..., 3] == 255).all()


def test_empty_cells_and_gaps_are_transparent():
    pixels = np.asarray(image_grid([[random_image(0), None], [None, random_image(1)]], scale=1, gap=2))
    assert pixels.shape == (4 + 2 + 4, 5 + 2 + 5, 4)
    assert (pixels[:4, 5:, 3] == 0).all()
    assert (pixels[4:6, :, 3] == 0).all()


def test_smaller_images_are_centred():
    small = np.full((2, 1), 9, np.uint8)
    pixels = np.asarray(image_grid([[random_image(0), small]], scale=1, gap=0))
    opaque = np.argwhere(pixels[:, 5:, 3] == 255)
    assert opaque.tolist() == [[1, 2], [2, 2]]


def test_titles_are_drawn_and_long_titles_do_not_overlap_the_next_column():
    rows = [[random_image(0)] * 2]
    plain = image_grid(rows, scale=8, column_titles=["x₁", "x₂"])
    assert np.asarray(plain)[:10, :, 3].any()
    long = image_grid(rows, scale=8, column_titles=["a very long title indeed", ""])
    assert long.size == plain.size
    right = np.asarray(long)[: long.height - 32, 48:, 3]
    assert not right.any()


def test_images_fill_a_grid_row_by_row():
    images = np.stack([random_image(seed) for seed in range(5)])
    picture = image_grid(in_rows(images, 3), scale=1, gap=1)
    assert picture.size == (3 * 5 + 2, 2 * 4 + 1)
    assert np.array_equal(np.asarray(picture)[5:, 6:11, :3], images[4])


@pytest.mark.parametrize(("side", "pixels"), [(8, 24), (32, 6), (300, 2)])
def test_a_grid_for_a_page_enlarges_pixels_by_an_integer_factor_to_the_page_width(side, pixels):
    image = random_image(0, side, side)
    with Image.open(io.BytesIO(page_grid([[image] * 9], ["x₁", "mix", "x₂"] * 3))) as picture:
        assert picture.width == 9 * side * pixels + 8 * 8
        shown = np.asarray(picture)[-side * pixels :: pixels, : side * pixels : pixels, :3]
    assert np.array_equal(shown, image)


def test_png_bytes_are_deterministic_and_lossless():
    picture = image_grid([[random_image(0)]], column_titles=["λ = 4/16"])
    first, second = png_bytes(picture), png_bytes(picture.copy())
    assert first == second
    with Image.open(io.BytesIO(first)) as image:
        assert np.array_equal(np.asarray(image), np.asarray(picture))
        assert not image.info


@pytest.mark.parametrize(
    "wrong", [np.zeros((4, 4, 3)), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4, 3), np.uint8), np.zeros(4, np.uint8)]
)
def test_an_array_that_is_not_an_image_is_rejected(wrong):
    with pytest.raises(ValueError, match=r"Expected a uint8 image of shape \(H, W\)"):
        image_grid([[wrong]])


def test_a_grid_without_images_is_rejected():
    with pytest.raises(ValueError, match="at least one image, got 1 rows"):
        image_grid([[None]])
