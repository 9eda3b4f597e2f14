"""The five latent mixing methods: components from each source, shares, and the check for failed decodes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lsmix.data.errors import RecipeError
from lsmix.data.mixing import LATENT_METHODS, row_rngs
from lsmix.glow.latent_mixing import is_failed_decode, mix_latents, zero_fill

METHODS = LATENT_METHODS.names()
REPLACING = [name for name in METHODS if name != "linear"]  # each component comes from one of the two vectors
RATES = st.floats(0.0, 1.0)

# Two vectors of 16 components, of which n = ⌊5/16 · 16⌋ = 5 come from the second [P Fig. 2, Fig. 6].
Z1 = np.arange(16.0)[None]  # 0 … 15
Z2 = 100 + Z1  # 100 … 115
BY_HAND = {
    "ls-mix": [100, 101, 102, 103, 104, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
    "swap-mix": [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 100, 101, 102, 103, 104],
    "reverse-mix": [100, 101, 102, 103, 104, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0],
    "linear": [value + 100 * 5 / 16 for value in range(16)],
}


@pytest.mark.parametrize("method", BY_HAND)
def test_methods_match_results_computed_by_hand(method):
    z, share = mix_latents(method, Z1, Z2, 5 / 16)
    assert z[0].tolist() == BY_HAND[method]
    assert share.tolist() == [5 / 16]


@pytest.mark.parametrize("method", METHODS)
def test_lambda_zero_returns_the_first_vector_and_one_the_second(method):
    first, second = np.random.default_rng(0).standard_normal((2, 3, 12))
    none, share = mix_latents(method, first, second, 0.0)
    np.testing.assert_array_equal(none, first[:, ::-1] if method == "reverse-mix" else first)
    assert share.tolist() == [0.0] * 3
    everything, share = mix_latents(method, first, second, 1.0)
    np.testing.assert_array_equal(everything, second)
    assert share.tolist() == [1.0] * 3


@pytest.mark.parametrize("method", REPLACING)
@given(lam=st.lists(RATES, min_size=1, max_size=5), dim=st.integers(1, 70), seed=st.integers(0, 9))
def test_the_share_is_the_fraction_from_the_second_vector(method, lam, dim, seed):
    first, second = np.zeros((len(lam), dim)), np.ones((len(lam), dim))
    z, share = mix_latents(method, first, second, np.array(lam), seed=seed)
    np.testing.assert_allclose(z.mean(axis=1), share, atol=1e-6)  # the mean of 0 and 1 is the fraction of ones
    if method != "bern-mix":
        np.testing.assert_array_equal(share, (np.floor(np.array(lam) * dim) / dim).astype(np.float32))


@pytest.mark.parametrize("method", ["ls-mix", "bern-mix", "swap-mix"])
@given(lam=RATES, seed=st.integers(0, 9))
def test_every_component_index_is_used_exactly_once(method, lam, seed):
    z, share = mix_latents(method, Z1, Z2, lam, seed=seed)
    taken = z[0] >= 100
    assert sorted(z[0] - 100 * taken) == list(range(16))
    assert taken.mean() == pytest.approx(share[0])


@pytest.mark.parametrize("method", ["linear", "bern-mix"])
def test_unordered_methods_treat_all_components_alike(method):
    turned = np.random.default_rng(0).permutation(12)
    first, second = np.random.default_rng(1).standard_normal((2, 4, 12))
    if method == "linear":
        straight, _ = mix_latents(method, first, second, 0.3)
        other, _ = mix_latents(method, first[:, turned], second[:, turned], 0.3)
        np.testing.assert_allclose(other, straight[:, turned])
    else:  # over many draws all components are taken equally often: 4 standard errors of 4,000 draws are 0.029
        z, share = mix_latents(method, np.zeros((4000, 12)), np.ones((4000, 12)), 0.3)
        assert np.abs(z.mean(axis=0) - 0.3).max() < 0.032
        assert abs(share.mean() - 0.3) < 0.01


@given(lam=RATES)
def test_linear_is_symmetric_in_the_pair(lam):
    first, second = np.random.default_rng(0).standard_normal((2, 2, 8))
    z, share = mix_latents("linear", first, second, lam)
    back, other = mix_latents("linear", second, first, 1.0 - lam)
    np.testing.assert_allclose(z, back, atol=1e-12)
    np.testing.assert_allclose(share, 1 - other, atol=1e-6)


@given(count=st.integers(0, 16))
def test_swap_mix_is_rolled_ls_mix(count):
    ls, _ = mix_latents("ls-mix", Z1, Z2, count / 16)
    swap, _ = mix_latents("swap-mix", Z1, Z2, count / 16)
    np.testing.assert_array_equal(np.roll(ls[0], -count), swap[0])


@pytest.mark.parametrize("method", ["ls-mix", "bern-mix", "linear"])
@given(lam=RATES)
def test_mixing_a_vector_with_itself_returns_it(method, lam):
    z, _ = mix_latents(method, Z1, Z1, lam)
    np.testing.assert_allclose(z, Z1, rtol=1e-12)


@given(cut=st.integers(0, 6), lam=RATES)
def test_results_do_not_depend_on_how_rows_are_split(cut, lam):
    first, second = np.random.default_rng(0).standard_normal((2, 6, 10))
    draws = row_rngs(3, "test")
    complete, share = mix_latents("bern-mix", first, second, lam, draws=draws)
    parts = [slice(0, cut), slice(cut, 6)]
    got = [mix_latents("bern-mix", first[p], second[p], lam, draws=lambda i, p=p: draws(p.start + i)) for p in parts]
    np.testing.assert_array_equal(np.concatenate([z for z, _ in got]), complete)
    np.testing.assert_array_equal(np.concatenate([s for _, s in got]), share)


@pytest.mark.parametrize("method", METHODS)
def test_torch_and_numpy_give_the_same_mixes(method):
    first, second = np.random.default_rng(0).standard_normal((2, 3, 12)).astype(np.float32)
    z, share = mix_latents(method, first, second, 0.4, seed=1)
    z_torch, share_torch = mix_latents(method, torch.from_numpy(first), torch.from_numpy(second), 0.4, seed=1)
    np.testing.assert_array_equal(z, z_torch.numpy())
    np.testing.assert_array_equal(share, share_torch.numpy())
    assert z.dtype == np.float32


@given(lam=st.lists(RATES, min_size=1, max_size=5), dim=st.integers(1, 70))
def test_ls_mix_takes_the_first_components_from_the_second_vector(lam, dim):
    first, second = np.zeros((len(lam), dim), np.float32), np.ones((len(lam), dim), np.float32)
    z, share = mix_latents("ls-mix", first, second, np.array(lam))
    for row, value, part in zip(z, lam, share, strict=True):
        taken = int(np.floor(np.float64(value) * dim))
        assert row.tolist() == [1.0] * taken + [0.0] * (dim - taken)
        assert part == np.float32(taken / dim)
    assert share.dtype == np.float32
    assert z.dtype == np.float32


def test_read_only_arrays_can_be_mixed():
    first, second = np.zeros((1, 4)), np.ones((1, 4))
    first.flags.writeable = second.flags.writeable = False
    z, _ = mix_latents("ls-mix", first, second, 0.5)
    assert z.tolist() == [[1.0, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize("lam", [-0.1, 1.1, np.nan, np.array([0.5, 2.0])])
def test_lambda_outside_zero_to_one_is_rejected(lam):
    with pytest.raises(RecipeError, match="λ must be within"):
        mix_latents("ls-mix", np.zeros((2, 4)), np.zeros((2, 4)), lam)


def test_wrong_shapes_are_rejected():
    with pytest.raises(RecipeError, match=r"expected two arrays \(N, D\)"):
        mix_latents("ls-mix", np.zeros((2, 4)), np.zeros((2, 5)), 0.5)
    with pytest.raises(RecipeError, match=r"one per pair, \(2,\)"):
        mix_latents("ls-mix", np.zeros((2, 4)), np.zeros((2, 4)), np.zeros(3))


def test_an_unknown_method_is_rejected_with_a_suggestion():
    with pytest.raises(RecipeError, match=r"unknown mixing method in latent space 'lsmix'\. Did you mean 'ls-mix'"):
        mix_latents("lsmix", np.zeros((2, 4)), np.zeros((2, 4)), 0.5)


def test_zero_fill_sets_the_last_components_of_a_copy_to_zero():
    z = np.ones((2, 6))
    assert zero_fill(z, 2).tolist() == [[1, 1, 1, 1, 0, 0]] * 2
    assert torch.equal(zero_fill(torch.ones(2, 6), 0), torch.ones(2, 6))
    assert z.all()
    with pytest.raises(RecipeError, match="cannot set the last 7 of 6"):
        zero_fill(z, 7)


def test_a_decode_fails_if_a_value_is_not_finite_or_many_pixels_are_far_outside():
    y = torch.zeros(6, 3, 10, 10)
    y[1, 2, 3, 4] = torch.nan
    y[2, 0, 0, 0] = torch.inf
    y[3, 0, 0, 0] = y[3, 1, 0, 1] = 0.7  # 2 of 100 pixels: not more than 2%
    y[4, :, 0, :3] = -0.7  # 3 of 100
    y[5] = 0.55  # all pixels, within the tolerance
    assert is_failed_decode(y, tolerance=0.1, bad_pixel_fraction=0.02).tolist() == [
        False,
        True,
        True,
        False,
        True,
        False,
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_gpu_and_cpu_give_the_same_mixes(method):
    first, second = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(0))
    lam = torch.linspace(0, 1, 5)
    z, share = mix_latents(method, first, second, lam)
    z_gpu, share_gpu = mix_latents(method, first.cuda(), second.cuda(), lam)
    torch.testing.assert_close(z_gpu.cpu(), z, rtol=1e-6, atol=1e-6)  # linear may use a fused multiply-add
    assert torch.equal(share_gpu.cpu(), share)
