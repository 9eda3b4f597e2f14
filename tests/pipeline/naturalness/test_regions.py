"""Regions of the second image consist of complete cells in latent order and match the first latent components."""

import itertools

import numpy as np
import pytest
import torch

from lsmix.glow.config import FlowConfig
from lsmix.glow.latent_order import join_parts
from lsmix.glow.layers import space_to_depth
from lsmix.pipeline.naturalness.regions import hard_cut, second_region, trailing_region

CIFAR = FlowConfig(height=32, width=32, channels=3, levels=3, steps=1, hidden=4)
DIM, CELL = 3072, 192


def drawn(region):
    """Check that cells are complete; return the rows of the 4×4 grid, with # for cells of the second image."""
    cells = region.reshape(4, 8, 4, 8).transpose(0, 2, 1, 3).reshape(4, 4, 64)
    assert (cells.all(axis=2) == cells.any(axis=2)).all()
    return ["".join("#" if cell else "." for cell in row) for row in cells.all(axis=2)]


def test_five_sixteenths_take_the_documented_cells():
    assert drawn(second_region(5 * CELL, CIFAR)) == ["###.", "##..", "....", "...."]


def test_half_takes_the_upper_half():
    assert drawn(second_region(DIM // 2, CIFAR)) == ["####", "####", "....", "...."]


def test_the_last_cell_counts_if_more_than_half_of_its_components_were_taken():
    assert drawn(second_region(CELL + CELL // 2, CIFAR))[0] == "#..."
    assert drawn(second_region(CELL + CELL // 2 + 1, CIFAR))[0] == "##.."


def test_regions_grow_from_empty_to_the_complete_image():
    regions = [second_region(taken, CIFAR) for taken in range(0, DIM + 1, 64)]
    assert not regions[0].any()
    assert regions[-1].all()
    for smaller, larger in itertools.pairwise(regions):
        assert (smaller <= larger).all()


def test_the_padding_of_an_image_is_cropped_from_its_region():
    config = FlowConfig(height=6, width=4, channels=1, levels=2, steps=1, hidden=4)  # padded to 8×4, 1 above, 1 below
    assert second_region(16, config).astype(int).tolist() == [[1] * 4] * 3 + [[0] * 4] * 3


def test_more_components_than_exist_are_rejected():
    with pytest.raises(ValueError, match="taken must be 0 to 3072, got 3073"):
        second_region(DIM + 1, CIFAR)


def test_a_region_contains_the_pixels_of_the_first_components():
    # Squeezing only moves values, so an image of zeros and ones can be traced into the latent.
    for cells in range(17):
        region = torch.from_numpy(second_region(cells * CELL, CIFAR).astype(np.float32))
        h = region.expand(1, 3, 32, 32)
        parts = []
        for _ in range(3):
            part, h = space_to_depth(h).chunk(2, dim=1)
            parts.append(part)
        z = join_parts([*parts, h])[0]
        assert z[: cells * CELL].all()
        assert not z[cells * CELL :].any()


def test_a_hard_cut_takes_the_region_from_the_second_image():
    x1, x2 = np.random.default_rng(0).integers(0, 256, (2, 5, 32, 32, 3), dtype=np.uint8)
    region = second_region(5 * CELL, CIFAR)
    cut = hard_cut(x1, x2, region)
    np.testing.assert_array_equal(cut[:, region], x2[:, region])
    np.testing.assert_array_equal(cut[:, ~region], x1[:, ~region])
    np.testing.assert_array_equal(hard_cut(x1, x2, np.broadcast_to(region, (5, 32, 32))), cut)


def test_the_region_of_the_last_components_complements_that_of_the_first():
    assert drawn(trailing_region(5 * CELL, CIFAR)) == ["....", "....", "..##", ".###"]
    for taken in (0, 1, CELL, DIM // 3, DIM):
        np.testing.assert_array_equal(trailing_region(taken, CIFAR), ~second_region(DIM - taken, CIFAR))
