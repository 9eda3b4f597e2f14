"""Laws of the measures: distance to itself is 0, a shift counts in one direction, and closed forms hold."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lsmix.pipeline.naturalness.metrics import Resamples, border_gradients, frechet_distance, interval, transport

numbers = st.floats(-10, 10, allow_subnormal=False)
samples = arrays(np.float64, st.integers(1, 12), elements=numbers)


@given(samples)
def test_the_distance_of_a_sample_to_itself_is_zero(sample):
    assert transport(sample, sample[::-1]) == (0.0, 0.0)


@given(samples, st.floats(0, 5, allow_subnormal=False))
def test_a_shift_counts_with_its_size_in_its_direction_only(sample, shift):
    up, down = transport(sample + shift, sample), transport(sample - shift, sample)
    assert up.above == pytest.approx(shift, abs=1e-12)
    assert down.below == pytest.approx(shift, abs=1e-12)
    # Adding and subtracting the same float may round by one ulp of 15.
    assert max(up.below, down.above) <= 1e-14


@given(samples, samples)
def test_the_directions_are_symmetric_and_sum_to_the_wasserstein_distance(one, other):
    from scipy.stats import wasserstein_distance

    forward, backward = transport(one, other), transport(other, one)
    assert forward.above == pytest.approx(backward.below, abs=1e-12)
    assert forward.below + forward.above == pytest.approx(wasserstein_distance(one, other), abs=1e-9)
    assert forward.above - forward.below == pytest.approx(one.mean() - other.mean(), abs=1e-9)


def test_a_narrower_sample_differs_in_both_directions():
    assert transport(np.array([1.0, 1.0]), np.array([0.0, 2.0])) == (0.5, 0.5)


@pytest.mark.parametrize("sample", [np.array([]), np.array([np.nan]), np.array([np.inf, 1.0])])
def test_a_distance_without_finite_numbers_is_rejected(sample):
    with pytest.raises(ValueError, match="needs finite numbers in both samples"):
        transport(sample, np.array([1.0]))


def _interval_above(sample, reference):
    drawn = Resamples(count=200, pairs=len(sample), originals=len(reference), seed=0)
    resampled = [transport(sample[one.pairs], reference[one.originals]).above for one in drawn]
    return interval(transport(sample, reference).above, np.array(resampled))


def test_the_interval_of_equal_samples_contains_zero_and_larger_values():
    sample = np.random.default_rng(0).normal(size=60)
    found = _interval_above(sample, sample.copy())
    assert found.value == found.low == 0.0
    assert found.high > 0.0


def test_the_interval_of_a_shifted_sample_contains_the_shift_but_not_zero():
    draws = np.random.default_rng(0)
    found = _interval_above(draws.normal(size=300) + 1.0, draws.normal(size=300))
    assert 0.0 < found.low < 1.0 < found.high


def test_intervals_have_about_their_nominal_coverage():
    shift, covered = 0.3, 0
    for trial in range(60):
        draws = np.random.default_rng(trial)
        found = _interval_above(draws.normal(size=50) + shift, draws.normal(size=50))
        covered += found.low <= shift <= found.high
    assert covered >= 54  # 95% of 60 is 57; fewer than 54 would occur once in 20 trials, but the seeds are fixed


def test_resamples_are_reproducible_and_stay_in_range():
    drawn = Resamples(count=3, pairs=5, originals=7, seed=1)
    for one, again in zip(drawn, drawn, strict=True):
        np.testing.assert_array_equal(one.pairs, again.pairs)
        np.testing.assert_array_equal(one.originals, again.originals)
        assert (len(one.pairs), len(one.originals)) == (5, 7)
        assert one.pairs.max() < 5
        assert one.originals.max() < 7
    first, second, _ = drawn
    assert first.pairs.tolist() != second.pairs.tolist()


# The Fréchet distance. If a covariance is singular, its zero eigenvalues are about 1e-16, and their roots 1e-8.


def _features(mean, deviations):
    """Return features with exactly this sample mean and diagonal sample covariance."""
    width = len(mean)
    spread = np.diag(deviations) * np.sqrt((2 * width - 1) / 2)
    return np.concatenate((spread, -spread)) + np.array(mean)


def test_the_distance_of_equal_features_is_zero():
    features = np.random.default_rng(0).normal(size=(40, 6))
    assert frechet_distance(features, features[::-1]) == pytest.approx(0.0, abs=1e-12)


def test_features_with_diagonal_covariances_match_the_closed_form():
    one, other = _features([0.0, 1.0, 2.0], [1.0, 2.0, 3.0]), _features([1.0, 1.0, 0.0], [2.0, 0.5, 3.0])
    expected = (1.0 + 0.0 + 4.0) + (1.0 + 1.5**2 + 0.0)  # |difference of means|² + Σ (σ₁ − σ₂)²
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(other, one) == pytest.approx(expected, rel=1e-12)


def test_the_distance_is_invariant_under_rotation():
    draws = np.random.default_rng(0)
    one, other = draws.normal(size=(50, 4)), draws.normal(size=(50, 4)) * [1.0, 2.0, 0.5, 0.0]
    turn, _ = np.linalg.qr(draws.normal(size=(4, 4)))
    assert frechet_distance(one @ turn, other @ turn) == pytest.approx(frechet_distance(one, other), abs=1e-6)


def test_the_distance_is_real_for_fewer_rows_than_features():
    draws = np.random.default_rng(0)
    one, other = draws.normal(size=(5, 20)), draws.normal(size=(5, 20))
    assert frechet_distance(one, other) > 0.0
    assert frechet_distance(one, one + 1.0) == pytest.approx(20.0, abs=1e-6)


@pytest.mark.parametrize(("one", "other"), [((1, 3), (4, 3)), ((4, 3), (4, 2))], ids=["a single row", "another width"])
def test_features_of_wrong_shape_are_rejected(one, other):
    with pytest.raises(ValueError, match="expected at least 2 rows and equal widths"):
        frechet_distance(np.zeros(one), np.zeros(other))


def test_features_that_are_not_finite_are_rejected():
    with pytest.raises(ValueError, match="features must be finite"):
        frechet_distance(np.full((3, 2), np.nan), np.zeros((3, 2)))


# Seams.

LEFT = np.array([[[True, True, False, False]] * 4])


def test_the_seam_matches_an_image_computed_by_hand():
    # Rows 0 2 10 12: 8 across the border; elsewhere twice 2 in each row and 0 between rows, (4 × 2 × 2 + 12 × 0) / 20.
    image = np.array([[0, 2, 10, 12]] * 4, np.uint8)[None, :, :, None]
    across, inside = border_gradients(image, LEFT)
    assert across.tolist() == [8.0]
    assert inside.tolist() == [16 / 20]


def test_differences_are_averaged_over_channels_and_do_not_overflow():
    image = np.zeros((1, 4, 4, 2), np.uint8)
    image[:, :, 2:, 0] = 255
    across, inside = border_gradients(image, LEFT)
    assert across.tolist() == [127.5]
    assert inside.tolist() == [0.0]


def test_horizontal_and_vertical_borders_count_alike():
    image = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    regions = np.broadcast_to(LEFT, (3, 4, 4))
    turned = border_gradients(image.swapaxes(1, 2), regions.swapaxes(1, 2))
    for one, other in zip(border_gradients(image, regions), turned, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_an_image_without_a_border_has_no_gradient_across_it():
    across, inside = border_gradients(np.zeros((1, 4, 4, 1), np.uint8), np.ones((1, 4, 4), bool))
    assert np.isnan(across).all()
    assert inside.tolist() == [0.0]
