"""Mixing in pixel space: pixels from each source, shares, and draws per row."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lsmix.classifiers.pixel_mixing import mix_images, mix_pixels
from lsmix.data.errors import RecipeError
from lsmix.data.mixing import PIXEL_METHODS, row_rngs

METHODS = PIXEL_METHODS.names()
IN_PLACE = ["cutmix", "fmix"]  # each pixel comes from the same position of x₁ or x₂
FROM_EITHER = [*IN_PLACE, "resizemix"]  # each pixel comes from x₁ or x₂
RETURNS_THE_SECOND = ["mixup", "resizemix", "fmix"]  # at λ = 1
LAMBDAS = st.floats(0.0, 1.0)
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 13), st.integers(1, 13), st.sampled_from([1, 3]))
SEEDS = st.integers(0, 999)

every_method = pytest.mark.parametrize("method", METHODS)


def pairs(shape, seed=0):
    """Return two batches of random images; all pixels of the first are even, all pixels of the second odd."""
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, 128, (2, *shape), dtype=np.uint8) * 2
    return first, second + 1


def constant(shape, first, second):
    return np.full(shape, first, np.uint8), np.full(shape, second, np.uint8)


# Laws for all methods.


@every_method
@given(shape=SHAPES, seed=SEEDS)
def test_lambda_zero_returns_the_first_image_and_share_zero(method, shape, seed):
    first, second = pairs(shape, seed)
    mixed, share = mix_images(method, first, second, 0.0, seed=seed)
    np.testing.assert_array_equal(mixed, first)
    assert share.tolist() == [0.0] * len(first)


@pytest.mark.parametrize("method", RETURNS_THE_SECOND)
@given(shape=SHAPES, seed=SEEDS)
def test_lambda_one_returns_the_second_image(method, shape, seed):
    first, second = pairs(shape, seed)
    mixed, share = mix_images(method, first, second, 1.0, seed=seed)
    np.testing.assert_array_equal(mixed, second)
    assert share.tolist() == [1.0] * len(first)


@every_method
@given(lam=LAMBDAS, shape=SHAPES, seed=SEEDS)
def test_the_share_is_the_fraction_from_the_second_image(method, lam, shape, seed):
    mixed, share = mix_images(method, *constant(shape, 0, 255), lam, seed=seed)
    assert (mixed.dtype, mixed.shape, share.dtype, share.shape) == (np.uint8, shape, np.float32, shape[:1])
    for image, part in zip(mixed, share, strict=True):
        if method in FROM_EITHER:
            assert set(np.unique(image)) <= {0, 255}
            assert part == np.float32((image[..., 0] == 255).sum() / image[..., 0].size)
        else:
            # Half a level of rounding, plus rounding the share to float32.
            assert np.abs(image / 255 - part).max() <= 0.5 / 255 + 1e-7


@every_method
@given(lam=st.lists(LAMBDAS, min_size=2, max_size=5), cut=st.integers(1, 4), seed=SEEDS)
def test_results_do_not_depend_on_how_rows_are_split(method, lam, cut, seed):
    first, second = pairs((len(lam), 9, 7, 3), seed)
    whole, share = mix_images(method, first, second, np.array(lam), seed=seed)
    for rows in (slice(0, cut), slice(cut, len(lam))):
        start, draws = rows.start, row_rngs(seed, "mix", "method")
        part, own = mix_images(
            method,
            first[rows],
            second[rows],
            np.array(lam[rows]),
            draws=lambda row, start=start, draws=draws: draws(start + row),
        )
        np.testing.assert_array_equal(part, whole[rows])
        np.testing.assert_array_equal(own, share[rows])


@every_method
@given(lam=LAMBDAS, shape=SHAPES, seed=SEEDS)
def test_swapping_the_pair_takes_the_other_pixels(method, lam, shape, seed):
    first, second = constant(shape, 37, 230)
    mixed, share = mix_images(method, first, second, lam, seed=seed)
    turned, other = mix_images(method, second, first, lam, seed=seed)
    # Both halves are rounded up, so the sum for MixUp may be one level higher.
    assert set(np.unique(mixed.astype(int) + turned)) <= ({267} if method in FROM_EITHER else {267, 268})
    np.testing.assert_array_equal(share, other)


@every_method
def test_randomness_depends_only_on_the_seed(method):
    first, second = pairs((6, 16, 16, 3))
    results = [mix_images(method, first, second, 0.4, seed=seed)[0] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(results[0], results[1])
    assert (method == "mixup") == np.array_equal(results[0], results[2])


@every_method
def test_arguments_are_not_modified_and_may_be_read_only(method):
    first, second = pairs((3, 8, 8, 1))
    before = first.copy(), second.copy()
    first.flags.writeable = second.flags.writeable = False
    mix_images(method, first, second, 0.5)
    np.testing.assert_array_equal(first, before[0])
    np.testing.assert_array_equal(second, before[1])


@every_method
def test_channels_last_memory_is_preserved(method):
    first, second = (torch.from_numpy(images).permute(0, 3, 1, 2) for images in pairs((4, 8, 6, 3)))
    mixed, _ = mix_pixels(method, first, second, torch.full((4,), 0.3, dtype=torch.float64), row_rngs(0))
    assert mixed.is_contiguous(memory_format=torch.channels_last)


@every_method
def test_empty_batches_can_be_mixed(method):
    nothing = np.zeros((0, 8, 8, 3), np.uint8)
    mixed, share = mix_images(method, nothing, nothing, 0.5)
    assert (mixed.shape, share.shape) == ((0, 8, 8, 3), (0,))


@pytest.mark.gpu
@every_method
def test_cuda_and_cpu_results_are_identical(method):
    first, second = (torch.from_numpy(images).permute(0, 3, 1, 2) for images in pairs((64, 32, 32, 3)))
    lam = torch.from_numpy(np.random.default_rng(0).beta(0.7, 0.7, 64))
    expected, share = mix_pixels(method, first, second, lam, row_rngs(0))
    mixed, other = mix_pixels(method, first.cuda(), second.cuda(), lam, row_rngs(0))
    assert torch.equal(mixed.cpu(), expected)
    assert torch.equal(other, share)


# Individual methods.


@pytest.mark.parametrize("method", IN_PLACE)
@given(lam=LAMBDAS, shape=SHAPES, seed=SEEDS)
def test_pixels_keep_their_position(method, lam, shape, seed):
    first, second = pairs(shape, seed)
    mixed, share = mix_images(method, first, second, lam, seed=seed)
    from_second = mixed % 2 == 1  # see pairs()
    np.testing.assert_array_equal(mixed, np.where(from_second, second, first))
    assert (from_second == from_second[..., :1]).all(), "all channels of a pixel come from one image"
    np.testing.assert_array_equal(share, from_second[..., 0].mean(axis=(1, 2)).astype(np.float32))


@given(lam=LAMBDAS, seed=SEEDS)
def test_mixup_is_exact_and_rounds_half_up(lam, seed):
    first, second = pairs((1, 8, 8, 3), seed)
    mixed, share = mix_images("mixup", first, second, lam)
    weight = Fraction(round(Fraction(lam) * 2**32), 2**32)  # Python rounds half to even, like torch
    assert abs(weight - Fraction(lam)) <= Fraction(1, 2**33)
    for a, b, found in zip(first.flat, second.flat, mixed.flat, strict=True):
        assert found == math.floor((1 - weight) * int(a) + weight * int(b) + Fraction(1, 2))
    assert share[0] == np.float32(lam)


def test_mixup_rounds_every_tie_up():
    levels = np.arange(256, dtype=np.uint8)
    first, second = (np.ascontiguousarray(grid).reshape(1, 256, 256, 1) for grid in np.meshgrid(levels, levels))
    mixed, _ = mix_images("mixup", first, second, 0.5)
    np.testing.assert_array_equal(mixed, (first.astype(int) + second + 1) // 2)


@given(lam=LAMBDAS, shape=SHAPES, seed=SEEDS)
def test_cutmix_uses_the_published_box_and_its_clipped_area(lam, shape, seed):
    count, height, width, _ = shape
    mixed, share = mix_images("cutmix", *constant(shape, 0, 255), lam, seed=seed)
    for row in range(count):
        draws = row_rngs(seed, "mix", "method")(row)
        # rand_bbox of Yun et al.; its cut ratio is √(1 − λ), since their λ is the share of the first image.
        cut_w, cut_h = int(width * np.sqrt(lam)), int(height * np.sqrt(lam))
        x, y = draws.integers(width), draws.integers(height)
        left, right = np.clip(x - cut_w // 2, 0, width), np.clip(x + cut_w // 2, 0, width)
        top, bottom = np.clip(y - cut_h // 2, 0, height), np.clip(y + cut_h // 2, 0, height)
        expected = np.zeros((height, width), np.uint8)
        expected[top:bottom, left:right] = 255
        np.testing.assert_array_equal(mixed[row, :, :, 0], expected)
        assert share[row] == np.float32((right - left) * (bottom - top) / (height * width))


def test_cutmix_boxes_are_clipped_as_often_as_expected():
    _, share = mix_images("cutmix", *constant((4000, 16, 16, 1), 0, 255), 0.25)
    # An 8×8 box in 16×16 is not clipped for 9 of 16 centres on either axis: 0.316, ± 5 standard deviations.
    assert abs(float((share == 0.25).mean()) - (9 / 16) ** 2) < 0.04
    assert share.min() == np.float32(16 / 256)  # a centre in the upper left corner leaves 4×4 of the box


@given(lam=LAMBDAS, height=st.integers(1, 13), width=st.integers(1, 13), seed=SEEDS)
def test_resizemix_pastes_the_complete_second_image_inside(lam, height, width, seed):
    first = np.full((1, height, width, 2), 255, np.uint8)
    places = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), axis=-1).astype(np.uint8)[None]
    mixed, share = mix_images("resizemix", first, places, lam, seed=seed)
    tall, wide = int(height * np.sqrt(lam)), int(width * np.sqrt(lam))
    assert share[0] == np.float32(tall * wide / (height * width))
    rows, columns = np.nonzero(mixed[0, :, :, 0] != 255)
    assert len(rows) == tall * wide
    if len(rows):
        patch = mixed[0, rows.min() : rows.min() + tall, columns.min() : columns.min() + wide]
        # The pixel that contains the centre of the patch pixel, in exact arithmetic.
        from_row = [math.floor(Fraction(2 * r + 1, 2 * tall) * height) for r in range(tall)]
        from_column = [math.floor(Fraction(2 * c + 1, 2 * wide) * width) for c in range(wide)]
        np.testing.assert_array_equal(patch[..., 0], np.repeat(np.array(from_row)[:, None], wide, axis=1))
        np.testing.assert_array_equal(patch[..., 1], np.repeat(np.array(from_column)[None], tall, axis=0))


def test_resizemix_patches_are_uniformly_placed():
    mixed, _ = mix_images("resizemix", *constant((3000, 4, 4, 1), 0, 1), 0.25)
    corners = mixed.sum(axis=0)[[0, 0, 3, 3], [0, 3, 0, 3], 0].astype(int)
    # A 2×2 patch has nine positions, one of which covers a given corner: 333 of 3,000, ± 5 standard deviations.
    assert np.abs(corners - 3000 / 9).max() < 90


@given(lam=LAMBDAS, height=st.integers(1, 13), width=st.integers(1, 13), seed=SEEDS)
def test_fmix_takes_exactly_the_floor_of_lambda_times_area(lam, height, width, seed):
    mixed, share = mix_images("fmix", *constant((1, height, width, 1), 0, 1), lam, seed=seed)
    count = math.floor(np.float64(lam) * (height * width))
    assert int(mixed.sum()) == count
    assert share[0] == np.float32(count / (height * width))


def test_fmix_masks_are_smooth_and_differ():
    mixed, _ = mix_images("fmix", *constant((200, 32, 32, 1), 0, 1), 0.5)
    masks = mixed[..., 0].astype(int)
    borders = (np.diff(masks, axis=1) != 0).mean() + (np.diff(masks, axis=2) != 0).mean()
    # Independent pixels would have 0.5 along both axes, a straight cut 1/31 along one.
    assert borders < 0.25
    assert len(np.unique(masks.reshape(200, -1), axis=0)) == 200
    assert np.abs(masks.mean(axis=0) - 0.5).max() < 0.25, "some position is preferred"


def test_fmix_matches_the_spectrum_of_the_published_code():
    # Harris et al.: max(frequency, 1/longer side) to the power of −3, inverse real transform, largest values first.
    draws = row_rngs(5, "mix", "method")(0).standard_normal((2, 6, 5))
    fy, fx = np.fft.fftfreq(6)[:, None], np.abs(np.fft.fftfreq(8)[:5])
    scale = 1 / np.maximum(np.sqrt(fx * fx + fy * fy), 1 / 8) ** 3
    field = np.fft.irfftn(scale * (draws[0] + 1j * draws[1]), (6, 8), axes=(0, 1))
    expected = field >= np.sort(field.ravel())[-20]
    mixed, _ = mix_images("fmix", *constant((1, 6, 8, 1), 0, 1), 20.5 / 48, seed=5)
    np.testing.assert_array_equal(mixed[0, :, :, 0] == 1, expected)


# Invalid arguments.


@pytest.mark.parametrize("lam", [-0.1, 1.1, np.nan, np.array([0.5, 2.0])])
def test_lambda_outside_zero_to_one_is_rejected(lam):
    with pytest.raises(RecipeError, match="λ must be within"):
        mix_images("mixup", *pairs((2, 4, 4, 1)), lam)


def test_wrong_shapes_and_types_are_rejected():
    first, second = pairs((2, 4, 4, 1))
    for wrong in (second[:1], second[..., 0], second.astype(np.float32)):
        with pytest.raises(RecipeError, match=r"expected two uint8 arrays \(N, H, W, C\) of the same shape"):
            mix_images("mixup", first, wrong, 0.5)
    with pytest.raises(RecipeError, match=r"one per pair, \(2,\)"):
        mix_images("mixup", first, second, np.zeros(3))


def test_an_unknown_method_is_rejected_with_a_suggestion():
    with pytest.raises(RecipeError, match=r"unknown mixing method in pixel space 'cutmixx'\. Did you mean 'cutmix'\?"):
        mix_images("cutmixx", *pairs((2, 4, 4, 1)), 0.5)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda x1, _x2, lam, _draws: (x1.float(), lam), r"returned torch\.float32 \(2, 1, 4, 4\)"),
        (lambda x1, _x2, lam, _draws: (x1[:1], lam), r"returned torch\.uint8 \(1, 1, 4, 4\)"),
        (lambda x1, _x2, lam, _draws: (x1, lam.float()), r"returned shares torch\.float32 \(2,\)"),
        (lambda x1, _x2, lam, _draws: (x1, lam + 1), r"all in \[0, 1\]"),
        (lambda x1, _x2, lam, _draws: (x1, lam * torch.nan), r"all in \[0, 1\]"),
    ],
)
def test_the_error_names_a_method_that_violates_its_contract(monkeypatch, broken, message):
    monkeypatch.setattr(PIXEL_METHODS, "load", lambda _name: broken)
    with pytest.raises(RecipeError, match=message) as caught:
        mix_images("theirs", *pairs((2, 4, 4, 1)), 0.5)
    assert "mixing method in pixel space 'theirs'" in str(caught.value)
