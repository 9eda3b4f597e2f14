"""Mixing in latent space: what is taken from whom, and what counts as a failed decode."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lsmix.data.errors import RecipeError
from lsmix.glow.latent_mixing import is_failed_decode, mix_latents, zero_fill

LAMBDAS = st.floats(0.0, 1.0)


@given(lam=st.lists(LAMBDAS, min_size=1, max_size=5), dim=st.integers(1, 70))
def test_ls_mix_takes_the_first_components_from_the_second_vector(lam, dim):
    first, second = np.zeros((len(lam), dim), np.float32), np.ones((len(lam), dim), np.float32)
    z, share = mix_latents("ls-mix", first, second, np.array(lam))
    for row, value, part in zip(z, lam, share, strict=True):
        taken = int(np.floor(np.float64(value) * dim))
        assert row.tolist() == [1.0] * taken + [0.0] * (dim - taken)
        assert part == np.float32(taken / dim)
    assert share.dtype == np.float32
    assert z.dtype == np.float32


def test_read_only_rows_of_a_store_can_be_mixed():
    first, second = np.zeros((1, 4)), np.ones((1, 4))
    first.flags.writeable = second.flags.writeable = False
    z, _ = mix_latents("ls-mix", first, second, 0.5)
    assert z.tolist() == [[1.0, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize("lam", [-0.1, 1.1, np.nan, np.array([0.5, 2.0])])
def test_lambda_outside_zero_to_one_is_refused(lam):
    with pytest.raises(RecipeError, match="λ must lie within"):
        mix_latents("ls-mix", np.zeros((2, 4)), np.zeros((2, 4)), lam)


def test_wrong_shapes_are_refused():
    with pytest.raises(RecipeError, match=r"expected two arrays \(N, D\)"):
        mix_latents("ls-mix", np.zeros((2, 4)), np.zeros((2, 5)), 0.5)
    with pytest.raises(RecipeError, match=r"one per pair, \(2,\)"):
        mix_latents("ls-mix", np.zeros((2, 4)), np.zeros((2, 4)), np.zeros(3))


def test_an_unknown_method_is_refused_with_the_nearest_name():
    with pytest.raises(RecipeError, match=r"unknown mixing method in latent space 'lsmix'\. Did you mean 'ls-mix'"):
        mix_latents("lsmix", np.zeros((2, 4)), np.zeros((2, 4)), 0.5)


def test_zero_fill_clears_the_last_components_of_a_copy():
    z = np.ones((2, 6))
    assert zero_fill(z, 2).tolist() == [[1, 1, 1, 1, 0, 0]] * 2
    assert torch.equal(zero_fill(torch.ones(2, 6), 0), torch.ones(2, 6))
    assert z.all()
    with pytest.raises(RecipeError, match="cannot set the last 7 of 6"):
        zero_fill(z, 7)


def test_a_decode_fails_by_one_odd_number_or_by_many_pixels_far_outside():
    y = torch.zeros(6, 3, 10, 10)
    y[1, 2, 3, 4] = torch.nan
    y[2, 0, 0, 0] = torch.inf
    y[3, 0, 0, 0] = y[3, 1, 0, 1] = 0.7  # 2 of 100 pixels: not more than 2%
    y[4, :, 0, :3] = -0.7  # 3 of 100
    y[5] = 0.55  # all of them, within the tolerance
    assert is_failed_decode(y, tolerance=0.1, bad_pixel_fraction=0.02).tolist() == [
        False,
        True,
        True,
        False,
        True,
        False,
    ]
