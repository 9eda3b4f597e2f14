"""Squeezing and the latent order: where each pixel goes, for each starting corner."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lsmix.glow.latent_order import cell_order, corner_index, join_parts, part_shapes, split_parts
from lsmix.glow.layers import depth_to_space, space_to_depth

SIZES = st.integers(1, 4)


@given(batch=SIZES, channels=SIZES, rows=SIZES, columns=SIZES)
def test_squeezing_matches_tensorflows_space_to_depth(batch, channels, rows, columns):
    x = torch.randn(batch, channels, 2 * rows, 2 * columns, generator=torch.Generator().manual_seed(0))
    y = space_to_depth(x)
    for i in range(2):
        for j in range(2):
            first = (2 * i + j) * channels
            assert torch.equal(y[:, first : first + channels], x[:, :, i::2, j::2])
    assert torch.equal(depth_to_space(y), x)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_parts_have_the_sizes_given_in_the_paper():
    sizes = [c * h * w for c, h, w in part_shapes(64, 64, 3, 4)]
    assert sizes == [6144, 3072, 1536, 768, 768]  # [P A.1]


def test_cells_of_a_4_by_4_grid_are_in_morton_order():
    assert cell_order(4, 4) == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]  # DESIGN, "Latent order"


def test_squeezing_a_grid_down_to_one_cell_produces_morton_order():
    grid = torch.arange(64).reshape(1, 1, 8, 8)
    while grid.shape[2] > 1:
        grid = space_to_depth(grid)
    assert grid.flatten().tolist() == cell_order(8, 8)


@given(height=st.integers(1, 9), width=st.integers(1, 9))
def test_any_grid_uses_the_order_of_its_enclosing_square(height, width):
    order = cell_order(height, width)
    assert sorted(order) == list(range(height * width))
    around = [(cell // 16, cell % 16) for cell in cell_order(16, 16)]
    assert order == [row * width + column for row, column in around if row < height and column < width]


def test_the_example_of_fig_2_takes_five_pixels_of_the_second_image():
    pixels = torch.arange(16.0).reshape(1, 1, 4, 4)
    z = join_parts([pixels])
    taken = split_parts((torch.arange(16) < 5).float()[None], [(1, 4, 4)])[0][0, 0]
    assert z[0, :5].tolist() == [0, 1, 4, 5, 2]
    assert [tuple(cell) for cell in taken.nonzero().tolist()] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_the_first_192_components_belong_to_the_first_cell_only():
    shapes = part_shapes(32, 32, 3, 3)
    parts = split_parts((torch.arange(3072) < 192).float()[None], shapes)
    for part in parts:
        cell = part.shape[2] // 4
        assert part[:, :, :cell, :cell].all()
        assert part.sum() == part[:, :, :cell, :cell].numel()


@settings(deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 5), channels=st.integers(1, 3), levels=st.integers(1, 3))
def test_splitting_inverts_joining(rows, columns, channels, levels):
    shapes = part_shapes(rows << levels, columns << levels, channels, levels)
    rng = np.random.default_rng(0)
    parts = [torch.from_numpy(rng.standard_normal((2, *shape))) for shape in shapes]
    z = join_parts(parts)
    assert z.shape == (2, sum(part[0].numel() for part in parts))
    for part, back in zip(parts, split_parts(z, shapes), strict=True):
        assert torch.equal(part, back)


# The four corners where the order can start.

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)).map(
    lambda s: part_shapes(s[0] << s[3], s[1] << s[3], s[2], s[3])
)
FLAGS = st.booleans()


@given(shapes=SHAPES, bottom=FLAGS, right=FLAGS)
def test_a_corner_index_mirrors_the_order_and_is_its_own_inverse(shapes, bottom, right):
    index = corner_index(shapes, bottom=bottom, right=right)
    assert torch.equal(index.sort().values, torch.arange(len(index)))
    assert torch.equal(index[index], torch.arange(len(index)))
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, *shape, generator=generator) for shape in shapes]
    axes = [axis for axis, mirrored in ((2, bottom), (3, right)) if mirrored]
    expected = join_parts([part.flip(axes) for part in parts])
    assert torch.equal(join_parts(parts)[:, index], expected)


# Grid of a 4×4 image with one level: the cells of the first 4 of 16 components [P Fig. 2, mirrored].
@pytest.mark.parametrize(
    ("bottom", "right", "picture"),
    [
        (False, False, ["##..", "##..", "....", "...."]),
        (False, True, ["..##", "..##", "....", "...."]),
        (True, False, ["....", "....", "##..", "##.."]),
        (True, True, ["....", "....", "..##", "..##"]),
    ],
)
def test_the_first_quarter_of_components_lies_in_the_corner(bottom, right, picture):
    shapes = [(1, 4, 4)]
    index = corner_index(shapes, bottom=bottom, right=right)
    inverse_of_order = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15])  # Morton, by cell
    cells = inverse_of_order[index[:4]].tolist()
    drawn = ["".join("#" if 4 * row + column in cells else "." for column in range(4)) for row in range(4)]
    assert drawn == picture
