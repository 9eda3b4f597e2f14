"""Augmentation shifts images by whole pixels, pads with zeros, and draws from its generator only."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lsmix.classifiers.training import augment


def shifted_reference(image, down, right, mirrored):
    """Flip, then shift one image (C, H, W) pixel by pixel."""
    _, height, width = image.shape
    image = image[:, :, ::-1] if mirrored else image
    out = np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            if 0 <= row - down < height and 0 <= column - right < width:
                out[:, row, column] = image[:, row - down, column - right]
    return out


@given(
    count=st.integers(1, 5),
    channels=st.sampled_from([1, 3]),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    translate=st.integers(0, 7),
    flip=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_image_is_a_possible_shift_of_the_original(count, channels, height, width, translate, flip, seed):
    rng = np.random.default_rng(seed)
    images = rng.integers(1, 256, (count, channels, height, width), dtype=np.uint8)
    moved = augment(torch.from_numpy(images), translate=translate, flip=flip, generator=rng)
    assert moved.shape == images.shape
    assert moved.dtype == torch.uint8
    reach = range(-translate, translate + 1)
    for before, after in zip(images, moved.numpy(), strict=True):
        choices = ((down, right, m) for down in reach for right in reach for m in {False, flip})
        assert any(np.array_equal(after, shifted_reference(before, *choice)) for choice in choices)


def test_the_generators_draws_determine_the_shifts():
    images = np.arange(1, 4 * 3 * 25 + 1, dtype=np.float32).reshape(4, 3, 5, 5)
    draws = np.random.default_rng(3)
    down, right = draws.integers(-2, 2, 4, endpoint=True), draws.integers(-2, 2, 4, endpoint=True)
    mirrored = draws.integers(0, 1, 4, endpoint=True).astype(bool)
    moved = augment(torch.from_numpy(images), translate=2, flip=True, generator=np.random.default_rng(3))
    for index in range(4):
        # augment flips after the shift, so the reference shifts mirrored images in the other direction.
        right_by_hand = -right[index] if mirrored[index] else right[index]
        expected = shifted_reference(images[index], down[index], right_by_hand, mirrored[index])
        np.testing.assert_array_equal(moved[index].numpy(), expected)


def test_all_shifts_are_about_equally_frequent():
    spot = torch.zeros(5000, 1, 5, 5, dtype=torch.uint8)
    spot[:, :, 2, 2] = 1
    moved = augment(spot, translate=2, flip=False, generator=np.random.default_rng(0))
    counts = moved.sum(dim=0).squeeze().numpy()
    assert counts.sum() == 5000
    # 25 shifts, each expected 200 times: 70 is five standard deviations.
    assert np.abs(counts.astype(int) - 200).max() < 70


def test_about_half_of_the_images_are_flipped():
    images = torch.zeros(4000, 1, 1, 2, dtype=torch.uint8)
    images[..., 0] = 1
    flipped = augment(images, translate=0, flip=True, generator=np.random.default_rng(0))[..., 1].sum()
    assert 1840 < int(flipped) < 2160  # five standard deviations


@pytest.mark.parametrize("translate", [0, 2])
def test_the_input_is_not_modified_and_disabling_flips_keeps_the_shifts(translate):
    images = torch.arange(8 * 3 * 36, dtype=torch.float32).reshape(8, 3, 6, 6)
    before = images.clone()
    with_flips = augment(images, translate=translate, flip=True, generator=np.random.default_rng(1))
    without = augment(images, translate=translate, flip=False, generator=np.random.default_rng(1))
    assert torch.equal(images, before)
    same = [torch.equal(a, b) for a, b in zip(with_flips, without, strict=True)]
    assert any(same)
    assert not all(same)


def test_the_global_random_state_does_not_change():
    torch_state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002  # the state that must not change
    augment(torch.zeros(2, 3, 4, 4), translate=1, flip=True, generator=np.random.default_rng(0))
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002  # as above
