"""Mean and standard deviation of a training set are exact and are saved with the network's weights."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lsmix.classifiers import normalise
from lsmix.classifiers.normalise import Normalised, channel_statistics
from lsmix.data.errors import RecipeError


@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 3])),
    seed=st.integers(0, 999),
)
def test_statistics_are_exact_and_rounded_once(shape, seed):
    images = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    mean, std = channel_statistics(images)
    for channel in range(shape[3]):
        values = [Fraction(int(value), 255) for value in images[..., channel].flat]
        exact = sum(values) / len(values)
        variance = sum((value - exact) ** 2 for value in values) / len(values)
        assert mean[channel] == float(exact)
        assert std[channel] == float(variance) ** 0.5 or (variance == 0 and std[channel] == 1)


def test_statistics_do_not_depend_on_order_and_chunks(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (50, 6, 5, 3), dtype=np.uint8)
    expected = channel_statistics(images)
    monkeypatch.setattr(normalise, "_CHUNK_BYTES", 200)
    for other in (images, images[::-1]):
        for a, b in zip(expected, channel_statistics(other), strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(expected[0], (images / 255).mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(expected[1], (images / 255).std(axis=(0, 1, 2)))


def test_an_empty_image_set_is_rejected():
    with pytest.raises(RecipeError, match="need at least one image"):
        channel_statistics(np.zeros((0, 8, 8, 3), np.uint8))


def test_the_network_receives_mean_0_and_variance_1():
    images = np.random.default_rng(0).integers(20, 90, (64, 8, 8, 3), dtype=np.uint8)
    images[..., 2] = 7  # a constant channel becomes 0
    model = Normalised(nn.Identity(), channels=3)
    model.set_statistics(channel_statistics(images))
    seen = model(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
    # float32 sums of 4,096 values.
    torch.testing.assert_close(seen.mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(seen.std(dim=(0, 2, 3), correction=0), torch.tensor([1.0, 1.0, 0.0]), rtol=0, atol=1e-5)
    assert set(model.state_dict()) == {"mean", "std"}
