"""Batches mixed on the fly: partners are a permutation, targets use the same shares, and draws are keyed."""

import msgspec
import numpy as np
import pytest
import torch

from lsmix.classifiers.config import PixelMix
from lsmix.classifiers.pixel_mixing import mix_batch
from lsmix.data.mixing import PIXEL_METHODS

every_method = pytest.mark.parametrize("method", PIXEL_METHODS.names())


def labelled(count):
    """Return images whose pixels all equal their index, with one class each."""
    numbers = torch.arange(count, dtype=torch.uint8)
    images = numbers[:, None, None, None].expand(count, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    return images, torch.eye(count)


@every_method
def test_targets_are_weighted_like_the_pixels(method):
    images, target = labelled(12)
    mixed, soft = mix_batch(PixelMix(method=method), images, target, 3, "test")
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(12))
    # The mean pixel equals the mean index of the target, up to half a level of MixUp's rounding.
    tolerance = 0.5001 if method == "mixup" else 1e-4
    means = mixed.double().mean(dim=(1, 2, 3))
    torch.testing.assert_close(means, (soft.double() @ torch.arange(12.0).double()), rtol=0, atol=tolerance)


@every_method
def test_every_image_is_used_once_as_first_and_once_as_second(method):
    images, target = labelled(16)
    _, soft = mix_batch(PixelMix(method=method), images, target, 0, "test")
    first = soft.diagonal()
    second = (soft - torch.diag(first)).sum(dim=1)
    torch.testing.assert_close(first + second, torch.ones(16))
    # No image is the partner of two others: each column has at most one entry off the diagonal.
    assert int(((soft - torch.diag(first)) > 0).sum(dim=0).max()) <= 1


def test_one_lambda_per_batch_or_per_sample():
    images, target = labelled(16)
    per_batch, per_sample = (
        mix_batch(PixelMix(method="mixup", rate=rate), images, target, 0, "test")[1]
        for rate in ("per-batch", "per-sample")
    )
    shares = [{round(float(value), 6) for value in soft[soft > 0]} for soft in (per_batch, per_sample)]
    assert len(shares[0]) == 2
    assert len(shares[1]) > 16


def test_lambda_follows_the_beta_distribution():
    images, target = torch.zeros(4000, 1, 1, 1, dtype=torch.uint8), torch.eye(2).repeat(2000, 1)
    images[:] = 255 * target[:, :1, None, None].to(torch.uint8)
    for alpha in (0.2, 4.0):
        mixed, _ = mix_batch(PixelMix(method="mixup", alpha=alpha), images, target, 1, "test")
        between = mixed[(mixed > 0) & (mixed < 255)].double() / 255
        inner = float(((between > 0.25) & (between < 0.75)).double().mean())
        expected = np.random.default_rng(0).beta(alpha, alpha, 200_000)
        expected = expected[(expected > 0.002) & (expected < 0.998)]  # values that are not rounded to an unmixed image
        # 0.06 is five standard deviations for 2,000 draws.
        assert abs(inner - ((expected > 0.25) & (expected < 0.75)).mean()) < 0.06


@every_method
def test_the_draws_depend_on_seed_and_words(method):
    images, target = labelled(16)
    mix = PixelMix(method=method)
    results = [
        mix_batch(mix, images, target, seed, *words)[1] for seed, *words in ((0, 1, 2), (0, 1, 2), (0, 1, 3), (1, 1, 2))
    ]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[3])


def test_mixing_twice_weights_up_to_four_labels():
    images, target = labelled(64)
    mixed, soft = mix_batch(
        PixelMix(method="cutmix"), *mix_batch(PixelMix(method="mixup"), images, target, 0, "a"), 0, "b"
    )
    assert mixed.dtype == torch.uint8
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(64))
    assert int((soft > 0).sum(dim=1).max()) == 4


def test_channels_last_memory_is_preserved_and_the_batch_is_not_modified():
    images, target = labelled(8)
    before = images.clone(), target.clone()
    mixed, _ = mix_batch(PixelMix(method="cutmix"), images, target, 0, "test")
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before[0])
    assert torch.equal(target, before[1])


def test_an_invalid_configuration_is_rejected():
    decode = msgspec.json.Decoder(PixelMix).decode
    assert decode('{"method": "mixup"}') == PixelMix(method="mixup", alpha=1.0, rate="per-sample")
    with pytest.raises(
        msgspec.ValidationError, match=r"unknown mixing method in pixel space 'mixxup'\. Did you mean 'mixup'"
    ):
        decode('{"method": "mixxup"}')
    for wrong in (
        "{}",
        '{"method": "mixup", "alpha": 0}',
        '{"method": "mixup", "rate": "each"}',
        '{"method": "ls-mix"}',
    ):
        with pytest.raises(msgspec.ValidationError):
            decode(wrong)
