"""Latents that begin at another corner: LS-Mix there is LS-Mix of the mirrored image."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lsmix.glow.latent_order import corner_index, join_parts, part_shapes

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)).map(
    lambda s: part_shapes(s[0] << s[3], s[1] << s[3], s[2], s[3])
)
FLAGS = st.booleans()


@given(shapes=SHAPES, bottom=FLAGS, right=FLAGS)
def test_a_corner_is_a_mirrored_order_and_its_own_inverse(shapes, bottom, right):
    index = corner_index(shapes, bottom=bottom, right=right)
    assert torch.equal(index.sort().values, torch.arange(len(index)))
    assert torch.equal(index[index], torch.arange(len(index)))
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, *shape, generator=generator) for shape in shapes]
    axes = [axis for axis, mirrored in ((2, bottom), (3, right)) if mirrored]
    expected = join_parts([part.flip(axes) for part in parts])
    assert torch.equal(join_parts(parts)[:, index], expected)


# The grid of a 4×4 image of one level: which cells the first 5 of 16 components belong to [P Fig. 2, mirrored].
@pytest.mark.parametrize(
    ("bottom", "right", "picture"),
    [
        (False, False, ["##..", "##..", "....", "...."]),
        (False, True, ["..##", "..##", "....", "...."]),
        (True, False, ["....", "....", "##..", "##.."]),
        (True, True, ["....", "....", "..##", "..##"]),
    ],
)
def test_the_first_quarter_is_in_the_corner(bottom, right, picture):
    shapes = [(1, 4, 4)]
    index = corner_index(shapes, bottom=bottom, right=right)
    inverse_of_order = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15])  # Morton, by cell
    cells = inverse_of_order[index[:4]].tolist()
    drawn = ["".join("#" if 4 * row + column in cells else "." for column in range(4)) for row in range(4)]
    assert drawn == picture
