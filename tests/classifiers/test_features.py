"""Features are the inputs of the last linear layer, for any architecture that has one."""

import numpy as np
import pytest
import torch
from torch import nn

from lsmix.classifiers.config import ClassifierTraining
from lsmix.classifiers.evaluation import features
from lsmix.classifiers.registry import build_classifier
from lsmix.data.errors import RecipeError


def images(count):
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("fields", "size"),
    [({"width": 6}, 6), ({"architecture": "wrn-10-1"}, 64), ({"architecture": "wrn-10-1", "normalise": "channel"}, 64)],
)
def test_the_head_maps_features_to_logits(fields, size):
    model = build_classifier(ClassifierTraining(**fields), 5, (8, 8, 3))
    pixels = images(300)  # more than one batch
    found = features(model, pixels)
    assert (found.shape, found.dtype) == ((300, size), np.float32)
    assert not model.training
    head = getattr(model, "network", model).head
    with torch.no_grad():
        logits = model(torch.from_numpy(pixels[-20:]).permute(0, 3, 1, 2).float() / 255)
        # The batch size affects the last bits.
        torch.testing.assert_close(head(torch.from_numpy(found[-20:])), logits, rtol=1e-4, atol=1e-5)


def test_the_last_linear_layer_is_the_last_one_called():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.second, self.first = nn.Linear(3, 2), nn.Linear(192, 3)

        def forward(self, x):
            return self.second(self.first(x.flatten(1)))

    assert features(Backwards(), images(4)).shape == (4, 3)


def test_hooks_are_removed():
    model = build_classifier(ClassifierTraining(width=4), 5, (8, 8, 3))
    before = features(model, images(3))
    assert not model.head._forward_pre_hooks
    np.testing.assert_array_equal(features(model, images(3)), before)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Flatten(), r"Flatten has no features for 2 images: its last nn\.Linear does not exist"),
        (nn.Linear(8, 5), r"receives \(2, 3, 8, 8\); expected one vector per image"),
        (nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (1, 384)), nn.Linear(384, 5)), r"receives \(1, 384\)"),
    ],
)
def test_a_network_without_features_is_rejected(model, message):
    with pytest.raises(RecipeError, match=message):
        features(model, images(2))


def test_features_without_images_are_an_error():
    with pytest.raises(RecipeError, match="at least one image"):
        features(nn.Flatten(), images(0))
