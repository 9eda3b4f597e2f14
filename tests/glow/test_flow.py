"""The complete flow: byte-exact round trip, exact likelihoods, fixed batches, CUDA compared to the CPU."""

import functools
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lsmix.data.errors import RecipeError
from lsmix.glow.config import FlowConfig, FlowTraining
from lsmix.glow.flow import Flow
from lsmix.glow.training import FlowTrainer, sample

SHARED = Path(os.environ.get("LSMIX_SHARED_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data")


def _images(count, height, width, channels):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


@functools.cache
def _trained(height, width, channels, levels, scale="sigmoid"):
    """Return a flow after a few large steps, so that no layer is near its start; cached, since tests only read it."""
    flow = Flow(
        FlowConfig(height=height, width=width, channels=channels, levels=levels, steps=2, hidden=8, scale=scale)
    )
    config = FlowTraining(batch_size=16, learning_rate=3e-3, translate=0)
    trainer = FlowTrainer(flow, config, _images(64, height, width, channels))
    for _ in range(5):
        trainer.step()
    return flow.eval()


SHAPES = st.sampled_from([(8, 8, 1, 1), (8, 8, 3, 3), (5, 7, 1, 2), (1, 9, 2, 2), (12, 4, 3, 2), (10, 6, 1, 3)])


@settings(max_examples=15, deadline=None)
@given(shape=SHAPES, scale=st.sampled_from(["sigmoid", "tanh"]), count=st.integers(0, 9), seed=st.integers(0, 99))
def test_decoding_restores_every_byte(shape, scale, count, seed):
    flow = _trained(*shape, scale)
    images = np.random.default_rng(seed).integers(0, 256, (count, *shape[:3]), dtype=np.uint8)
    z = flow.encode(images, batch_size=4)
    assert z.shape == (count, flow.dim)
    assert z.dtype == np.float32
    back = flow.decode(z, batch_size=4)
    assert np.array_equal(back, images)


def test_real_images_decode_to_the_same_bytes():
    if not SHARED.is_dir():
        pytest.skip(f"no real images at {str(SHARED)!r}; set LSMIX_SHARED_DATA")
    image_module = pytest.importorskip("PIL.Image")
    sheet = np.asarray(image_module.open(SHARED / "cifar10_test_0.webp").convert("RGB"))
    images = sheet.reshape(-1, 32, 50, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3)[:32].copy()
    flow = Flow(FlowConfig(height=32, width=32, channels=3, levels=3, steps=2, hidden=16))
    trainer = FlowTrainer(flow, FlowTraining(batch_size=32, learning_rate=1e-3), images)
    losses = [trainer.step().loss_bits_per_dim for _ in range(8)]
    assert losses[-1] < losses[0]
    assert np.array_equal(flow.decode(flow.encode(images)), images)


@pytest.mark.parametrize("bits", [5, 8])
def test_output_is_floored_to_the_requested_bits(bits):
    flow, images = _trained(8, 8, 1, 1), _images(4, 8, 8, 1)
    back = flow.decode(flow.encode(images), output=f"{bits}bit")
    assert np.array_equal(back, images >> (8 - bits) << (8 - bits))


def test_results_do_not_depend_on_an_images_position():
    flow, images = _trained(8, 8, 3, 3), _images(11, 8, 8, 3)
    z = flow.encode(images, batch_size=4)
    assert np.array_equal(flow.encode(images[4:7], batch_size=4), z[4:7])
    assert np.array_equal(flow.encode(images[10:], batch_size=4), z[10:])
    assert np.array_equal(flow.decode(z[10:], batch_size=4), flow.decode(z, batch_size=4)[10:])


def test_uniform_noise_depends_only_on_seed_and_index():
    flow, images = _trained(5, 7, 1, 2), _images(6, 5, 7, 1)
    z = flow.encode(images, dequantise="uniform", seed=3, batch_size=4)
    again = flow.encode(images[4:], dequantise="uniform", seed=3, batch_size=4, first_index=4)
    assert np.array_equal(again, z[4:])
    assert not np.array_equal(flow.encode(images, dequantise="uniform", seed=4, batch_size=4), z)
    assert np.array_equal(flow.decode(z, output="5bit", batch_size=4), images >> 3 << 3)


def test_bits_per_dimension_include_the_discretisation():
    flow = Flow(FlowConfig(height=4, width=4, channels=1, levels=1, steps=1, hidden=4, bits=5))
    images = _images(3, 4, 4, 1)  # an untrained coupling is the identity, so y -> z is a rotation
    y = (images.astype(np.float64) + 0.5) / 256 - 0.5
    log_density = -0.5 * (y**2).sum(axis=(1, 2, 3)) - 8 * math.log(2 * math.pi)
    log_prob = flow.log_prob(images)
    # The flow computes y in float32 and sums 16 squares.
    assert log_prob == pytest.approx(log_density - 16 * 5 * math.log(2), abs=1e-4)
    assert flow.bits_per_dim(log_prob) == pytest.approx(-log_prob / (16 * math.log(2)))
    assert log_prob.dtype == np.float64


def test_tensor_and_array_methods_agree():
    flow, images = _trained(5, 7, 1, 2), _images(4, 5, 7, 1)
    y = torch.from_numpy((images.astype(np.float32) + 0.5) / 256 - 0.5).permute(0, 3, 1, 2)
    z, log_prob = flow.encode_batch(y)
    assert np.array_equal(z.numpy(), flow.encode(images, batch_size=4))
    assert np.array_equal(log_prob.numpy(), flow.log_prob(images, batch_size=4))
    # The decoding error must stay well below half of an 8-bit cell, 1/512.
    assert torch.allclose(flow.decode_batch(z), y, atol=1e-4)


def test_validate_receives_unclipped_images():
    flow = _trained(5, 7, 1, 2)
    z = np.zeros((5, flow.dim), np.float32)
    z[3] = 1e4
    images, outside = flow.decode(z, validate=lambda y: (y.abs() > 0.5).flatten(1).any(dim=1), batch_size=4)
    assert outside.tolist() == [False, False, False, True, False]
    assert np.array_equal(images, flow.decode(z, batch_size=4))


def test_encoding_does_not_change_global_state():
    flow, images = _trained(8, 8, 1, 1), _images(4, 8, 8, 1)
    before = torch.random.get_rng_state()
    Flow(flow.config)
    flow.encode(images, dequantise="uniform")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.is_grad_enabled()


def test_initial_weights_depend_on_the_seed():
    config = FlowConfig(height=4, width=4, channels=1, levels=1, steps=1, hidden=4)
    first, again, other = (Flow(config, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_arrays_of_wrong_shape_are_rejected():
    flow = _trained(8, 8, 1, 1)
    with pytest.raises(RecipeError, match=r"expected uint8 \(N, 8, 8, 1\), got uint8 \(2, 8, 8, 3\)"):
        flow.encode(_images(2, 8, 8, 3))
    with pytest.raises(RecipeError, match=r"expected floats \(N, 64\), got float32 \(2, 63\)"):
        flow.decode(np.zeros((2, 63), np.float32))
    with pytest.raises(RecipeError, match="batch_size must be at least 1"):
        flow.encode(_images(2, 8, 8, 1), batch_size=0)
    with pytest.raises(RecipeError, match="cannot be halved 3 times"):
        Flow(FlowConfig(height=30, width=32, channels=3, pad="refuse"))


def test_samples_have_the_flows_bit_depth_and_depend_on_the_seed():
    flow = _trained(5, 7, 1, 2)
    images = sample(flow, 3, temperature=0.7, seed=1)
    assert images.shape == (3, 5, 7, 1)
    assert not (images & 7).any()
    assert np.array_equal(sample(flow, 2, temperature=0.7, seed=1), images[:2])
    assert sample(flow, 0).shape == (0, 5, 7, 1)


@pytest.mark.gpu
def test_cuda_and_cpu_agree_within_one_grey_level():
    config = FlowConfig(height=32, width=32, channels=3, levels=3, steps=4, hidden=32)
    images = _images(20, 32, 32, 3)
    flow = Flow(config)
    trainer = FlowTrainer(flow, FlowTraining(batch_size=20, learning_rate=1e-3), images)
    for _ in range(3):
        trainer.step()
    z = flow.encode(images)
    mixed = np.concatenate([z[:10, :1000], z[10:, 1000:]], axis=1)
    on_cpu = flow.decode(mixed)
    flow.cuda()
    assert np.abs(flow.encode(images) - z).max() < 1e-2  # float32 over 12 steps, sums in a different order
    assert np.array_equal(flow.decode(flow.encode(images)), images)
    assert np.abs(flow.decode(mixed).astype(int) - on_cpu).max() <= 1
    assert np.array_equal(flow.decode(mixed), flow.decode(mixed))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_training_on_cuda_lowers_the_loss_in_every_precision(precision):
    images = _images(32, 16, 16, 3) // 4
    flow = Flow(FlowConfig(height=16, width=16, channels=3, levels=2, steps=2, hidden=32)).cuda()
    config = FlowTraining(batch_size=32, learning_rate=1e-3, precision=precision)
    trainer = FlowTrainer(flow, config, images)
    losses = [trainer.step().loss_bits_per_dim for _ in range(20)]
    assert losses[-1] < losses[0]
