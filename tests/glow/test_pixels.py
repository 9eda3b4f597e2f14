"""Conversion between pixels and the flow's values, for every byte and bit depth."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lsmix.data.errors import RecipeError
from lsmix.glow.pixels import dequantise, draw_noise, output_bits, pad_images, padding, quantise

BYTES = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)


def test_low_bits_restore_every_byte():
    assert torch.equal(quantise(dequantise(BYTES, "low-bits"), 8), BYTES)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("mode", ["low-bits", "center", "uniform"])
def test_all_modes_stay_in_the_pixels_cell(bits, mode):
    for noise in (0, 1, (1 << 14) - 1):  # including both ends, where rounding could leave the cell
        noise_BHWC = torch.full(BYTES.shape, noise, dtype=torch.int16)
        y = dequantise(BYTES, mode, bits=bits, noise_BHWC=noise_BHWC)
        assert y.dtype == torch.float32
        assert y.abs().max() < 0.5
        assert torch.equal(quantise(y, bits), BYTES >> (8 - bits) << (8 - bits))


def test_noise_covers_its_range():
    noise = draw_noise(np.random.default_rng(0), (100_000,))
    assert noise.dtype == np.int16
    assert noise.min() >= 0
    assert noise.max() < 1 << 14
    # Standard error of the mean: 2^14 / sqrt(12 · 100,000) = 15.
    assert abs(noise.mean() - (1 << 13)) < 75


def test_quantising_clips_and_accepts_infinity_and_nan():
    y = torch.tensor([-torch.inf, -3.0, 3.0, torch.inf, torch.nan, 0.0]).reshape(1, 1, 1, 6)
    assert quantise(y, 8).flatten().tolist() == [0, 0, 255, 255, 0, 128]
    assert quantise(y, 5).flatten().tolist() == [0, 0, 248, 248, 0, 128]


def test_output_names_give_the_number_of_bits():
    assert [output_bits("8bit"), output_bits("5bit")] == [8, 5]
    with pytest.raises(RecipeError, match="unknown output '9bit'"):
        output_bits("9bit")


def test_uniform_without_noise_and_unknown_modes_are_rejected():
    with pytest.raises(RecipeError, match="needs noise_BHWC"):
        dequantise(BYTES, "uniform")
    with pytest.raises(RecipeError, match="unknown dequantise mode 'dither'"):
        dequantise(BYTES, "dither")


@given(height=st.integers(1, 40), width=st.integers(1, 40), levels=st.integers(1, 5))
def test_padding_reflects_up_to_the_next_multiple(height, width, levels):
    top, bottom, left, right = padding(height, width, levels)
    step = 1 << levels
    assert (height + top + bottom) % step == (width + left + right) % step == 0
    assert max(top + bottom, left + right) < step
    images = np.arange(height * width).reshape(1, height, width, 1)
    padded = pad_images(images, (top, bottom, left, right))
    assert np.array_equal(padded[:, top : top + height, left : left + width], images)
    if height > 1 and width > 1:
        expected = np.pad(images, ((0, 0), (top, bottom), (left, right), (0, 0)), mode="reflect")
        assert np.array_equal(padded, expected)


def test_refusing_to_pad_names_the_required_multiple():
    with pytest.raises(RecipeError, match=r"images of 30×32 cannot be halved 3 times: .* multiples of 8"):
        padding(30, 32, 3, "refuse")
    assert padding(32, 64, 3, "refuse") == (0, 0, 0, 0)
